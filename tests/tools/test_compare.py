"""The comparison of two runs: verdict, exit status, and one clear line for bad input."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from maskae.monitor import open_writers

TOOL = Path(__file__).parents[2] / "tools" / "compare.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("maskae_tools_compare", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


compare = load()


def make_run(
    folder: Path, steps: int = 10, loss: Callable[[int], float] = lambda step: 1 / step, accuracy: float = 0.9, **config: Any
) -> Path:
    """A run folder; its machine columns differ from run to run."""
    writers = open_writers(folder, resume_step=None, tensorboard=False)
    for step in range(1, steps + 1):
        writers.scalars(step, {"loss": loss(step), "grad_norm": 0.5, "machine/examples_per_second": float(hash(folder) % 1000)})
    (folder / "evaluation.json").write_text(json.dumps({"step": steps, "rows": {"pretrained": {"knn_top1": accuracy}}}))
    (folder / "config.json").write_text(json.dumps({"seed": 0, "train": config}))
    return folder


def run_tool(capsys: pytest.CaptureFixture[str], out: Path, *words: object) -> tuple[int, str, str]:
    status = compare.main([str(word) for word in words] + ["--out", str(out / "plot.png")])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_equal_runs_agree_whatever_their_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = run_tool(capsys, tmp_path, make_run(tmp_path / "a"), make_run(tmp_path / "b"))
    assert status == 0
    assert text.splitlines()[-1] == "agree: all 21 numbers are equal"
    assert "machine" not in text and "the settings are the same" in text
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 300


def test_small_differences_agree_and_the_largest_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", loss=lambda step: 1 / step * (1 + 3e-7 * (step == 8)))
    status, text, _ = run_tool(capsys, tmp_path, a, b)
    assert status == 0 and text.splitlines()[-1].startswith("agree: largest relative difference 3e-07 at step 8 (loss)")
    status, text, _ = run_tool(capsys, tmp_path, a, b, "--tolerance", "1e-8")
    assert status == 1 and text.splitlines()[-1].startswith("differ from step 8 on: loss at step 8: 0.125 and 0.12500004")


def test_runs_that_part_ways_differ_from_that_step_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make_run(tmp_path / "a", batch_size=64)
    b = make_run(tmp_path / "b", loss=lambda step: 1 / step + 0.1 * (step >= 7), batch_size=128, warmup_steps=5)
    status, text, _ = run_tool(capsys, tmp_path, a, b)
    assert status == 1 and "differ from step 7 on" in text.splitlines()[-1] and "4 of 21 numbers" in text
    assert "train.batch_size: 64 | 128" in text and "train.warmup_steps: (absent) | 5" in text and "seed" not in text


def test_evaluation_numbers_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", accuracy=0.8)
    status, text, _ = run_tool(capsys, tmp_path, a, b)
    assert status == 1 and "differ in the evaluation: pretrained / knn_top1" in text
    assert run_tool(capsys, tmp_path, a, b, "--metric", "loss")[0] == 0


def test_only_common_steps_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = run_tool(capsys, tmp_path, make_run(tmp_path / "a", steps=40), make_run(tmp_path / "b", steps=30))
    assert status == 0 and "loss: 30 common steps, 11 shown" in text


def test_worst_step_is_always_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path / "a", steps=100), make_run(tmp_path / "b", steps=100, loss=lambda step: 1 / step + (step == 52))
    _, text, _ = run_tool(capsys, tmp_path, a, b)
    assert any(line.split()[:1] == ["52"] for line in text.splitlines())


@pytest.mark.parametrize(
    ("first", "second", "relative"),
    [(0.0, 0.0, 0.0), (math.nan, math.nan, 0.0), (math.inf, math.inf, 0.0), (1.0, math.nan, math.inf), (0.0, 1e-9, 1.0), (2.0, -2.0, 2.0)],
)
def test_relative_difference(first: float, second: float, relative: float) -> None:
    assert compare.relative_difference(first, second) == relative


def test_reference_file_brings_its_own_tolerance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a", steps=20)
    reference = tmp_path / "mae_tiny.json"
    reference.write_text(json.dumps({"losses": [1.001 / step for step in range(1, 11)], "tolerance": 0.01}))
    assert run_tool(capsys, tmp_path, run, reference)[0] == 0
    assert run_tool(capsys, tmp_path, reference, run, "--tolerance", "1e-4")[0] == 1
    reference.write_text(json.dumps({"losses": [1 / 20, 1 / 10], "steps": [20, 10]}))
    assert run_tool(capsys, tmp_path, run, reference)[0] == 0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"loss": [1.0]}', "has no list 'losses'"),
        ('{"losses": []}', "'losses' must be a list of numbers"),
        ('{"losses": [1.0, "x"]}', "'losses' must be a list of numbers"),
        ('{"losses": [1.0], "steps": [1, 2]}', "2 steps, but 1 losses"),
        ('{"losses": [1.0], "steps": 1}', "'steps' must be a list of numbers"),
        ('{"losses": [1.0', "not readable as JSON"),
        ("[1.0]", "must hold a JSON object"),
        ('{"losses": [1.0], "steps": [77]}', "no step of a metric in common"),
    ],
)
def test_malformed_reference_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], record: str, message: str) -> None:
    reference = tmp_path / "reference.json"
    reference.write_text(record)
    status, _, error = run_tool(capsys, tmp_path, make_run(tmp_path / "a"), reference)
    assert status == 2 and message in error and len(error.splitlines()) == 1


def test_bad_input_names_the_nearest_right_thing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "quickstart")
    (tmp_path / "mae_tiny.json").write_text('{"losses": [1.0]}')
    (tmp_path / "nothing").mkdir()
    for words, message in (
        ((run, tmp_path / "quikstart"), "did you mean 'quickstart'?"),
        ((run, tmp_path / "mae_tini.json"), "did you mean 'mae_tiny.json'?"),
        ((run, tmp_path / "nowhere" / "run"), "there is no folder"),
        ((run, tmp_path / "nothing"), "holds no metrics"),
        ((run, run, "--metric", "los"), "no metric 'los' (did you mean 'loss'?)"),
        ((run, run, "--tolerance", "small"), "invalid float value"),
        ((run,), "RUN_B"),
        ((run, run, "--out", tmp_path / "nowhere" / "x.png"), "No such file"),
    ):
        status = compare.main([str(word) for word in words] + ([] if "--out" in words else ["--out", str(tmp_path / "plot.png")]))
        error = capsys.readouterr().err
        assert status == 2 and message in error and len(error.splitlines()) == 1, error


def test_works_as_a_command_from_any_folder(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", loss=lambda step: 2.0)
    done = subprocess.run([sys.executable, str(TOOL), str(a), str(b)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "differ from step 1 on" in done.stdout, done.stderr
    assert (tmp_path / "compare.png").exists()
