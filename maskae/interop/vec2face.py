"""Vec2Face's reference cases, and the weights of its networks under the names of the released code, ArcFace's and LPIPS'."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskae.errors import UserError
from maskae.identity_vectors import vary
from maskae.interop.case import GRADIENT, Case, Reproduced, exact, leading
from maskae.interop.cnn import batch_norm, conv, foreign_names
from maskae.interop.layout import VALUE, VECTOR, Geometry, Layout, Rule, Shape, from_foreign
from maskae.interop.record import numbers_of
from maskae.interop.vit import linear, norm, paper_block
from maskae.interop.weights import read_tensors
from maskae.losses.adversarial import discriminator_loss
from maskae.losses.perceptual import CONVOLUTIONS
from maskae.nn.row_mask import MaskRate, RowMask, mask_rows
from maskae.nn.vector_autoencoder import EPSILON
from maskae.paths import flatten_paths, unflatten_paths
from maskae.schedules import warmup_cosine
from maskae.systems.contract import Params
from maskae.systems.vec2face import Critique, Vec2Face

FEATURE = 1e-4
ZERO, ROUNDING = 1e-12, 1e-6


def generator_rules(levels: int) -> tuple[Rule, ...]:
    """The generator under `generator/`; the released model's blocks of `up` count from the finest level, as ours do."""
    ours, theirs = "generator/image", "im_decoder"
    rules = [linear("generator/vector", "latent_prior_proj_f"), linear("generator/rows", "feature_token")]
    rules += [(Rule("generator/encoder_position", ("token_emb.position_embeddings.weight",), VALUE),)]
    rules += [(Rule("generator/decoder_position", ("decoder_pos_embed_learned",), VALUE),)]
    rules += [norm("generator/encoder_embed_norm", "token_emb.LayerNorm"), norm("generator/encoder_norm", "norm")]
    rules += [norm("generator/decoder_norm", "decoder_norm"), linear("generator/decoder_embed", "decoder_embed")]
    rules += [paper_block("generator/encoder_block_{i}", "blocks.{i}"), paper_block("generator/decoder_block_{i}", "decoder_blocks.{i}")]
    rules += [linear("generator/project", "im_decoder_proj"), conv(f"{ours}/conv_in", f"{theirs}.conv_in")]
    places = [(f"{ours}/mid_block{n}", f"{theirs}.mid.block_{n + 1}") for n in (0, 1)]
    places += [(f"{ours}/level{level}_block{{i}}", f"{theirs}.up.{level}.block.{{i}}") for level in range(levels)]
    for mine, other in places:
        for n in (1, 2):
            rules += [norm(f"{mine}/norm{n}", f"{other}.norm{n}"), conv(f"{mine}/conv{n}", f"{other}.conv{n}")]
        rules += [conv(f"{mine}/shortcut", f"{other}.nin_shortcut")]
    rules += [conv(f"{ours}/level{{i}}_upsample", f"{theirs}.up.{{i}}.upsample.conv")]
    rules += [norm(f"{ours}/norm_out", f"{theirs}.norm_out"), conv(f"{ours}/conv_out", f"{theirs}.conv_out")]
    return tuple(rule for group in rules for rule in group)


def discriminator_rules() -> tuple[Rule, ...]:
    """The discriminator under `discriminator/`, with the prefix `disc.`."""
    ours, theirs = "discriminator", "disc.layers"
    rules = [conv(f"{ours}/first_{taps}", f"{theirs}.0.0.convs.{n}") for n, taps in enumerate((3, 7, 15))]
    rules += [conv(f"{ours}/stage{{i}}_conv", f"{theirs}.{{i}}.0"), norm(f"{ours}/stage{{i}}_norm", f"{theirs}.{{i}}.2")]
    rules += [norm(f"{ours}/stage{{i}}_residual_norm", f"{theirs}.{{i}}.3.block.groupnorm")]
    rules += [conv(f"{ours}/stage{{i}}_residual_conv", f"{theirs}.{{i}}.3.block.project")]
    rules += [conv(f"{ours}/logits_in", "disc.to_logits.0"), conv(f"{ours}/logits_out", "disc.to_logits.2")]
    return tuple(rule for group in rules for rule in group)


