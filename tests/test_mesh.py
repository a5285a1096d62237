"""The mesh: its axes, which rows a process reads, where parameters lie, and what the compiler says to the constraints."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from maskae import mesh as mesh_module
from maskae.config import load_config
from maskae.errors import UserError
from maskae.experiment import build
from maskae.mesh import AXES, arrange, data_shard, make_mesh, parameter_spec, put_batch, row_block

ROOT = Path(__file__).parent.parent
REMATERIALISED = "Involuntary full rematerialization"


@dataclass(frozen=True)
class Device:
    """A device as far as its place counts."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "cpu"


def test_the_mesh_has_all_axes_in_order_and_lets_the_compiler_choose():
    mesh = make_mesh({"slice": 2, "data": -1, "fsdp": 2, "tensor": 1})
    assert mesh.axis_names == AXES and mesh.devices.shape == (2, 2, 2, 1)
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert [device.id for device in mesh.devices.flat] == sorted(device.id for device in jax.devices())


@pytest.mark.parametrize(
    ("sizes", "part"),
    [
        ({"data": 3, "fsdp": 1, "tensor": 1}, "mesh: data=3 x fsdp=1 x tensor=1 does not divide the 8 devices"),
        ({"data": -1, "fsdp": 3, "tensor": 1}, "does not divide the 8 devices"),
        ({"slice": 3, "data": -1, "fsdp": 1, "tensor": 1}, "mesh: slice=3"),
        ({"data": -1, "fsdp": -1, "tensor": 1}, "one at most is -1"),
        ({"data": 8, "fsdp": 0, "tensor": 1}, "at least 1"),
    ],
)
def test_a_mesh_that_does_not_divide_is_one_line(sizes, part):
    with pytest.raises(UserError, match=part) as caught:
        make_mesh(sizes)
    assert "\n" not in str(caught.value)


def test_a_batch_that_does_not_divide_names_the_axes_and_the_nearest():
    mesh = make_mesh({"slice": 2, "data": -1, "fsdp": 2, "tensor": 2})
    with pytest.raises(UserError, match=r"evaluate.batch_size=30 does not divide by mesh slice x data x fsdp = 4 \(nearest: 32\)"):
        mesh_module.check_batch(30, 1, mesh, "evaluate.batch_size")


