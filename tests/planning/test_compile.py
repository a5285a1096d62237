"""The real train step of a tiny MAE, compiled for TPUs that are not here."""

from __future__ import annotations

import importlib.util
import math

import jax
import pytest
from jax.experimental import topologies

import maskae.nn.layers
import maskae.nn.stack
import maskae.nn.vit
import maskae.systems.mae
from maskae.config import load_config
from maskae.errors import UserError
from maskae.planning.chips import GIB, parse_topology
from maskae.planning.compile import _out_of_memory, tpu_devices
from maskae.planning.plan import plan
from maskae.planning.report import report_from_json, report_lines

TINY = "configs/mae.py:tiny"
SCANNED = ("model.scan=true", "model.remat=full", "model.depth=3", "model.decoder_depth=1")


@pytest.fixture(scope="module", autouse=True)
def compiler():
    assert importlib.util.find_spec("libtpu"), "the TPU compiler is not installed: pip install -e '.[test]' brings the package libtpu"


def compiled(topology: str, *overrides: str):
    return plan(TINY, load_config(TINY, [*SCANNED, *overrides]), parse_topology(topology))


@pytest.fixture(scope="module")
def report():
    return compiled("v5e:2x2")


def test_memory_of_the_compiled_step(report):
    memory = report.memory
    state = 3 * 4 * report.parameters  # float32 parameters and two moments
    assert report.method == "compiled" and report.fits
    assert state < memory.arguments < 2 * state + GIB / 100  # and the padding of the chip's tiles
    assert 0 < memory.temporaries < GIB / 4 and 0 < memory.code < GIB / 4
    assert memory.usable == 15.75 * GIB and memory.capacity == 16 * GIB


def test_flops_by_formula_with_recomputation_apart(report):
    system = maskae.systems.mae.Mae(8, 1, 2, 64, 3, 4, 4.0, 32, 1, 4)
    forward = system.forward_flops({"image": jax.ShapeDtypeStruct((1, 8, 8, 1), "float32")})
    assert report.flops.training == 3 * forward
    assert 0 < report.flops.recomputed < forward
    assert report.flops.per_chip == 16 * (report.flops.training + report.flops.recomputed)


def test_the_gradients_are_summed_over_all_chips_once(report):
    (summed,) = report.collectives
    assert (summed.kind, summed.group) == ("all-reduce", 4)
    assert summed.payload == pytest.approx(4 * report.parameters, rel=0.01)  # float32, and a few scalars
    assert summed.wire == pytest.approx(1.5 * summed.payload)


def test_bytes_count_every_block(report):
    state = 3 * 4 * report.parameters
    assert report.hbm_bytes > 2 * state  # all of it is at least read and written
    assert report.hbm_bytes < report.xla_bytes * 10


def test_the_bounds_and_what_binds(report):
    seconds = report.seconds
    assert seconds.compute == pytest.approx(report.flops.per_chip / 197e12)
    assert seconds.memory == pytest.approx(report.hbm_bytes / 819e9)
    assert seconds.interconnect == pytest.approx(report.collectives[0].wire / 100e9)
    assert getattr(seconds, seconds.binds) == seconds.step
    assert 0 < report.utilisation < 1
    assert not report.warnings and report.versions["libtpu"] and report.compile_seconds > 0


def test_text_and_json_hold_all_of_it(report):
    text = "\n".join(report_lines(report))
    for words in ("4 chip(s), mesh data=4", "64 = 4 x 16", "scanned, rematerialisation full", "arguments", "temporaries", "of 15.750 GiB",
                  "fits", "recomputed", "moved per step", "all-reduce", "binds", "MFU", "libtpu"):
        assert words in text
    assert report_from_json(report.to_json()) == report


def test_sharded_parameters_compile_without_involuntary_rematerialisation():
    sharded = compiled("v6e:2x4", "mesh.fsdp=2", "mesh.tensor=2")
    assert sharded.fits and sharded.warnings == []
    assert {"all-gather", "all-reduce"} <= {each.kind for each in sharded.collectives}
    assert {each.group for each in sharded.collectives} >= {2, 4}
    assert sharded.memory.usable < sharded.memory.capacity == 32 * GIB


# tests/test_mesh.py sees the same warning in every run, from the CPU's compiler: pytest -n 0 -m slow tests/planning/test_compile.py
@pytest.mark.slow
def test_without_constraints_the_compiler_warns_of_involuntary_rematerialisation(monkeypatch):
    for module in (maskae.nn.layers, maskae.nn.vit, maskae.systems.mae):
        monkeypatch.setattr(module, "constrain", lambda x, *axes: x)
    for module in (maskae.nn.layers, maskae.nn.stack):
        monkeypatch.setattr(module, "gather_parameters", lambda params: params)
    warnings = compiled("v6e:2x4", "mesh.fsdp=4").warnings
    assert warnings and "nvoluntary full rematerialization" in warnings[0]


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v4:2x2x1"])
def test_a_chip_with_two_cores_is_one_device(topology):
    assert len(tpu_devices(parse_topology(topology))) == 4


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v4:2x2x1", "v6e:2x2", "v5e:1x1"])
def test_every_chip_compiles(topology):
    assert compiled(topology).fits


@pytest.mark.slow
def test_split_kernels_are_gathered_and_not_multiplied_part_by_part():
    """Without `gather_parameters` the compiler's loops over the parts moved 2.2 times these bytes."""
    overrides = ["model.depth=3", "model.decoder_depth=2", "mesh.fsdp=16", "model.remat=full"]
    config, topology = load_config("configs/mae.py:large", overrides), parse_topology("v5e:4x4")
    made, estimated = (plan("large", config, topology, formula=formula) for formula in (False, True))
    assert made.hbm_bytes < 1.5 * estimated.hbm_bytes


def test_too_large_a_batch_is_an_answer():
    large = compiled("v5e:2x2", "train.batch_size=16777216", "train.total_steps=10")
    assert not large.fits and large.seconds is None and large.utilisation is None
    assert large.memory.total > large.memory.usable == 15.75 * GIB
    text = "\n".join(report_lines(large))
    assert "DOES NOT FIT" in text and "too much" in text
    assert report_from_json(large.to_json()) == large


@pytest.mark.parametrize(
    ("message", "total"),
    [
        ("XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 28.34G of 15.75G hbm. Exceeded", 28.34),
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (544.63G) exceeds available HBM (15.75G).", 545.63),
    ],
)
def test_both_forms_of_the_compilers_complaint(message, total):
    step = _out_of_memory(message, 1.0 * GIB)
    assert step.total == pytest.approx(total * GIB) and step.usable == 15.75 * GIB


def test_an_unknown_complaint_still_does_not_fit():
    step = _out_of_memory("RESOURCE_EXHAUSTED", 1.0)
    assert not step.fits and math.isnan(step.total)


def test_a_missing_compiler_is_one_line(monkeypatch):
    def absent(*arguments, **options):
        raise RuntimeError("Unable to initialize backend 'tpu'\nmore")

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    with pytest.raises(UserError, match="libtpu") as error:
        tpu_devices(parse_topology("v5e:2x2"))
    assert "\n" not in str(error.value)
