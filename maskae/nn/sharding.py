"""Activation sharding by meaning of the axis, a no-op without a mesh."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, PartitionSpec

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