def test_slices_are_the_outermost_axis_however_the_devices_are_listed():
    listed = [Device(id=i, process_index=i // 2, slice_index=1 - i // 4) for i in range(8)]
    placed = arrange(listed[::-1], (2, 2, 2, 1))
    assert [[d.slice_index for d in part.flat] for part in placed] == [[0] * 4, [1] * 4]
    assert [d.id for d in placed.flat] == [4, 5, 6, 7, 0, 1, 2, 3]
    with pytest.raises(UserError, match="the devices lie in 2 slices: set --config.mesh.slice=2"):
        make_mesh({"slice": 1, "data": -1, "fsdp": 1, "tensor": 1}, listed)


@pytest.mark.parametrize(
    ("owners", "shape", "blocks"),
    [
        ([0, 0, 1, 1], (1, 2, 2, 1), [(0, 2), (1, 2)]),
        ([0, 0, 1, 1], (1, 1, 2, 2), [(0, 2), (1, 2)]),
        ([0, 0, 1, 1], (1, 1, 1, 4), [(0, 1), (0, 1)]),
        ([0, 1, 2, 3], (1, 2, 1, 2), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ([0, 1, 0, 1], (1, 4, 1, 1), [None, None]),
        ([0, 1, 1, 0], (1, 4, 1, 1), [None, None]),
    ],
    ids=["rows", "tensor within", "tensor over both", "tensor over pairs", "scattered", "not aligned"],
)
def test_a_process_reads_the_rows_that_lie_on_its_devices(owners, shape, blocks):
    placed = np.asarray([Device(i, owner) for i, owner in enumerate(owners)], dtype=object).reshape(shape)
    assert [row_block(placed, index) for index in range(len(blocks))] == blocks


def test_one_process_reads_all_rows_and_puts_them_on_the_batch_axes():
    mesh = make_mesh({"slice": 2, "data": 2, "fsdp": 1, "tensor": 2})
    assert data_shard(mesh) == (0, 1)
    rows = np.arange(8, dtype=np.int32)
    array = put_batch({"example": rows}, mesh)["example"]
    np.testing.assert_array_equal(array, rows)
    assert {shard.data.shape for shard in array.addressable_shards} == {(2,)}
    assert array.sharding.spec == PartitionSpec(("slice", "data", "fsdp"))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("params/encoder/block_0/attention/qkv/kernel", (64, 3, 4, 16), ("fsdp", None, "tensor", None)),
        ("params/encoder/block_0/attention/qkv/bias", (3, 4, 16), (None, "tensor", None)),
        ("params/encoder/block_0/attention/out/kernel", (4, 16, 64), ("tensor", None, "fsdp")),
        ("params/joint/block_0/cross_attention/key/kernel", (64, 4, 16), ("fsdp", "tensor", None)),
        ("params/joint/block_0/cross_attention/key/bias", (4, 16), ("tensor", None)),
        ("params/encoder/block_0/mlp/fc1/kernel", (64, 256), ("fsdp", "tensor")),
        ("params/encoder/block_0/mlp/fc1/bias", (256,), ("tensor",)),
        ("params/encoder/block_0/mlp/fc2/kernel", (256, 64), ("tensor", "fsdp")),
        ("opt/mu/encoder/block_0/mlp/fc2/kernel", (256, 64), ("tensor", "fsdp")),
        ("params/decoder/head/kernel", (32, 4), ("fsdp", None)),
        ("params/encoder/block_0/attention/qkv/kernel", (64, 3, 3, 16), ("fsdp", None, None, None)),
        ("params/encoder/norm/scale", (64,), ()),
        ("params/encoder/cls_token", (1, 1, 64), ()),
        ("step", (), ()),
    ],
)
def test_where_parameters_lie(name, shape, expected):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert parameter_spec(name, shape, mesh) == PartitionSpec(*expected)


COMPILES = """
import sys
import jax
from maskae.config import load_config
from maskae.experiment import build
from maskae.systems import mae
from maskae.nn import layers, stack, vit

SMALL = ["model.depth=1", "model.width=64", "model.heads=4", "model.decoder_width=32", "model.decoder_depth=1", "model.decoder_heads=4"]

def compile_step(*overrides):
    experiment = build(load_config("configs/mae.py:tiny", [*SMALL, "train.batch_size=64", *overrides]))
    with jax.set_mesh(experiment.mesh):
        experiment.train_step.lower(experiment.abstract_state, experiment.batch_shapes()).compile()

SCANNED = ("mesh.fsdp=4", "model.scan=true", "model.remat=dots")
for overrides in [("mesh.fsdp=4",), ("mesh.fsdp=2", "mesh.tensor=4"), SCANNED]:
    compile_step(*overrides)
print("NOW WITHOUT CONSTRAINTS", file=sys.stderr, flush=True)
for module in (layers, stack, vit, mae):
    if hasattr(module, "constrain"):
        module.constrain = lambda x, *axes: x
    if hasattr(module, "gather_parameters"):
        module.gather_parameters = lambda params: params
compile_step(*SCANNED)
"""


def test_compiling_replicates_nothing_that_it_was_not_told_to():
    """Without the constraints at token boundaries the compiler says so: the same test on that program shows that it would be seen."""
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR", "TF_CPP_MIN_LOG_LEVEL")}
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILES], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    constrained, _, unconstrained = done.stderr.partition("NOW WITHOUT CONSTRAINTS")
    assert REMATERIALISED not in constrained, constrained
    assert REMATERIALISED in unconstrained, "the compiler no longer reports what this test looks for"


def scanned_losses(policy: str) -> list[float]:
    """Losses and gradient norms of two steps."""
    small = ("model.depth=2", "model.width=16", "model.heads=2", "model.decoder_width=16", "model.decoder_depth=1")
    layout = ("train.batch_size=32", "mesh.fsdp=4", "model.scan=true", f"model.remat={policy}")
    experiment = build(load_config("configs/mae.py:tiny", [*small, *layout]))
    with jax.set_mesh(experiment.mesh):
        state, values = experiment.fresh_state(), []
        for k in range(2):
            state, metrics = experiment.train_step(state, experiment.put(experiment.pipeline.batch(k)))
            values += [float(metrics["loss"]), float(metrics["gradient_norm"])]
    return values


@pytest.fixture(scope="module")
def kept() -> list[float]:
    return scanned_losses("none")


# pytest -n 0 -m slow tests/test_mesh.py
@pytest.mark.parametrize("remat", ["dots", pytest.param("full", marks=pytest.mark.slow), "offload"])
def test_rematerialisation_changes_memory_and_not_the_step(remat, kept):
    np.testing.assert_allclose(scanned_losses(remat), kept, rtol=1e-6)
