"""CROMA's reference cases, and its weights under the names of the released code."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskae.errors import UserError
from maskae.interop.case import GRADIENT, Case, Reproduced, exact
from maskae.interop.layout import LINEAR, OUT_PROJECTION, VALUE, VECTOR, Geometry, Layout, Rule, Shape, from_foreign, to_foreign
from maskae.nn.alibi import alibi_slopes, distance_bias, patch_coordinates
from maskae.nn.layers import Attention, CrossAttention, LayerNorm, Mlp
from maskae.nn.positions import sincos_2d
from maskae.nn.vit import MaeDecoder
from maskae.paths import flatten_paths, unflatten_paths
from maskae.systems.croma import Croma
from maskae.systems.croma_arguments import EPSILON, SENSORS

HALVES = 2


def channel_first(values: Any, patch_size: int, channels: tuple[int, ...]) -> Any:
    """A patch's numbers on the last axis, ours sensor by sensor as (row, column, channel) -> (channel, row, column) of all sensors."""
    parts, start = [], 0
    for count in channels:
        part = values[..., start : start + patch_size**2 * count]
        part = part.reshape(*values.shape[:-1], patch_size**2, count).swapaxes(-1, -2)
        parts.append(part.reshape(*values.shape[:-1], -1))
        start += patch_size**2 * count
    return jnp.concatenate(parts, -1)


def channel_last(values: np.ndarray, patch_size: int, channels: tuple[int, ...]) -> np.ndarray:
    """The inverse of `channel_first`."""
    parts, start = [], 0
    for count in channels:
        part = values[..., start : start + patch_size**2 * count].reshape(*values.shape[:-1], count, patch_size**2)
        parts.append(np.swapaxes(part, -1, -2).reshape(*values.shape[:-1], -1))
        start += patch_size**2 * count
    return np.concatenate(parts, -1)


def _patch_shape(patch_size: int, channels: tuple[int, ...], kernel: bool, of_inputs: bool = False) -> Shape:
    """A linear map from a patch's numbers (`of_inputs`), to them, or the bias of the latter."""
    if not kernel:
        return Shape(lambda x, _: (channel_first(x, patch_size, channels),), lambda parts, _: channel_last(parts[0], patch_size, channels))
    if of_inputs:
        return Shape(
            lambda x, _: (channel_first(x.transpose(1, 0), patch_size, channels),),
            lambda parts, _: channel_last(parts[0], patch_size, channels).transpose(1, 0),
        )
    return Shape(
        lambda x, _: (channel_first(x, patch_size, channels).transpose(1, 0),),
        lambda parts, _: channel_last(parts[0].transpose(1, 0), patch_size, channels),
    )


def _map(ours: str, theirs: str, kernel: Shape = LINEAR, bias: Shape = VECTOR) -> tuple[Rule, ...]:
    return (Rule(f"{ours}/kernel", (f"{theirs}.weight",), kernel), Rule(f"{ours}/bias", (f"{theirs}.bias",), bias))


def _norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (Rule(f"{ours}/scale", (f"{theirs}.weight",), VECTOR), Rule(f"{ours}/bias", (f"{theirs}.bias",), VECTOR))


def _attention(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        *_norm(f"{ours}/norm1", f"{theirs}.input_norm"),
        *_map(f"{ours}/attention/qkv", f"{theirs}.create_qkv"),
        *_map(f"{ours}/attention/out", f"{theirs}.out", OUT_PROJECTION),
    )


def _mlp(ours: str, norm: str, theirs: str) -> tuple[Rule, ...]:
    return (
        *_norm(f"{ours}/{norm}", f"{theirs}.input_norm"),
        *_map(f"{ours}/mlp/fc1", f"{theirs}.net.0"),
        *_map(f"{ours}/mlp/fc2", f"{theirs}.net.2"),
    )


