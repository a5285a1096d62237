"""HiCMAE's reference cases, and its weights under the names of the released code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskae.data.spectrogram import fit_length, log_mel, normalise_spectrogram
from maskae.errors import UserError
from maskae.evaluate.emotion import concordance, correlation, recalls
from maskae.interop.case import GRADIENT, Case, Reproduced, leading
from maskae.interop.layout import LINEAR, OUT_PROJECTION, VALUE, VECTOR, Geometry, Layout, Rule, Shape, from_foreign, to_foreign
from maskae.masking import take_tokens
from maskae.nn.positions import sinusoid
from maskae.optim import decay_mask, lr_scale_tree
from maskae.paths import flatten_paths, unflatten_paths
from maskae.schedules import make_schedule
from maskae.systems.hicmae import Hicmae
from maskae.systems.hicmae_arguments import MODALITIES
from maskae.systems.hicmae_classifier import HicmaeClassifier

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FINETUNE = "finetune/"
SUFFIX = {"video": "", "audio": "_audio"}
WEIGHT_DECAY = 0.05
# The released code run in float32 is 1.5e-5 from itself in float64 here.
SPECTROGRAM = 1e-4
# A gradient that is zero but for rounding: stored below this; then it may be this share of its part's largest.
ZERO, ROUNDING = 1e-9, 1e-6
# Query and value have biases, keys none.
TWO_BIASES = Shape(
    lambda x, _: tuple(x[i].reshape(-1) for i in range(2)), lambda parts, shape: np.stack([part.reshape(shape[1:]) for part in parts])
)


def patch_kernel(patch_size: int, frames: int) -> Shape:
    """A convolution (width, channels, [frames,] rows, columns) and the map of a patch ordered (row, column, frame, channel)."""
    inner = (patch_size, patch_size)

    def out(x: Any, _: Geometry) -> tuple[Any, ...]:
        whole = x.reshape(*inner, frames or 1, -1, x.shape[-1]).transpose(4, 3, 2, 0, 1)  # [D, C, t, p, p]
        return (whole if frames else whole.reshape(*whole.shape[:2], *inner),)

    def back(parts: Any, shape: tuple[int, ...]) -> Any:
        whole = parts[0].reshape(*parts[0].shape[:2], frames or 1, *inner)
        return whole.transpose(3, 4, 2, 1, 0).reshape(shape)

    return Shape(out, back)


def _map(ours: str, theirs: str, kernel: Shape = LINEAR) -> tuple[Rule, ...]:
    return (Rule(f"{ours}/kernel", (f"{theirs}.weight",), kernel), Rule(f"{ours}/bias", (f"{theirs}.bias",), VECTOR))


def _norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (Rule(f"{ours}/scale", (f"{theirs}.weight",), VECTOR), Rule(f"{ours}/bias", (f"{theirs}.bias",), VECTOR))


def _block(ours: str, theirs: str) -> list[Rule]:
    """A plain or a cross-then-self block; `split_key_value` first parts the latter's `kv`."""
    rules = [
        Rule(f"{ours}/attention/qkv/kernel", (f"{theirs}.attn.qkv.weight",), LINEAR),
        Rule(f"{ours}/attention/qkv/bias", (f"{theirs}.attn.q_bias", f"{theirs}.attn.v_bias"), TWO_BIASES),
    ]
    for name in ("norm1", "norm2", "cross_norm1", "cross_norm2"):
        rules += _norm(f"{ours}/{name}", f"{theirs}.{name}")
    rules += [Rule(f"{ours}/layer_scale{n}", (f"{theirs}.gamma_{n}",), VALUE) for n in range(3)]
    rules += _map(f"{ours}/attention/out", f"{theirs}.attn.proj", OUT_PROJECTION)
    rules += _map(f"{ours}/cross_attention/out", f"{theirs}.cross_attn.proj", OUT_PROJECTION)
    for part in ("query", "key", "value"):
        rules.append(Rule(f"{ours}/cross_attention/{part}/kernel", (f"{theirs}.cross_attn.{part[0]}.weight",), LINEAR))
        rules.append(Rule(f"{ours}/cross_attention/{part}/bias", (f"{theirs}.cross_attn.{part[0]}_bias",), VECTOR))
    return rules + [*_map(f"{ours}/mlp/fc1", f"{theirs}.mlp.fc1"), *_map(f"{ours}/mlp/fc2", f"{theirs}.mlp.fc2")]