def _flattened(side: int) -> Shape:
    """The linear map of a flattened map, (channel, row, column) there and (row, column, channel) here."""

    def out(x: Any, _: Geometry) -> tuple[Any, ...]:
        return (x.reshape(side, side, -1, x.shape[-1]).transpose(3, 2, 0, 1).reshape(x.shape[-1], -1),)

    def back(parts: Any, shape: tuple[int, ...]) -> Any:
        return parts[0].reshape(shape[1], -1, side, side).transpose(2, 3, 1, 0).reshape(shape)

    return Shape(out, back)


def face_rules(side: int, prefix: str = "") -> tuple[Rule, ...]:
    """ArcFace's network, parameters and running statistics; `side` is that of its last map."""
    layer = f"{prefix}layer{{i}}.{{path}}"
    rules = [conv("conv", f"{prefix}conv1"), batch_norm("norm", f"{prefix}bn1"), (Rule("slope", (f"{prefix}prelu.weight",), VALUE),)]
    for n in (1, 2, 3):
        rules += [batch_norm(f"stage{{i}}_block{{path}}/norm{n}", f"{layer}.bn{n}")]
        rules += [conv(f"stage{{i}}_block{{path}}/conv{n}", f"{layer}.conv{n}")]
    rules += [(Rule("stage{i}_block{path}/slope", (f"{layer}.prelu.weight",), VALUE),)]
    rules += [conv("stage{i}_block{path}/shortcut", f"{layer}.downsample.0")]
    rules += [batch_norm("stage{i}_block{path}/shortcut_norm", f"{layer}.downsample.1"), batch_norm("norm_out", f"{prefix}bn2")]
    rules += [(Rule("vector/kernel", (f"{prefix}fc.weight",), _flattened(side)), Rule("vector/bias", (f"{prefix}fc.bias",), VECTOR))]
    rules += [batch_norm("vector_norm", f"{prefix}features")]
    return tuple(rule for group in rules for rule in group)


def perceptual_rules(prefix: str = "") -> tuple[Rule, ...]:
    """LPIPS on VGG-16: the layers' numbers count through torchvision's list, and the linear weights."""
    rules: list[Rule] = []
    number = 0
    weight = Shape(lambda x, _: (x.reshape(1, -1, 1, 1),), lambda parts, shape: parts[0].reshape(shape))
    for stage, count in enumerate(CONVOLUTIONS):
        for place in range(count):
            rules += conv(f"vgg/stage{stage}_conv{place}", f"{prefix}net.slice{stage + 1}.{number + 2 * place}")
        number += 2 * count + 1
        rules += [Rule(f"weights/stage{stage}", (f"{prefix}lin{stage}.model.1.weight",), weight)]
    return tuple(rules)


def fitted(tensors: Mapping[str, np.ndarray], template: Any, rules: tuple[Rule, ...], what: str) -> Any:
    """`template` with the values of `tensors`, float64 where that is switched on, else float32.

    Raises UserError where one is missing or has another shape.
    """
    flat, report = from_foreign(dict(tensors), flatten_paths(template), Layout(rules), Geometry(1, (1, 1)))
    if wrong := report.mismatched + [f"{name} is not in it" for name in report.missing]:
        raise UserError(f"{what} does not fit, {len(wrong)} leaves differ: {'; '.join(wrong[:3])}")
    return unflatten_paths({path: jnp.asarray(leaf, float) for path, leaf in flat.items()})


def fitted_face(tensors: Mapping[str, np.ndarray], own: Params, what: str, prefix: str = "") -> Params:
    """The identity network's `params` and `statistics`."""
    channels = own["statistics"]["norm_out"]["mean"].shape[0]
    rules = face_rules(round((own["params"]["vector"]["kernel"].shape[0] / channels) ** 0.5), prefix)
    return {part: fitted(tensors, own[part], rules, what) for part in ("params", "statistics")}


def read_face(path: str, own: Params) -> Params:
    """ArcFace's network from a safetensors file. Raises UserError where it does not fit `own`."""
    return fitted_face(read_tensors(path)[0], own, path)


def read_perceptual(path: str, own: Params) -> Params:
    """LPIPS' network and weights from a safetensors file. Raises UserError where it does not fit `own`."""
    tensors = {name.removeprefix("lpips."): value for name, value in read_tensors(path)[0].items()}
    return fitted(tensors, own, perceptual_rules(), path)


