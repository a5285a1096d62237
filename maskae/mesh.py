"""Devices: the named mesh, and which axis of which parameter lies on which mesh axis."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maskae.errors import UserError
from maskae.paths import map_paths

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# (pattern of the parameter's path, mesh axis of each array axis); the first match counts. A mesh axis that does not divide the array
# axis is left out there. Attention splits over heads and the MLP over its hidden units, so that each block needs one sum over `tensor`
# after each of its two halves.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"attention/qkv/kernel$", ("fsdp", None, "tensor", None)),
    (r"attention/qkv/bias$", (None, "tensor", None)),
    (r"attention/out/kernel$", ("tensor", None, "fsdp")),
    (r"mlp/fc1/kernel$", ("fsdp", "tensor")),
    (r"mlp/fc1/bias$", ("tensor",)),
    (r"mlp/fc2/kernel$", ("tensor", "fsdp")),
    (r"kernel$", ("fsdp", None)),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (all of them by default) with axes `data`, `fsdp`, `tensor`; one size may be -1: what is left.

    Raises UserError where the sizes do not multiply to the number of devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    shape = [int(sizes[axis]) for axis in AXES]
    written = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise UserError(f"mesh: {written}: every size is at least 1, and one at most is -1 (what is left)")
    known = int(np.prod([size for size in shape if size != -1]))
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if int(np.prod(shape)) != len(devices):
        raise UserError(f"mesh: {written} does not divide the {len(devices)} devices of this run")
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_spec(name: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Where the array called `name` lies: the first rule whose pattern matches, less the axes that do not divide `shape`."""
    for pattern, axes in RULES:
        if re.search(pattern, name) and len(axes) == len(shape):
            fits = [axis if axis and size % mesh.shape[axis] == 0 and mesh.shape[axis] > 1 else None
                    for axis, size in zip(axes, shape, strict=True)]
            return PartitionSpec(*fits)
    return PartitionSpec()


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """The NamedSharding of every leaf of `tree` (arrays or shapes). Optimizer moments and averaged copies end in their parameter's path,
    so the same rules place them where their parameter lies."""
    return map_paths(lambda name, leaf: NamedSharding(mesh, parameter_spec(name, leaf.shape, mesh)), tree)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a global batch as global arrays whose leading axis is split over `data` and `fsdp`."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(array)) for name, array in batch.items()}


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises UserError where the global batch does not divide evenly into microbatches and over the mesh."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (rows * accumulate):
        step = rows * accumulate
        near = max(step, round(batch_size / step) * step)
        raise UserError(
            f"train.batch_size={batch_size} does not divide by mesh data x fsdp = {rows} times train.accumulate = {accumulate}"
            f" (nearest: {near})"
        )
