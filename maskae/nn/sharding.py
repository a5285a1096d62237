"""Sharding of activations by meaning of the axis, and of parameters where they are used; no-ops without a mesh."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from maskae.mesh import parameter_spec
from maskae.paths import map_paths

# What an activation's axis means -> the mesh axes that may split it.
MESH_AXES: dict[str, tuple[str, ...]] = {"batch": ("slice", "data", "fsdp"), "tensor": ("tensor",)}


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Fix the sharding of an activation over the ambient mesh (`jax.set_mesh`).

    Without these constraints at token boundaries the compiler replicates the masked gather over the whole batch.

    Args:
        x: array of any dtype.
        axes: one entry per leading dimension of `x`: "batch" (split over slice, data and fsdp), "tensor" (heads, hidden units), or None.
            Dimensions beyond those named, and those that a mesh axis does not divide, are not split.

    Returns:
        `x` itself where no mesh is set, inside `shard_map`, and where no axis of the mesh applies.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    sizes = {name: mesh.shape[name] for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    spec: list[tuple[str, ...] | None] = []
    for length, axis in zip(x.shape, axes, strict=False):
        names = tuple(name for name in MESH_AXES.get(axis or "", ()) if sizes.get(name, 1) > 1)
        divides = length % math.prod(sizes[name] for name in names) == 0
        spec.append(names if names and divides else None)
    if not any(spec):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def gather_parameters(params: Any) -> Any:
    """A block's parameters, whole over the ambient mesh's `fsdp` axis for the products that follow; gradients go back split as stored.

    Left to itself the TPU compiler may multiply by each chip's part of a split kernel in turn and add the results up in a loop, which reads
    and writes the activations once per part: for ViT-L with 256 images on each of 16 chips that was twice the bytes of the whole step.
    Within a rematerialised block the whole parameters are gathered again for the backward pass and never kept.

    Args:
        params: nested dict; the names within a block decide where each array lies, see `maskae.mesh.RULES`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    if not {"fsdp", "tensor"} <= automatic or mesh.shape["fsdp"] == 1:
        return params

    def gather(name: str, leaf: jax.Array) -> jax.Array:
        stored = parameter_spec(name, leaf.shape, mesh)
        if "fsdp" not in stored:
            return leaf
        return _gathered(leaf, stored, PartitionSpec(*(None if axis == "fsdp" else axis for axis in stored)))

    return map_paths(gather, params)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x: jax.Array, stored: PartitionSpec, whole: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, whole)


def _gathered_forward(x: jax.Array, stored: PartitionSpec, whole: PartitionSpec) -> tuple[jax.Array, None]:
    return _gathered(x, stored, whole), None


def _gathered_backward(stored: PartitionSpec, whole: PartitionSpec, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Whole first: summed over the batch, and of the sum each chip keeps its part (a reduce-scatter); else the loop comes back here.
    return (jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(gradient, whole), stored),)


_gathered.defvjp(_gathered_forward, _gathered_backward)