def layout_of(system: Hicmae) -> Layout:
    """The released code's names, of pretraining and of the classifier, for this system's parameters."""
    rules: list[Rule] = []
    for modality, suffix in SUFFIX.items():
        encoder, decoder = f"{modality}_encoder", f"{modality}_decoder"
        kernel = patch_kernel(system.patch(modality), system.tubelet if modality == "video" else 0)
        rules += _map(f"{encoder}/patch_embed", f"encoder{suffix}.patch_embed.proj", kernel)
        rules += _block(f"{encoder}/block_{{i}}", f"encoder{suffix}.blocks.{{i}}") + list(_norm(f"{encoder}/norm", f"encoder{suffix}.norm"))
        rules += _block(f"fusion/{modality}_block_{{i}}", f"encoder_fusion.blocks{suffix}.{{i}}")
        rules += _norm(f"fusion/{modality}_norm", f"encoder_fusion.norm{suffix}")
        rules += [Rule(f"{decoder}/embed/kernel", (f"encoder_to_decoder{suffix}.weight",), LINEAR)]
        rules += _block(f"{decoder}/block_{{i}}", f"decoder{suffix}.blocks.{{i}}") + list(_norm(f"{decoder}/norm", f"decoder{suffix}.norm"))
        rules += _map(f"{decoder}/head", f"decoder{suffix}.head")
        rules += [Rule(f"{modality}_mask_token", (f"mask_token{suffix}",), VALUE)]
        rules += [Rule(f"{modality}_sum/layers", (f"{modality}_layer_weights",), VALUE)]
    rules += [*_norm("fc_norm", "fc_norm"), *_map("head", "head")]
    return Layout(tuple(rules))


