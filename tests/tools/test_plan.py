"""The command line of the planner: text, JSON, and one line for what cannot be."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import pytest

from maskae.planning.table import cached_plan, rows

SHALLOW = ["--config.model.depth=1", "--config.model.decoder_depth=1", "--config.train.batch_size=256"]
BASE = ["--config", "configs/mae.py:base"]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "plan.py"
    spec = importlib.util.spec_from_file_location("plan_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_gpu_mesh_by_formula(tool, capsys):
    assert tool.main([*BASE, "--topology", "h100:64", *SHALLOW, "--config.mesh.fsdp=8"]) == 0
    out = capsys.readouterr().out
    for words in ("64 chip(s), mesh data=8 x fsdp=8", "by formula", "arguments", "temporaries", "fits", "all-gather", "reduce-scatter",
                  "all-reduce", "compute", "memory", "interconnect", "binds", "MFU"):
        assert words in out


def test_json_holds_the_same(tool, capsys):
    assert tool.main([*BASE, "--topology=b200:8", "--json", *SHALLOW]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["method"] == "formula" and plain["fits"] and plain["chips"] == 8
    assert plain["seconds"]["step"] == max(plain["seconds"][name] for name in ("compute", "memory", "interconnect"))


def test_too_much_memory_is_an_answer_and_status_1(tool, capsys):
    assert tool.main([*BASE, "--topology", "h100:8", *SHALLOW[:2], "--config.train.batch_size=1048576"]) == 1
    captured = capsys.readouterr()
    assert "DOES NOT FIT" in captured.out and "too much" in captured.out and not captured.err


def test_search_prints_the_chosen_plan(tool, capsys):
    assert tool.main([*BASE, "--topology", "v5e:2x2", "--formula", "--search", *SHALLOW]) == 0
    captured = capsys.readouterr()
    assert "rematerialisation none" in captured.out and "per chip: does not fit" in captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*BASE, "--topology", "v5d:4x4"], "unknown chip 'v5d'"),
        ([*BASE, "--topology", "v5e:5x5"], "no such slice (nearest: v5e:4x8)"),
        ([*BASE, "--topology", "h100:8", "--config.train.batch_size=1001"], "nearest: 1000"),
        ([*BASE, "--topology", "h100:8", "--config.mesh.fsdp=5"], "does not divide the 8 devices"),
        ([*BASE, "--topology", "h100:8", "--config.model.detph=5"], "did you mean 'model.depth'"),
        ([*BASE, "--topolgy", "h100:8"], "did you mean '--topology'"),
        (BASE, "--topology is missing"),
        (["--topology", "h100:8"], "--config is missing"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tool, capsys, words, message):
    assert tool.main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.slow
def test_the_table_of_record_fits_and_memory_per_chip_never_grows(tmp_path: Path) -> None:
    """Compiles 27 rows, about an hour: `MASKAE_PLANS=plans pytest -n 0 -m slow tests/tools` keeps what is done in `plans`."""
    cache = Path(os.environ.get("MASKAE_PLANS", tmp_path))
    totals: dict[tuple[str, str], list[int]] = {}
    for model, topology, overrides in rows():
        report = cached_plan(cache, model, topology, overrides)
        assert report.fits, (model, topology)
        totals.setdefault((model, topology.partition(":")[0]), []).append(report.memory.total)
    for slices, memory in totals.items():
        assert memory == sorted(memory, reverse=True), slices
