"""Plans by formula, the search and the table. (Compiled plans: test_compile.)"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json

import pytest

from maskae.config import load_config
from maskae.errors import UserError
from maskae.planning import search as search_module
from maskae.planning import table as table_module
from maskae.planning import tracing
from maskae.planning.chips import parse_topology
from maskae.planning.plan import plan, planned_experiment, rematerialisation, set_rematerialisation
from maskae.planning.report import report_from_json, report_lines
from maskae.planning.tracing import trace_step

BASE = "configs/mae.py:base"
SHALLOW = ("model.depth=2", "model.decoder_depth=1", "data.image_size=32", "model.width=32", "model.heads=2", "model.decoder_width=16",
           "model.decoder_heads=2", "train.batch_size=512")


@functools.cache
def formula(*overrides: str, topology: str = "h100:8"):
    return plan(BASE, load_config(BASE, [*SHALLOW, *overrides]), parse_topology(topology), formula=True)


@functools.cache
def traced(*overrides: str):
    return trace_step(planned_experiment(load_config(BASE, [*SHALLOW, *overrides]), parse_topology("h100:8")))


def test_traced_products_are_three_forward_passes_less_the_gradient_of_the_pixels():
    config = load_config(BASE, [*SHALLOW, "model.remat=none", "model.scan=false"])
    experiment = planned_experiment(config, parse_topology("h100:8"))
    patch_projection = 2 * 4 * 768 * 32
    assert trace_step(experiment).products.flops == pytest.approx(experiment.train_flops - patch_projection)


def test_rematerialisation_trades_memory_for_flops_and_scanning_changes_neither():
    none, dots, full = (traced(f"model.remat={policy}") for policy in ("none", "dots", "full"))
    assert none.kept > dots.kept > full.kept
    assert none.products.flops < dots.products.flops < full.products.flops
    unrolled = traced("model.remat=full", "model.scan=false")
    assert unrolled.products.flops == full.products.flops
    assert unrolled.kept == pytest.approx(full.kept, rel=0.2)


def test_recomputation_is_stated_apart_and_not_part_of_the_utilisation():
    plain, full = formula("model.remat=none"), formula("model.remat=full")
    assert plain.flops.recomputed == 0 < full.flops.recomputed
    assert plain.flops.training == full.flops.training == 3 * full.flops.forward
    assert full.flops.per_chip == pytest.approx(64 * (full.flops.training + full.flops.recomputed))
    assert full.utilisation == pytest.approx(64 * full.flops.training / 989e12 / full.seconds.step)


def convolutional(*overrides: str):
    """SparK, whose `remat` is true or false."""
    return load_config("configs/spark_medical.py:base", ["model.remat=true", *overrides])


def test_rematerialisation_may_be_a_truth_value():
    config = convolutional()
    assert rematerialisation(config) == "full"
    set_rematerialisation(config, "none")
    assert config.model.remat is False and rematerialisation(config) == "none"


def test_a_loss_over_groups_of_examples_is_counted_at_the_configs_batch(monkeypatch):
    trace, rows = tracing._trace, []

    def groups_of_four(experiment, count):
        rows.append(count)
        if count % 4:
            raise UserError("not made of groups of 4")
        return trace(experiment, count)

    whole = traced()
    monkeypatch.setattr(tracing, "_trace", groups_of_four)
    config = load_config(BASE, list(SHALLOW))
    grouped = trace_step(planned_experiment(config, parse_topology("h100:8")))
    assert rows == [tracing.TRACED_BATCH, config.train.batch_size]
    assert grouped.products.flops == pytest.approx(whole.products.flops)


def test_a_frozen_encoder_is_not_trained():
    overrides = ["model.depth=2", "model.width=32", "model.heads=2", "data.image_size=32"]
    report = plan("probe", load_config("configs/mae_probe.py:base", overrides), parse_topology("h100:8"))
    assert report.flops.forward < report.flops.training < 1.5 * report.flops.forward
    times = f"({report.flops.training / report.flops.forward:.3g} x forward)"
    assert times in "\n".join(report_lines(report)) and report.collectives[0].payload == 2 * report.parameters


def test_the_slowest_resource_binds():
    report = formula()
    seconds = report.seconds
    assert seconds.step == max(seconds.compute, seconds.memory, seconds.interconnect)
    assert seconds.compute == pytest.approx(report.flops.per_chip / 989e12)
    assert seconds.memory == pytest.approx(report.hbm_bytes / 3.35e12)
    assert seconds.interconnect == pytest.approx(sum(each.seconds for each in report.collectives))
    assert getattr(seconds, seconds.binds) == seconds.step
    assert report.examples_per_second == pytest.approx(512 / seconds.step)


def test_parameters_are_gathered_scattered_and_summed():
    plain = formula()
    assert [(each.kind, each.group) for each in plain.collectives] == [("all-reduce", 8)]
    assert plain.collectives[0].payload == 2 * plain.parameters  # bfloat16
    split = formula("mesh.fsdp=4", "mesh.tensor=2")
    kinds = {(each.kind, each.group): each for each in split.collectives}
    assert set(kinds) == {("all-gather", 4), ("reduce-scatter", 4), ("all-reduce", 2)}
    assert kinds["all-gather", 4].payload == 2 * kinds["reduce-scatter", 4].payload == 2 * plain.parameters
    assert split.memory.arguments < plain.memory.arguments


def test_memory_per_chip_does_not_grow_with_the_number_of_chips():
    small, large = formula("mesh.fsdp=8", topology="h200:8"), formula("mesh.fsdp=8", topology="h200:64")
    assert large.memory.total < small.memory.total
    assert large.memory.arguments <= small.memory.arguments


def test_a_batch_too_large_is_an_answer():
    report = formula("train.batch_size=1048576", "data.image_size=224")
    assert not report.fits and report.memory.total > report.memory.usable
    assert any("DOES NOT FIT" in line for line in report_lines(report))


@pytest.mark.parametrize(
    ("override", "words"),
    [("mesh.fsdp=3", "fsdp=3"), ("train.batch_size=100", "train.batch_size=100"), ("mesh.data=4", "does not divide the 8 devices")],
)
def test_what_does_not_divide_is_one_line(override, words):
    with pytest.raises(UserError, match=words) as error:
        formula(override)
    assert "\n" not in str(error.value)


def test_a_report_survives_json():
    report = formula("mesh.fsdp=4")
    plain = json.loads(json.dumps(report.to_json()))
    assert report_from_json(plain) == report
    assert plain["seconds"]["binds"] == report.seconds.binds and plain["memory"]["total"] == report.memory.total


@pytest.fixture
def memory_by_hand(monkeypatch):
    """Plans in which an example takes 8, 4 or 1 units by policy and 64 units per chip fit."""
    report = formula()
    calls = []

    def planned(name, config, topology, *, formula):
        policy, rows = rematerialisation(config), config.train.batch_size / topology.size
        calls.append((policy, rows))
        fits = {"none": 8, "dots": 4, "full": 1}[policy] * rows <= 64
        return dataclasses.replace(report, fits=fits, remat=policy, batch_size=config.train.batch_size)

    monkeypatch.setattr(search_module, "plan", planned)
    return calls


@pytest.mark.parametrize(
    ("batch", "policy", "best"), [(4, "none", 8), (16, "dots", 16), (48, "full", 48), (512, "full", 64), (7, "none", 7)]
)
def test_search_takes_the_lightest_policy_that_fits_and_then_the_largest_batch(memory_by_hand, batch, policy, best):
    config = load_config(BASE, [*SHALLOW, f"train.batch_size={8 * batch}"])
    before = copy.deepcopy(config)
    chosen = search_module.search(BASE, config, parse_topology("h100:8"), formula=True)[-1]
    assert (chosen.fits, chosen.remat, chosen.batch_size) == (True, policy, 8 * best)
    assert len(memory_by_hand) == len(set(memory_by_hand))
    assert config == before


def test_search_writes_a_truth_value_where_the_system_knows_no_policies(memory_by_hand):
    config = convolutional("train.batch_size=384")
    chosen = search_module.search("spark", config, parse_topology("h100:8"), formula=True)[-1]
    assert (chosen.remat, {call[0] for call in memory_by_hand}) == ("full", {"none", "full"})


def test_search_says_so_where_nothing_fits(memory_by_hand, monkeypatch):
    config = load_config(BASE, [*SHALLOW, "train.batch_size=520"])  # 65 per chip: odd, so there is no half of it
    assert not search_module.search(BASE, config, parse_topology("h100:8"), formula=True)[-1].fits


def test_search_needs_something_to_choose():
    config = load_config(BASE, list(SHALLOW))
    with config.unlocked():
        del config.model["remat"]
    with pytest.raises(UserError, match="no model.remat"):
        search_module.search(BASE, config, parse_topology("h100:8"))


def test_the_table_has_the_models_on_every_slice_and_keeps_what_it_made(monkeypatch, tmp_path):
    report, made = formula(), []

    def planned(name, config, topology, formula=False):
        made.append((name, topology.name))
        method = "formula" if formula else "compiled"
        return dataclasses.replace(report, topology=topology.name, chips=topology.size, method=method)

    monkeypatch.setattr(table_module, "plan", planned)
    lines = table_module.table(tmp_path)
    assert len(lines) == 2 + 3 * 3 * 3 and len(made) == 27
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert {topology for _, topology in made} >= {"v5e:4x4", "v5e:16x16", "v5p:4x8x8", "v6e:16x16"}
    assert table_module.table(tmp_path) == lines and len(made) == 27
    assert len(table_module.table(tmp_path, (), "v5e:4x4")) == 2 + 3
    next(tmp_path.glob("base_v5e_4x4_*")).unlink()
    estimated = table_module.table(tmp_path, formula=True)
    assert [line.endswith("| formula |") for line in estimated[2:]] == [True] + 26 * [False]