def generation_law(case: Case) -> MaskRate:
    """The recorded law of the mask rate where images are generated; the paper's where none is recorded."""
    meaning = case.meaning("mask_rate/generation_ppf")
    if not meaning:
        return MaskRate(*Vec2Face.generation_rate)
    low, mean, std, high = numbers_of(meaning, r"min ([\d.]+), mean ([\d.]+), std ([\d.]+), max ([\d.]+)")
    return MaskRate(mean, std, low, high)


def system_of(case: Case) -> Vec2Face:
    """The system with the case's own sizes and options, to be used under `jax.enable_x64`."""
    config, weights = case.record["config"], case.weights
    built, image = config["MaskedGenerativeEncoderViT"], config["ddconfig"]
    side, channels = case.inputs["image"].shape[-1], case.inputs["image"].shape[1]
    layers: dict[int, int] = {}
    for name in weights:
        if found := re.match(r"fr_model\.layer(\d+)\.(\d+)\.", name):
            layers[int(found[1])] = max(layers.get(int(found[1]), 0), int(found[2]) + 1)
    rates = tuple(built[f"mask_ratio_{name}"] for name in ("mu", "std", "min", "max"))
    if built["norm_eps"] != EPSILON:
        raise UserError(f"{case.folder}: norm_eps={built['norm_eps']} cannot be replayed; the generator's norms have {EPSILON}")
    if built["decoder_embed_dim"] != built["embed_dim"]:
        raise UserError(f"{case.folder}: decoder_embed_dim={built['decoder_embed_dim']} is not embed_dim={built['embed_dim']}")
    grid = side // 2 ** (len(image["ch_mult"]) - 1)
    return Vec2Face(
        image_size=side,
        channels=channels,
        layers=tuple(layers[stage] for stage in sorted(layers)),
        widths=tuple(config["fr_widths"]),
        features_width=built["rep_dim"],
        face_weights="random",
        grid=(grid, grid),
        width=built["embed_dim"],
        depth=built["depth"],
        heads=built["num_heads"],
        decoder_depth=built["decoder_depth"],
        decoder_heads=built["decoder_num_heads"],
        mlp_ratio=built["mlp_ratio"],
        dropout=0.0,
        mask_rate=rates,
        generation_rate=generation_law(case),
        map_channels=image["z_channels"],
        paint_width=image["ch"],
        multipliers=tuple(image["ch_mult"]),
        paint_blocks=image["num_res_blocks"],
        critic_widths=tuple(config["Discriminator"]["dims"]),
        perceptual="vgg",
        perceptual_weights="random",
        vgg_widths=tuple(config["lpips_widths"]),
        discriminator_loss=config["VQLPIPSWithDiscriminator"].get("disc_loss", "mse"),
        dtype="float64",
    )


def variables_of(case: Case, system: Vec2Face) -> tuple[Params, Params]:
    """The recorded weights as the system's parameters and state."""
    template = jax.eval_shape(system.init, jax.random.key(0), {})
    what, weights = str(case.folder), case.weights
    rules = generator_rules(len(system.multipliers)) + discriminator_rules()
    params = fitted(weights, template.params, rules, what)
    face = fitted_face(weights, template.state["face"], what, "fr_model.")
    return params, {"face": face, "perceptual": fitted(weights, template.state["perceptual"], perceptual_rules("lpips."), what)}


def channel_first(x: Any) -> np.ndarray:
    """[B, H, W, C] -> [B, C, H, W]."""
    return np.asarray(x).transpose(0, 3, 1, 2)


