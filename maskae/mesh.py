"""Devices: the named mesh, and which axis of which parameter lies on which mesh axis."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from maskae.errors import UserError
from maskae.paths import map_paths

AXES = ("slice", "data", "fsdp", "tensor")
BATCH_AXES = ("slice", "data", "fsdp")
BATCH = PartitionSpec(BATCH_AXES)

# (pattern of the parameter's path, mesh axis of each array axis); the first match counts. A mesh axis that does not divide the array
# axis is left out there. Attention splits over heads and the MLP over its hidden units, so that each block needs one sum over `tensor`
# after each of its two halves.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"attention/qkv/kernel$", ("fsdp", None, "tensor", None)),
    (r"attention/qkv/bias$", (None, "tensor", None)),
    (r"attention/(query|key|value)/kernel$", ("fsdp", "tensor", None)),
    (r"attention/(query|key|value)/bias$", ("tensor", None)),
    (r"attention/out/kernel$", ("tensor", None, "fsdp")),
    (r"mlp/fc1/kernel$", ("fsdp", "tensor")),
    (r"mlp/fc1/bias$", ("tensor",)),
    (r"mlp/fc2/kernel$", ("tensor", "fsdp")),
    (r"kernel$", ("fsdp", None)),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (all of them by default) with the axes `AXES`, all `Auto`; one size may be -1: what is left.

    `slice` (1 where it is not given) is the slow outermost axis, data parallel over slices that are joined by an ordinary network.
    Raises UserError where the sizes do not multiply to the number of devices, or `slice` is not the number of slices that there are.
    """
    devices = list(devices if devices is not None else jax.devices())
    shape = [int({"slice": 1, **sizes}[axis]) for axis in AXES]
    shown = [(axis, size) for axis, size in zip(AXES, shape, strict=True) if axis != "slice" or size != 1]
    written = " x ".join(f"{axis}={size}" for axis, size in shown)
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise UserError(f"mesh: {written}: every size is at least 1, and one at most is -1 (what is left)")
    known = int(np.prod([size for size in shape if size != -1]))
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if int(np.prod(shape)) != len(devices):
        raise UserError(f"mesh: {written} does not divide the {len(devices)} devices of this run")
    slices = len({_slice_of(device) for device in devices})
    if slices > 1 and shape[0] != slices:
        raise UserError(f"mesh.slice={shape[0]}, but the devices lie in {slices} slices: set --config.mesh.slice={slices}")
    return Mesh(arrange(devices, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slice_of(device: jax.Device) -> int:
    return getattr(device, "slice_index", 0) or 0


def arrange(devices: Sequence[jax.Device], shape: Sequence[int]) -> np.ndarray:
    """The devices as an array of `shape` (slice, data, fsdp, tensor), neighbours in the fast network side by side where possible.

    A process must hold one block of the batch's rows, since it reads one run of records. Where the physical order scatters a process's
    devices (a host of a TPU pod is a square of chips, not a row), the order by slice and process is taken.
    """
    ordered = np.asarray(sorted(devices, key=lambda d: (_slice_of(d), d.process_index, d.id)), dtype=object).reshape(shape)
    if devices[0].platform != "tpu":
        return ordered
    slices = len({_slice_of(device) for device in devices})
    if slices > 1:
        physical = mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
    else:
        physical = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    processes = {device.process_index for device in devices}
    return physical if all(row_block(physical, index) is not None for index in processes) else ordered


def row_block(devices: np.ndarray, process_index: int) -> tuple[int, int] | None:
    """Which block of the batch's rows, of how many equal ones, lies on a process's devices; None where that is not one block.

    `devices` is the mesh's array [slice, data, fsdp, tensor]. Processes that share `tensor` groups hold the same block.
    """
    owner = np.vectorize(lambda device: device.process_index)(devices).reshape(-1, devices.shape[-1])  # [rows, tensor]
    rows = np.flatnonzero((owner == process_index).any(1))
    first, count = int(rows[0]), len(rows)
    whole = count == rows[-1] - first + 1 and first % count == 0 and len(owner) % count == 0
    return (first // count, len(owner) // count) if whole else None


@functools.cache
def data_shard(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process reads block `index` of `count` equal blocks of every batch's rows. Raises UserError where it cannot."""
    block = row_block(mesh.devices, jax.process_index())
    if block is None:
        sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise UserError(f"mesh: {sizes}: the devices of process {jax.process_index()} do not hold one block of the batch's rows")
    return block


def parameter_spec(name: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
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
    """This process's rows of a global batch (block `data_shard(mesh)`) as global arrays whose leading axis is split over `BATCH_AXES`.

    A batch of one row (a whole graph) lies on every device; every process gives it.
    """
    rows = len(next(iter(batch.values())))
    sharding = batch_sharding(mesh, rows)
    blocks = data_shard(mesh)[1] if rows > 1 else 1
    arrays = {name: np.asarray(array) for name, array in batch.items()}
    return {
        name: jax.make_array_from_process_local_data(sharding, array, (len(array) * blocks, *array.shape[1:]))
        for name, array in arrays.items()
    }


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Where a global batch lies: its leading axis split over `BATCH_AXES`; one row alone lies on every device."""
    return NamedSharding(mesh, BATCH if rows > 1 else PartitionSpec())


def check_batch(batch_size: int, accumulate: int, mesh: Mesh, key: str = "train.batch_size") -> None:
    """Raises UserError where the global batch `key` does not divide evenly into microbatches and over the mesh, and is not one row."""
    if batch_size == accumulate == 1:
        return
    axes = [axis for axis in BATCH_AXES if axis != "slice" or mesh.shape[axis] > 1]
    rows = int(np.prod([mesh.shape[axis] for axis in axes]))
    if batch_size % (rows * accumulate):
        step = rows * accumulate
        near = max(step, round(batch_size / step) * step)
        parts = f" times train.accumulate = {accumulate}" if accumulate > 1 else ""
        raise UserError(f"{key}={batch_size} does not divide by mesh {' x '.join(axes)} = {rows}{parts} (nearest: {near})")
