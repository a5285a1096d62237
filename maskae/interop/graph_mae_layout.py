"""How GraphMAE's released code names the parameters and batch statistics of `maskae.systems.graph_mae` and of its molecule encoder."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskae.errors import UserError
from maskae.interop.case import GRADIENT, Reproduced
from maskae.interop.layout import LINEAR, VALUE, Geometry, Layout, Rule, Shape, from_foreign, to_foreign
from maskae.paths import flatten_paths, unflatten_paths
from maskae.systems.contract import Variables
from maskae.systems.graph_mae import GraphMae

NO_PATCHES = Geometry(1, (1, 1))
ZERO = 1e-9  # recorded gradients below this are rounding
# Attention vectors have a leading axis of length 1 there.
ROW = Shape(lambda x, _: (x[None],), lambda parts, shape: parts[0].reshape(shape))


def linear(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Rules of a linear map, with or without a bias."""
    return Rule(f"{ours}/kernel", (f"{theirs}.weight",), LINEAR), Rule(f"{ours}/bias", (f"{theirs}.bias",), VALUE)


def norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Rules of a norm's parameters and running statistics."""
    pairs = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}
    return tuple(Rule(f"{ours}/{own}", (f"{theirs}.{other}",), VALUE) for own, other in pairs.items())


def _slope(ours: str, theirs: str) -> Rule:
    return Rule(f"{ours}/slope", (f"{theirs}.weight",), VALUE)


def gat_layer(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Rules of one graph attention layer."""
    return (
        Rule(f"{ours}/kernel", (f"{theirs}.fc.weight",), LINEAR),
        Rule(f"{ours}/source", (f"{theirs}.attn_l",), ROW),
        Rule(f"{ours}/target", (f"{theirs}.attn_r",), ROW),
        Rule(f"{ours}/bias", (f"{theirs}.bias",), VALUE),
        Rule(f"{ours}/residual", (f"{theirs}.res_fc.weight",), LINEAR),
        *norm(f"{ours}/norm", f"{theirs}.norm"),
        _slope(f"{ours}/activation", f"{theirs}.activation"),
    )


def gin_layer(ours: str, theirs: str, outer: bool) -> tuple[Rule, ...]:
    """Rules of one GIN layer; with `outer` norm and activation its MLP is wrapped once more there."""
    mlp = f"{theirs}.apply_func.mlp" if outer else f"{theirs}.apply_func"
    return (
        *linear(f"{ours}/fc1", f"{mlp}.linears.0"),
        *norm(f"{ours}/norm1", f"{mlp}.norms.0"),
        _slope(f"{ours}/activation1", f"{mlp}.activations.0"),
        *linear(f"{ours}/fc2", f"{mlp}.linears.1"),
        *norm(f"{ours}/norm2", f"{theirs}.apply_func.norm"),
        _slope(f"{ours}/activation2", f"{theirs}.apply_func.act"),
        Rule(f"{ours}/residual/kernel", (f"{theirs}.res_fc.weight",), LINEAR),
    )


def layout_of(system: GraphMae) -> Layout:
    """The names of the released code for a system's options."""
    rules = [Rule("mask_token", ("enc_mask_token",), VALUE), *linear("encoder_to_decoder", "encoder_to_decoder")]
    for number in range(system.depth):
        ours = f"encoder/layer_{number}"
        if system.encoder == "gat":
            rules += gat_layer(ours, f"encoder.gat_layers.{number}")
        else:
            bare = number == system.depth - 1 and system.norm == "none"
            rules += gin_layer(ours, f"encoder.layers.{number}", outer=not bare)
    decoders = {
        "gat": gat_layer("decoder", "decoder.gat_layers.0"),
        "gin": gin_layer("decoder", "decoder.layers.0", outer=False),
        "mlp": (*linear("decoder/fc1", "decoder.0"), _slope("decoder/activation", "decoder.1"), *linear("decoder/fc2", "decoder.3")),
        "linear": linear("decoder", "decoder"),
    }
    return Layout((*rules, *decoders[system.decoder]))


def _molecule_layer(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{ours}/bond_type", (f"{theirs}.edge_embedding1.weight",), VALUE),
        Rule(f"{ours}/bond_direction", (f"{theirs}.edge_embedding2.weight",), VALUE),
        *linear(f"{ours}/fc1", f"{theirs}.mlp.0"),
        *linear(f"{ours}/fc2", f"{theirs}.mlp.2"),
    )


MOLECULES = Layout(
    (
        Rule("encoder/atom_type", ("model/gnn.x_embedding1.weight",), VALUE),
        Rule("encoder/chirality", ("model/gnn.x_embedding2.weight",), VALUE),
        *_molecule_layer("encoder/layer_{i}", "model/gnn.gnns.{i}"),
        *norm("encoder/norm_{i}", "model/gnn.batch_norms.{i}"),
        *linear("decoder/bridge", "decoder/enc_to_dec"),
        _slope("decoder/activation", "decoder/activation"),
        *_molecule_layer("decoder/layer", "decoder/conv"),
    )
)


def load_variables(tensors: dict[str, np.ndarray], template: Variables, layout: Layout) -> Variables:
    """The tensors as parameters and batch statistics. Raises UserError where one is missing or has another shape."""
    statistics = template.state.get("batch_stats", {})
    flat = flatten_paths(template.params) | flatten_paths(statistics)
    filled, report = from_foreign(tensors, flat, layout, NO_PATCHES)
    if wrong := report.missing + report.mismatched:
        raise UserError(f"the weights are not those of the options: {'; '.join(wrong[:3])}")
    arrays = {path: jnp.asarray(value, float) for path, value in filled.items()}  # double precision where that is on
    params = unflatten_paths({path: arrays[path] for path in flatten_paths(template.params)})
    stats = unflatten_paths({path: arrays[path] for path in flatten_paths(statistics)})
    return Variables(params, {"batch_stats": stats} if stats else {})


def official_names(params: Any, layout: Layout, state: Any = None) -> dict[str, np.ndarray]:
    """Parameters (or gradients), and batch statistics where given, under the names and in the shapes of the released code."""
    flat = flatten_paths(jax.device_get(params)) | flatten_paths(jax.device_get((state or {}).get("batch_stats", {})))
    return {name: np.asarray(value) for name, value in to_foreign(flat, layout, NO_PATCHES)[0].items()}


def gradient_outputs(part: str, gradients: dict[str, np.ndarray], recorded: dict[str, np.ndarray]) -> dict[str, Reproduced]:
    """Gradients by official name as outputs; those recorded as rounding noise may differ by 1e-6 of the part's largest."""
    norms = {name: np.linalg.norm(value.astype(np.float64).ravel()) for name, value in gradients.items()}
    largest = max(norms.values())

    def slack(output: str) -> float:
        return float(1e-6 * largest) if np.abs(recorded.get(output, np.inf)).max() < ZERO else 0.0

    found = {}
    for name, value in gradients.items():
        found[f"grad/{part}/{name}"] = Reproduced(value, GRADIENT, slack(f"grad/{part}/{name}"))
        found[f"gradnorm/{part}/{name}"] = Reproduced(norms[name], GRADIENT, slack(f"gradnorm/{part}/{name}"))
    return found