class Replay:
    """One case with its system, weights and inputs."""

    def __init__(self, case: Case):
        """Reads everything once."""
        self.case, self.system = case, system_of(case)
        self.params, self.state = variables_of(case, self.system)
        self.image = jnp.asarray(case.inputs["image"].transpose(0, 2, 3, 1), float)
        self.vectors = jnp.asarray(case.inputs["feature"], float)

    def mask(self, noise: str, low: float, rate: float) -> RowMask:
        """The mask of recorded noise."""
        rows = self.system.row_count
        filled = int(np.ceil(rows * rate))
        return mask_rows(jnp.asarray(self.case.inputs[noise]), int(np.ceil(rows * low)), filled)

    @property
    def training_mask(self) -> RowMask:
        """Of the recorded training step."""
        return self.mask("noise", self.system.training_law.low, self.case.record["config"]["mask_rate"])

    def recorded(self, found: dict[str, Any]) -> dict[str, Reproduced]:
        """What the case stores of the tensors that were found."""
        outputs = self.case.outputs
        return {name: Reproduced(leading(value, outputs[name]), FEATURE) for name, value in found.items() if name in outputs}

    def forward(self) -> dict[str, Reproduced]:
        """Rows, masks, tokens, maps, the image, and what the frozen networks and the discriminator say of it."""
        system, mask = self.system, self.training_mask

        @jax.jit
        def forward(params: Params, state: Params) -> tuple[Any, ...]:
            painted = system.paint(params, self.vectors, mask)
            image = painted.image
            seen = system.recognise(state, image)[0], system.distance(state, image, self.image)
            return painted, system.criticise(params, image, self.image), seen, system.terms(state, painted, self.vectors, self.image)

        painted, logits, (identity, distance), terms = forward(self.params, self.state)
        named = painted.named
        found: dict[str, Any] = {"rows": painted.rows, "logits": painted.logits, "encode_feature": painted.rows[:, 0]}
        found |= {name: named[name] for name in ("embedded_tokens", "after_block0", "latent", "after_decoder_block0")}
        maps = {"conv_in": "conv_in", "mid": "mid", "up_first_level": "first_level"}
        found |= {"im_decoder_proj": named["projected"]} | {name: channel_first(named[ours]) for name, ours in maps.items()}
        found |= {"generated": channel_first(painted.image), "lpips": distance[:, None, None, None]}
        found |= {"gen_feature": identity}
        found |= {"logits_fake": channel_first(logits.fake), "logits_real": channel_first(logits.real)}
        reproduced = self.recorded(found)
        reproduced |= {"token_all_mask": exact(mask.filled), "token_drop_mask": exact(mask.dropped)}
        for kind in ("hinge", "vanilla", "mse"):
            reproduced[f"loss/{kind}_d"] = Reproduced(discriminator_loss(logits.real, logits.fake, kind))
        return reproduced | self.losses(terms, logits)

    def losses(self, terms: dict[str, jax.Array], logits: Critique) -> dict[str, Reproduced]:
        """The terms, and both totals before and after the discriminator's start."""
        system = self.system
        official = {"rec": "pixel", "ssim": "structural", "identity": "identity", "token": "token"}
        found = {f"loss/{name}": Reproduced(terms[ours]) for name, ours in official.items()}
        found["loss/perceptual"] = Reproduced(2 * terms["perceptual"])
        total = system.weighted(terms)
        found |= {"before_disc_start/ae_loss": Reproduced(total), "before_disc_start/d_loss": Reproduced(0.0 * total)}
        found["after_disc_start/ae_loss"] = Reproduced(total - logits.painted.mean())
        critic = discriminator_loss(logits.real, logits.fake, system.discriminator_loss)
        return found | {"after_disc_start/d_loss": Reproduced(critic)}

    def gradient(self, name: str, value: Any) -> Reproduced:
        """One of them. Biases that a norm right after them takes out have a gradient of 0, recorded and found as rounding noise."""
        if name in self.case.outputs and np.abs(self.case.outputs[name]).max() < ZERO:
            return Reproduced(value, GRADIENT, absolute=ROUNDING, note="its true gradient is 0")
        return Reproduced(value, GRADIENT)

    def gradients(self) -> dict[str, Reproduced]:
        """`<phase>/grad/<name>`, `<phase>/gradnorm/<name>` of the generator and `disc_grad_*` of the discriminator."""
        system, mask = self.system, self.training_mask
        rules = Layout(generator_rules(len(system.multipliers)) + discriminator_rules())

        @jax.jit
        def gradient(params: Params, active: Any, stopped: Any) -> Params:
            def loss(params: Params) -> jax.Array:
                whole, parts = system.loss_of(params, self.state, self.image, self.vectors, mask, None, active)
                painted = system.paint(params, self.vectors, mask).image
                # What the released step adds to the discriminator's gradient: the generator's loss, its parameters not held.
                leaked: Any = system.discriminator.apply({"params": params["discriminator"]}, jax.lax.stop_gradient(painted))
                return whole - (1 - stopped) * leaked.mean()

            return jax.grad(loss)(params)

        found = {}
        for phase, active in (("before_disc_start", 0.0), ("after_disc_start", 1.0)):
            named = foreign_names(gradient(self.params, active, 1.0), rules)
            for name, grad in named.items():
                for kind, value in (("grad", grad), ("gradnorm", _norm(grad))):
                    found[f"{phase}/{kind}/{name}"] = self.gradient(f"{phase}/{kind}/{name}", value)
        for kind, stopped in (("clean", 1.0), ("official", 0.0)):
            named = foreign_names(gradient(self.params, 1.0, stopped), rules)
            own = {name.removeprefix("disc."): grad for name, grad in named.items() if name.startswith("disc.")}
            found |= {f"after_disc_start/disc_grad_{kind}/{name}": Reproduced(grad, GRADIENT) for name, grad in own.items()}
            norm_of_all = np.sqrt(sum(_norm(grad) ** 2 for grad in own.values()))
            found[f"after_disc_start/disc_gradnorm_{kind}"] = Reproduced(norm_of_all, GRADIENT)
        return found

    def generation(self) -> dict[str, Reproduced]:
        """The same network with the settings of generation."""
        options = self.case.record["config"]["generation"]
        mask = self.mask("gen/noise", options["mask_ratio_min"], options["rate"])
        painted = jax.jit(self.system.paint)(self.params, self.vectors, mask)
        found = {"gen/generated": channel_first(painted.image), "gen/logits": painted.logits}
        reproduced = self.recorded(found)
        return reproduced | {"gen/token_all_mask": exact(mask.filled)}