def split_key_value(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every `cross_attn.kv.weight` [2D, D] as `cross_attn.k.weight` and `cross_attn.v.weight`."""
    found = {}
    for name, value in weights.items():
        if name.endswith("cross_attn.kv.weight"):
            stem = name.removesuffix("kv.weight")
            found[f"{stem}k.weight"], found[f"{stem}v.weight"] = np.split(value, 2)
        else:
            found[name] = value
    return found


def join_key_value(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `split_key_value`."""
    found = {name: value for name, value in weights.items() if not re.search(r"cross_attn\.[kv]\.weight$", name)}
    for name, value in weights.items():
        if name.endswith("cross_attn.k.weight"):
            stem = name.removesuffix("k.weight")
            found[f"{stem}kv.weight"] = np.concatenate([value, weights[f"{stem}v.weight"]])
    return found


def system_of(case: Case) -> Hicmae:
    """The system with the case's own sizes and options. Raises UserError for an option of the released code that is not here."""
    record = case.record["config"]
    built = record["model"]
    if built.get("drop_path_rate"):
        raise UserError(f"{case.folder}: drop_path_rate={built['drop_path_rate']} cannot be replayed: its draws are not recorded")
    if built.get("encoder_embed_dim_audio", built["encoder_embed_dim"]) != built["encoder_embed_dim"]:
        raise UserError(f"{case.folder}: both encoders are expected to be of one width")
    frames = case.inputs["frames_uint8"]
    return Hicmae(
        image_size=built["img_size"],
        frames=frames.shape[1],
        channels=frames.shape[-1],
        patch_size=built["patch_size"],
        tubelet=built["tubelet_size"],
        spectrogram_size=tuple(built["img_size_audio"]),
        audio_patch_size=built["patch_size_audio"],
        width=built["encoder_embed_dim"],
        depth=built["encoder_depth"],
        heads=built["encoder_num_heads"],
        audio_depth=built["encoder_depth_audio"],
        audio_heads=built["encoder_num_heads_audio"],
        fusion_depth=built["encoder_fusion_depth"],
        fusion_heads=built["encoder_fusion_num_heads"],
        decoder_width=built["decoder_embed_dim"],
        decoder_depth=built["decoder_depth"],
        decoder_heads=built["decoder_num_heads"],
        audio_decoder_width=built["decoder_embed_dim_audio"],
        audio_decoder_depth=built["decoder_depth_audio"],
        audio_decoder_heads=built["decoder_num_heads_audio"],
        mlp_ratio=built["mlp_ratio"],
        qkv_bias=built.get("qkv_bias", True),
        layer_scale=built.get("init_values") or None,
        levels=tuple(level + 1 for level in built["return_intermediate_features"]),
        mask_ratio=record["mask_ratio"],
        audio_mask_ratio=record["mask_ratio_audio"],
        contrastive_weight=record["loss_weight"],
        temperature=built["inter_contrastive_temperature"],
        group_size=len(frames),
        frame_difference=record["use_frame_diff_as_target"],
        difference_group=record.get("frame_diff_group_size", 2),
        difference_weight=record.get("target_diff_weight"),
        epsilon=record.get("norm_eps", 1e-6),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def params_of(case: Case, system: Hicmae) -> dict[str, Any]:
    """The recorded weights, those of the classifier included, as parameters. Raises UserError where one is missing, left over or other."""
    template = flatten_paths(jax.eval_shape(system.init, jax.random.key(0), {}).params)
    weights = {name.removeprefix(FINETUNE): value for name, value in split_key_value(case.weights).items()}
    layout = layout_of(system)
    ours = {"fc_norm.weight": "fc_norm/scale", "fc_norm.bias": "fc_norm/bias", "head.weight": "head/kernel", "head.bias": "head/bias"}
    ours |= {f"{modality}_layer_weights": f"{modality}_sum/layers" for modality in MODALITIES}
    for name, value in weights.items():
        if f"{FINETUNE}{name}" in case.weights and (path := ours.get(name)):
            template[path] = jax.ShapeDtypeStruct(value.shape[::-1], np.float32)
    flat, report = from_foreign(weights, template, layout, Geometry(system.patch_size, system.grid("video")))
    if wrong := report.mismatched + report.missing + report.unexpected:
        raise UserError(f"{case.folder}: the weights are not those of the recorded options: {'; '.join(wrong[:3])}")
    return jax.tree.map(jnp.asarray, unflatten_paths(flat))


def official_names(tree: Any, system: Hicmae) -> dict[str, np.ndarray]:
    """Parameters or their gradients under the released code's names and in its shapes."""
    flat = {path: np.asarray(leaf) for path, leaf in flatten_paths(tree).items()}
    named = to_foreign(flat, layout_of(system), Geometry(system.patch_size, (1, 1)))[0]
    return join_key_value({name: np.asarray(value) for name, value in named.items()})


def inputs_of(case: Case, system: Hicmae) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The recorded inputs and masks, as `Hicmae.forward` takes them."""
    batch = {"video": jnp.asarray(case.inputs["frames_uint8"]), "spectrogram": jnp.asarray(case.inputs["audio"][:, 0])}
    masks = {modality: jnp.asarray(case.inputs[f"mask{suffix}"]) for modality, suffix in SUFFIX.items()}
    return system.inputs(batch), masks


def replay_forward(case: Case, system: Hicmae, params: Any) -> dict[str, Reproduced]:
    """Tokens, encodings, levels, predictions, targets and losses."""
    inputs, masks = inputs_of(case, system)

    @jax.jit
    def forward(params: Any) -> tuple[Any, ...]:
        named = system.forward(params, inputs, masks)
        targets = {each: take_tokens(system.target(each, inputs[each]), named["splits"][each].hidden) for each in masks}
        embedded = {each: system.embed(params, each, inputs[each]) for each in masks}
        loss, metrics = system.loss_given_masks(params, inputs, masks)
        return named, targets, embedded, metrics | {"loss": loss}, system.pooled_levels(named["encoded"])

    named, targets, embedded, metrics, levels = forward(params)
    found: dict[str, Any] = {"loss": metrics["loss"], "loss_hcmcl": metrics["contrastive_loss"]}
    for modality in MODALITIES:
        encoded, decoded = named["encoded"][modality], named["decoded"][modality]
        found |= {f"loss_{modality}": metrics[f"{modality}_loss"], f"{modality}_tokens": embedded[modality]}
        found |= {f"{modality}_latent": encoded.tokens, f"fusion_{modality}": getattr(named["fused"], modality)}
        found |= {f"{modality}_block{i}": block for i, block in enumerate(encoded.blocks)}
        found |= {f"{modality}_level{i}": layer for i, layer in enumerate(encoded.layers)}
        found |= {f"pred_{modality}": decoded.prediction, f"target_{modality}": targets[modality]}
        found |= {f"decoder{SUFFIX[modality]}_block{i}": block for i, block in enumerate(decoded.blocks)}
    for i, blocks in enumerate(named["fused"].blocks):
        found |= {f"fusion_block{i}_{modality}": block for modality, block in zip(MODALITIES, blocks, strict=True)}
    for place, level in enumerate(system.levels):
        found[f"loss_hcmcl_level{level - 1}"] = metrics[f"contrastive_loss_{level}"]
        found[f"logits_level{level - 1}"] = levels["video"][place] @ levels["audio"][place].T / system.temperature
    # Of some, the case keeps the first samples or the first tokens alone.
    return {name: Reproduced(leading(value, case.outputs[name])) for name, value in found.items() if name in case.outputs}


def replay_tables(case: Case, system: Hicmae) -> dict[str, Reproduced]:
    """Position tables, the log-mel front end, metrics and the schedule."""
    found = {}
    for modality, suffix in SUFFIX.items():
        for name, width in ((f"pos_embed{suffix}", system.width), (f"pos_embed_decoder{suffix}", system.decoder_sizes(modality)[0])):
            if name in case.outputs:
                found[name] = Reproduced(sinusoid(width, case.outputs[name].shape[1])[None])
    record, inputs = case.record["config"], case.inputs
    if "logmel/waveform" in inputs:
        waveform = inputs["logmel/waveform"][0].astype(np.float64)
        sound = log_mel((waveform - waveform.mean()) * float(inputs["logmel/gain"]), bins=record["logmel"]["num_mel_bins"])
        sound = fit_length(sound, record["logmel"]["target_length"])
        found["logmel/fbank"] = Reproduced(sound, SPECTROGRAM)
        found["logmel/normalised"] = Reproduced(normalise_spectrogram(sound), SPECTROGRAM)
    if "metric/pred" in inputs:
        found["metric/uar_war"] = Reproduced(np.asarray(recalls(inputs["metric/pred"], inputs["metric/label"])))
    if "metric/reg_pred" in inputs:
        both = inputs["metric/reg_pred"], inputs["metric/reg_target"]
        found |= {"metric/ccc": Reproduced(concordance(*both)), "metric/pcc": Reproduced(correlation(*both))}
    if "lr_schedule" in case.outputs:
        made, scale = record["schedule"], record["schedule"]["batch"] / 256
        steps = {name: made[f"{name}epochs"] * made["niter_per_ep"] for name in ("", "warmup_")}
        schedule = make_schedule(
            "cosine_twice", peak=made["lr"] * scale, minimum=made["min_lr"] * scale, total_steps=steps[""], warmup_steps=steps["warmup_"]
        )
        found["lr_schedule"] = Reproduced(jax.vmap(schedule)(jnp.arange(steps[""])))
    return found


def replay_classifier(case: Case, system: Hicmae, params: Any) -> dict[str, Reproduced]:
    """The fine-tuning head's feature and logits, and each of its parameters' rate and decay."""
    arguments = {field.name: getattr(system, field.name) for field in fields(system)}
    classifier = HicmaeClassifier(**arguments, num_classes=case.record["config"]["finetune_classes"])
    feature, logits = jax.jit(lambda p: classifier.classify(p, inputs_of(case, system)[0]))(params)
    used = {name: value for name, value in params.items() if "decoder" not in name and "mask_token" not in name}
    decay = case.record["config"]["layer_decay"]
    scales = lr_scale_tree(used, None, classifier.layer_scales(decay))
    decays = jax.tree.map(lambda decays: WEIGHT_DECAY * decays, decay_mask(used))
    spread = [official_names(jax.tree.map(lambda leaf, value: np.full(leaf.shape, value), used, each), system) for each in (scales, decays)]
    rows = np.asarray([[each[name].ravel()[0] for each in spread] for name in case.record["config_names"]])
    found = {"finetune/feature": Reproduced(feature), "finetune/logits": Reproduced(logits)}
    return found | {"finetune/lr_scale_and_decay": Reproduced(rows)}


def replay_gradients(case: Case, system: Hicmae, params: Any) -> dict[str, Reproduced]:
    """`grad/<name>` and `gradnorm/<name>` of the whole loss."""
    inputs, masks = inputs_of(case, system)
    trained = {name: value for name, value in params.items() if name not in ("fc_norm", "head", "video_sum", "audio_sum")}
    gradients = official_names(jax.jit(jax.grad(lambda p: system.loss_given_masks(p, inputs, masks)[0]))(trained), system)
    norms = {name: float(np.linalg.norm(value.astype(np.float64).ravel())) for name, value in gradients.items()}
    found = {f"grad/{name}": Reproduced(value, GRADIENT) for name, value in gradients.items() if f"grad/{name}" in case.outputs}
    for name, norm in norms.items():
        largest = max(other for each, other in norms.items() if each.split(".")[0] == name.split(".")[0])
        rounding = ROUNDING * largest if abs(float(case.outputs.get(f"gradnorm/{name}", 1.0))) < ZERO else 0.0
        found[f"gradnorm/{name}"] = Reproduced(norm, GRADIENT, rounding)
    return found


def replay(case: Case) -> dict[str, Reproduced]:
    """Every recorded output of a HiCMAE case."""
    system = system_of(case)
    params = params_of(case, system)
    found = replay_tables(case, system) | replay_forward(case, system, params)
    if case.wants(FINETUNE):
        found |= replay_classifier(case, system, params)
    if case.wants("grad"):
        found |= replay_gradients(case, system, params)
    # The video's mask token is free of decay by name, the sound's is not.
    free = decay_mask(params, ("vectors", "video_mask_token"))
    return found | {"pretrain/no_decay_mask_tokens": Reproduced(np.asarray([not free[f"{each}_mask_token"] for each in MODALITIES]))}