def layout_of(system: Croma) -> Layout:
    """The released pretraining code's names for this system's parameters."""
    size, both = system.patch_size, (system.optical_channels, system.radar_channels)
    rules: list[Rule] = [Rule("logit_scale", ("global_contrast_loss.logit_scale",), VALUE)]
    for sensor in SENSORS:
        encoder, head = f"{sensor}_encoder.transformer", f"GAP_FFN_{sensor}"
        patch = _patch_shape(size, (system.channels(sensor),), kernel=True, of_inputs=True)
        rules += _map(f"{sensor}/patch_embed", f"{sensor}_encoder.linear_input", patch)
        rules += _attention(f"{sensor}/block_{{i}}", f"{encoder}.layers.{{i}}.0")
        rules += _mlp(f"{sensor}/block_{{i}}", "norm2", f"{encoder}.layers.{{i}}.1")
        rules += _norm(f"{sensor}/norm", f"{encoder}.norm_out")
        rules += _norm(f"{sensor}_head/norm", f"{head}.0")
        rules += _map(f"{sensor}_head/mlp/fc1", f"{head}.1") + _map(f"{sensor}_head/mlp/fc2", f"{head}.3")
        rules += _map(f"{sensor}_projection", f"global_contrast_loss.{sensor}_proj")
    ours, theirs = "joint/block_{i}", "cross_encoder.layers.{i}"
    rules += _attention(ours, f"{theirs}.0") + _norm(f"{ours}/norm2", f"{theirs}.1.input_norm")
    for part, letter in (("query", "q"), ("key", "k"), ("value", "v")):
        rules += _map(f"{ours}/cross_attention/{part}", f"{theirs}.1.create_{letter}")
    rules += _map(f"{ours}/cross_attention/out", f"{theirs}.1.to_out", OUT_PROJECTION)
    rules += _mlp(ours, "norm3", f"{theirs}.2") + _norm("joint/norm", "cross_encoder.norm_out")
    ours, theirs = "decoder/block_{i}", "decoder.decoder.layers.{i}"
    rules += _map("decoder/embed", "decoder.encoder_to_decoder") + (Rule("decoder/mask_token", ("decoder.mask_token",), VALUE),)
    rules += _attention(ours, f"{theirs}.0") + _mlp(ours, "norm2", f"{theirs}.1") + _norm("decoder/norm", "decoder.decoder.norm_out")
    bias = _patch_shape(size, both, kernel=False)
    rules += _map("decoder/head", "decoder.linear_output", _patch_shape(size, both, kernel=True), bias)
    return Layout(tuple(rules))