def _norm(grad: np.ndarray) -> float:
    return float(np.linalg.norm(grad.astype(np.float64).ravel()))


def replay_rates(case: Case, system: Vec2Face) -> dict[str, Reproduced]:
    """Quantiles and means of the mask rate in training and where images are generated."""
    found: dict[str, Reproduced] = {}
    laws: dict[str, MaskRate] = {"": system.training_law, "generation_": system.generation_law}
    for prefix, law in laws.items():
        found[f"mask_rate/{prefix}mean"] = Reproduced(law.average())
        if f"mask_rate/{prefix}ppf" in case.outputs:
            places = jnp.linspace(0.01, 0.99, len(case.outputs[f"mask_rate/{prefix}ppf"]))
            found[f"mask_rate/{prefix}ppf"] = Reproduced(law.quantile(places))
    return found


def replay_nearby(case: Case) -> dict[str, Reproduced]:
    """Vectors near others: shares of the rows with each deviation, then in the recorded order."""
    text = case.meaning("nearby/samples")
    deviations, shares = ([float(x) for x in re.split(r"\s*,\s*", part)] for part in re.findall(r"\[([\d., ]+)\]", text)[:2])
    base, draws = (jnp.asarray(case.inputs[f"nearby/{name}"], float) for name in ("base", "z"))
    counts = [round(share * len(base)) for share in shares]
    scaled = draws * jnp.asarray(np.repeat(deviations, counts))[:, None]
    return {"nearby/samples": Reproduced(vary(base, scaled[case.inputs["nearby/perm"]]))}


def replay_schedule(case: Case) -> dict[str, Reproduced]:
    """The learning rate at fractional epochs."""
    stated = numbers_of(
        case.meaning("schedule/lr"),
        r"epochs 0, ([\d.]+),.*lr = ([\d.e-]+)\*([\d.]+)/([\d.]+), warmup ([\d.]+), epochs ([\d.]+), min_lr ([\d.e-]+)",
    )
    spacing, base_rate, batch, divisor, warmup, epochs, minimum = stated
    schedule = warmup_cosine(base_rate * batch / divisor, minimum, warmup, epochs)
    return {"schedule/lr": Reproduced(jax.vmap(schedule)(spacing * jnp.arange(len(case.outputs["schedule/lr"]))))}


def replay(case: Case) -> dict[str, Reproduced]:
    """Every recorded output of a Vec2Face case that is there to compare."""
    # As it was recorded. In float32 a rectifier's input that lies within rounding of 0 takes the other side, which moves gradients by up to
    # 1.6e-2 of their largest value.
    with jax.enable_x64(True):
        run = Replay(case)
        found = run.forward() | replay_rates(case, run.system)
        if case.wants("gen/"):
            found |= run.generation()
        if case.wants(*(f"{phase}_disc_start/{kind}" for phase in ("before", "after") for kind in ("grad", "disc_grad"))):
            found |= run.gradients()
        if case.wants("nearby/"):
            found |= replay_nearby(case)
        return found | (replay_schedule(case) if case.wants("schedule/") else {})
