"""Kernels over a mesh: the compiler does not split a kernel by itself, so each device is given its own rows and heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from maskae.mesh import BATCH_AXES

HEAD_AXES = ("tensor",)


class Split:
    """How attention is split over the ambient mesh (`jax.set_mesh`): the batch over slice, data and fsdp, the heads over `tensor`.

    Axes that do not divide the batch or the heads are left out: along them every device computes the same. Without a mesh, and inside
    `shard_map`, nothing is split.
    """

    def __init__(self, batch: int, heads: int) -> None:
        mesh = jax.sharding.get_abstract_mesh()
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        sizes = {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1}
        self.anything = bool(sizes)
        self.automatic = frozenset(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto)
        self.batch = _dividing(batch, BATCH_AXES, sizes)
        self.heads = _dividing(heads, HEAD_AXES, sizes)

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The spec of an array whose leading dimensions mean "batch", "heads" or None."""
        meaning = {"batch": self.batch or None, "heads": self.heads or None, None: None}
        return PartitionSpec(*(meaning[axis] for axis in axes))

    def sum_over_batch(self, x: jax.Array) -> jax.Array:
        """The sum over all devices' rows of a value that each has from its own."""
        return jax.lax.psum(x, self.batch) if self.batch else x

    def run(self, function: Callable[..., Any], in_specs: Sequence[Any], out_specs: Any) -> Callable[..., Any]:
        """`function` on each device's part."""
        if not self.anything:
            return function
        # A kernel says nothing about the axes over which its outputs vary, which the check would ask for.
        return jax.shard_map(
            function, in_specs=tuple(in_specs), out_specs=out_specs, axis_names=set(self.automatic), check_vma=False
        )


def _dividing(length: int, names: Sequence[str], sizes: dict[str, int]) -> tuple[str, ...]:
    """Those of the axes that split a dimension of `length`: all of them, or none where their product does not divide it."""
    present = tuple(name for name in names if name in sizes)
    return present if length % math.prod(sizes[name] for name in present) == 0 else ()