def system_of(case: Case) -> Croma:
    """The system with the case's own sizes and options; what the released code does where the case does not say."""
    built, options = case.record["config"], case.record["options"]
    values = {sensor: case.weights[f"{sensor}_encoder.linear_input.weight"].shape[1] // built["patch_size"] ** 2 for sensor in SENSORS}
    chosen = {"joint_self_bias": "cross", "key_stop_gradient": True, "target_norm": "joint"}
    return Croma(
        image_size=case.inputs["imgs_uint8"].shape[-1],
        optical_channels=values["optical"],
        radar_channels=values["radar"],
        patch_size=built["patch_size"],
        width=built["encoder_dim"],
        depth=built["encoder_layers"],
        heads=built["attention_heads"],
        decoder_width=built["decoder_dim"],
        decoder_depth=built["decoder_layers"],
        mask_ratio=built["mask_ratio"],
        **(chosen | {name: value for name, value in options.items() if name in chosen}),
    )


def params_of(case: Case, system: Croma) -> dict[str, Any]:
    """The recorded weights as the system's parameters. Raises UserError where one is missing, left over, or has another shape."""
    template = flatten_paths(jax.eval_shape(system.init, jax.random.key(0), {}).params)
    grid = (system.image_size // system.patch_size,) * 2
    weights = dict(case.weights)
    table = weights.pop("decoder.decoder_pos_embed", None)
    if table is not None and np.abs(table[0] - sincos_2d(system.decoder_width, grid, False)).max() > 1e-5:
        raise UserError(f"{case.folder}: decoder.decoder_pos_embed is not the fixed sine-cosine table of a {grid} grid")
    flat, report = from_foreign(weights, template, layout_of(system), Geometry(system.patch_size, grid))
    if wrong := report.mismatched + report.missing + report.unexpected:
        raise UserError(f"{case.folder}: the weights are not those of the recorded options: {'; '.join(wrong[:3])}")
    return jax.tree.map(jnp.asarray, unflatten_paths(flat))


def official_names(tree: Any, system: Croma) -> dict[str, np.ndarray]:
    """Parameters or their gradients under the released code's names and in its shapes."""
    flat = {path: np.asarray(leaf) for path, leaf in flatten_paths(tree).items()}
    return {name: np.asarray(value) for name, value in to_foreign(flat, layout_of(system), Geometry(system.patch_size, (1, 1)))[0].items()}


def inputs_of(case: Case, system: Croma) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The recorded images, float32 [B, H, W, c] of each sensor, and its masking noise [B, L]."""
    stacked = jnp.asarray(case.inputs["imgs_uint8"].transpose(0, 2, 3, 1), jnp.float32) / 255
    images = {"optical": stacked[..., : system.optical_channels], "radar": stacked[..., system.optical_channels :]}
    return images, {sensor: jnp.asarray(case.inputs[f"noise_{sensor}"]) for sensor in SENSORS}


def _inside(system: Croma, params: Any, named: Mapping[str, Any], images: dict[str, jax.Array]) -> dict[str, Any]:
    """What the first blocks add to the residual stream, the decoder's tokens, and the embeddings of all patches."""

    def apply(module: Any, of: Any, *inputs: Any, **options: Any) -> Any:
        return module.apply({"params": of}, *inputs, **options)

    norm, hidden = LayerNorm(EPSILON), int(system.width * system.mlp_ratio)
    embed = {sensor: apply(system.encoder(sensor), params[sensor], images[sensor], method="embed") for sensor in SENSORS}
    optical, radar = (named["encoded"][sensor] for sensor in SENSORS)
    block, x = params["optical"]["block_0"], jnp.take_along_axis(embed["optical"], named["masks"]["optical"].keep_indices[..., None], 1)
    attention = Attention(system.heads, "none")
    own = system.distances(optical.positions, optical.positions)
    mixed = apply(attention, block["attention"], apply(norm, block["norm1"], x), context=own)
    fed = apply(Mlp(hidden), block["mlp"], apply(norm, block["norm2"], x + mixed))
    block, cross = params["joint"]["block_0"], system.distances(radar.positions, optical.positions)
    own = cross if system.joint_self_bias == "cross" else system.distances(radar.positions, radar.positions)
    seen = apply(attention, block["attention"], apply(norm, block["norm1"], radar.tokens), context=own)
    both = [apply(norm, block["norm2"], each) for each in (radar.tokens + seen, optical.tokens)]
    looked = apply(CrossAttention(system.heads, False), block["cross_attention"], *both, context=cross)
    side = images["optical"].shape[1] // system.patch_size
    decoder: MaeDecoder = system.decoder
    restored = apply(decoder, params["decoder"], named["joint"], named["masks"]["radar"].restore, (side, side), method="restore")
    decoded = apply(decoder, params["decoder"], restored, True, method="decode").blocks[-1]
    found = {"optical_block0_attn": mixed, "optical_block0_ffn": fed, "joint_self0": seen, "joint_cross0": looked}
    found["cross_bias"] = distance_bias(radar.positions, optical.positions, jnp.asarray(alibi_slopes(system.heads)))
    found |= {"dec_tokens": apply(norm, params["decoder"]["norm"], decoded)}
    return found | {f"{sensor}_embed": embed[sensor] for sensor in SENSORS}


def replay_forward(case: Case, system: Croma, params: Any) -> dict[str, Reproduced]:
    """Losses, masks, encodings, embeddings, predictions and targets, and the features without masks."""
    images, noise = inputs_of(case, system)
    both = (system.optical_channels, system.radar_channels)

    @jax.jit
    def forward(params: Any) -> tuple[Any, ...]:
        named = system.forward(params, images, noise)
        total, metrics = system.loss_given_noise(params, images, noise)
        batch = {f"sensor_{sensor}": each for sensor, each in images.items()}
        return named, metrics | {"total": total}, _inside(system, params, named, images), system.features(params, {}, batch)

    named, losses, inside, features = forward(params)
    official = {"contrastive_loss": "contrastive_loss", "mae_loss": "reconstruction_loss", "total_loss": "total"}
    official |= {f"mae_loss_{sensor}": f"{sensor}_loss" for sensor in SENSORS}
    found = {name: Reproduced(losses[ours]) for name, ours in official.items()}
    found |= {name: Reproduced(value[: len(case.outputs[name])]) for name, value in inside.items() if name in case.outputs}
    for sensor in SENSORS:
        mask, encoded = named["masks"][sensor], named["encoded"][sensor]
        found |= {f"ids_keep_{sensor}": exact(mask.keep_indices), f"ids_restore_{sensor}": exact(mask.restore)}
        found |= {f"mask_{sensor}": exact(mask.mask), f"{sensor}_encodings": Reproduced(encoded.tokens)}
        found |= {f"{sensor}_GAP": Reproduced(encoded.pooled)}
        found |= {f"{sensor}_proj_normed": Reproduced(named["embedded"][sensor])}
    logits = losses["logit_scale"] * named["embedded"]["optical"] @ named["embedded"]["radar"].T
    found |= {"joint_encodings": Reproduced(named["joint"]), "logits_per_optical": Reproduced(logits)}
    found |= {f"inference_{kind}_GAP": Reproduced(features[kind]) for kind in (*SENSORS, "joint")}
    for name, whole in (("pred_patches", named["prediction"]), ("target_patches", system.target(images))):
        stated = re.search(r"patches \[([\d, ]+)\]", case.meaning("pred_patches"))
        rows = np.asarray([int(row) for row in stated[1].split(",")]) if stated else slice(None)
        found[name] = Reproduced(channel_first(whole[0][rows], system.patch_size, both))
    return found | replay_halves(case, logits)


def replay_halves(case: Case, logits: jax.Array) -> dict[str, Reproduced]:
    """The contrastive loss where two processes hold half of the queries each and all keys."""
    of_query = [-jnp.diagonal(jax.nn.log_softmax(each)) for each in (logits, logits.T)]
    losses = jnp.stack([((of_query[0] + of_query[1]) / 2)[part].mean() for part in np.array_split(np.arange(len(logits)), HALVES)])
    recorded = case.outputs.get("contrastive_loss_world2")
    return {} if recorded is None else {"contrastive_loss_world2": Reproduced(losses if recorded.shape else losses.mean())}


def replay_gradients(case: Case, system: Croma, params: Any) -> dict[str, Reproduced]:
    """`grad/<name>`, `gradnorm/<name>` of the whole loss and `grad_contrastive/<name>` of the contrastive one."""
    images, noise = inputs_of(case, system)

    @jax.jit
    def gradients(params: Any) -> tuple[Any, Any]:
        contrastive = jax.grad(lambda p: system.loss_given_noise(p, images, noise)[1]["contrastive_loss"])(params)
        return jax.grad(lambda p: system.loss_given_noise(p, images, noise)[0])(params), contrastive

    whole, contrastive = (official_names(grads, system) for grads in gradients(params))
    found = {f"grad/{name}": Reproduced(grad, GRADIENT) for name, grad in whole.items()}
    found |= {f"grad_contrastive/{name}": Reproduced(grad, GRADIENT) for name, grad in contrastive.items()}
    norms = {name: np.linalg.norm(grad.astype(np.float64).ravel()) for name, grad in whole.items()}
    return found | {f"gradnorm/{name}": Reproduced(norm, GRADIENT) for name, norm in norms.items()}


def replay_tables(case: Case, system: Croma) -> dict[str, Reproduced]:
    """Bias tables, whose sizes stand in their names and descriptions."""
    found = {}

    def table(side: int, heads: int) -> jax.Array:
        places = jnp.asarray(patch_coordinates((side, side)))[None]
        return distance_bias(places, places, jnp.asarray(alibi_slopes(heads)))[0]  # [heads, L, L]

    for name in case.outputs:
        if sizes := re.fullmatch(r"alibi_(\d+)x\d+_heads(\d+)", name):
            found[name] = Reproduced(table(int(sizes[1]), int(sizes[2])))
        elif name == "alibi_rows":
            whole = table(math.isqrt(case.outputs[name].shape[-1]), system.heads)
            stated = re.search(r"queries ([\d, ]+) against", case.meaning(name))
            found[name] = Reproduced(whole[:, np.asarray([int(row) for row in stated[1].split(",")])] if stated else whole)
    return found


def replay(case: Case) -> dict[str, Reproduced]:
    """Every recorded output of a CROMA case."""
    system = system_of(case)
    params = params_of(case, system)
    found = replay_tables(case, system) | replay_forward(case, system, params)
    return found | (replay_gradients(case, system, params) if case.wants("grad") else {})

