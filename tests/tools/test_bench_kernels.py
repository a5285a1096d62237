"""The kernel bench on tiny sizes: results are checked before they are timed, winners fill the table, bad input is one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from maskae.kernels import choice
from maskae.kernels.operands import Options, feature_names
from tools import bench_kernels, kernel_cases
from tools.kernel_cases import Contest, Sizes, attention_inputs, operands_of

SIZES = Sizes((4,), 2, "float32", 1, 8, ("plain",))
FAST = ["--batch=2", "--heads=1", "--head_size=8", "--rounds=2", "--seconds=0.0005"]
OLD = {"device": "NVIDIA H200", "options": "plain", "min_length": 1, "max_length": 9, "implementation": "cudnn"}


def test_every_kernel_is_checked_timed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"CONTRASTIVE_SIZES": ((8, 4),), "CHAMFER_SIZES": ((2, 8),), "CORA": (12, 20), "GRAPH_WIDTH": (1, 4)}.items():
        monkeypatch.setattr(kernel_cases, name, value)
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"rows": [OLD]}))
    monkeypatch.setattr(bench_kernels, "TABLE", table)
    out = tmp_path / "out.json"
    assert bench_kernels.main([*FAST, "--lengths=6", "--options=alibi", f"--out={out}", "--write_table"]) == 0
    report, printed = json.loads(out.read_text()), capsys.readouterr().out

    assert {result["kernel"] for result in report["results"]} == set(kernel_cases.KERNELS)
    for result in report["results"]:
        assert not result["faults"] and all(times["low"] > 0 for times in result["seconds"].values())
        assert result["ratio"][next(iter(result["seconds"]))] == {"median": 1, "low": 1, "high": 1}
    assert "pallas_gpu (not available on cpu)" in printed and "one_hot" in printed

    choice.load_table.cache_clear()
    old, new = choice.load_table(table)
    assert old == OLD
    assert (new["device"], new["options"], new["min_length"], new["max_length"], new["implementation"]) == ("cpu", "positions", 1, 6, "xla")


def test_a_version_that_is_off_or_fails_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def square(learned: tuple[Any, ...], other: Any) -> Any:
        return learned[0] * learned[0]

    def refuse(learned: tuple[Any, ...], other: Any) -> Any:
        raise ValueError("sizes of 3 are not for me")

    def exhaust(learned: tuple[Any, ...], other: Any) -> Any:
        raise RuntimeError("out of memory")

    def scaled(factor: float) -> Any:
        return lambda learned, other: factor * learned[0] * learned[0]

    numbers = jnp.asarray(np.random.default_rng(0).normal(size=3), jnp.float32)
    contest = Contest("squares", "3", {"a": square, "off": scaled(1.01), "refuses": refuse}, lambda: ((numbers,), None), square)
    monkeypatch.setitem(kernel_cases.KERNELS, "neighbours", lambda sizes: iter([contest]))
    assert bench_kernels.main([*FAST, "--kernels=neighbours"]) == 1
    for result in bench_kernels.measure(contest, SIZES, 1, 1e-4):
        assert set(result["seconds"]) == {"a"} and result["winner"] == "a"
        assert "off by 1.0e-02" in result["faults"]["off"] and "not for me" in result["faults"]["refuses"]
    unchecked = bench_kernels.measure(dataclasses.replace(contest, reference=exhaust), SIZES, 1, 1e-4)[0]
    assert unchecked["seconds"] == {} and unchecked["winner"] is None and "out of memory" in unchecked["faults"]["a"]
    assert "off by 1.0e-02" in capsys.readouterr().out


def ratio(low: float, median: float) -> dict[str, float]:
    return {"low": low, "median": median, "high": 2 * median}


def result(length: int, ratios: dict[str, dict[str, float]], which: str = "forward+backward") -> dict[str, Any]:
    row = {"options": "plain", "length": length, "dtype": "bfloat16", "head_dim": 64}
    return {"pass": which, "row": row, "ratio": {"xla": ratio(1, 1)} | ratios}


def test_only_what_wins_in_every_round_fills_the_table() -> None:
    results = [
        result(50, {"pallas_gpu": ratio(0.9, 1.5)}),
        result(200, {"pallas_gpu": ratio(1.1, 1.5), "cudnn": ratio(1.1, 1.4), "tokamax": ratio(2, 2)}),
        result(50, {"pallas_gpu": ratio(3, 3)}, "forward"),
    ]
    rows = bench_kernels.table_rows(results, "NVIDIA H200", {})
    found = [(row["min_length"], row["max_length"], row["implementation"]) for row in rows]
    assert found == [(1, 100, "xla"), (101, 200, "pallas_gpu")]
    chosen = [choice.choose("NVIDIA H200", length, 1, 64, jnp.dtype("bfloat16"), "plain", tuple(rows)) for length in (50, 150, 201)]
    assert chosen == ["xla", "pallas_gpu", "xla"]


def test_other_devices_dtypes_and_options_keep_their_rows() -> None:
    new = OLD | {"dtype": "bfloat16", "head_dim": 64, "implementation": "xla"}
    kept = [OLD, new | {"device": "NVIDIA A100"}, new | {"dtype": "float16"}, new | {"options": "mask"}]
    assert bench_kernels.merge_rows([*kept, new | {"max_length": 5}], [new]) == [*kept, new]


@pytest.mark.parametrize("option", kernel_cases.OPTION_SETS)
def test_option_sets_are_what_the_table_calls_them(option: str) -> None:
    options = Options(1.0, 30.0 if option == "soft_cap" else None)
    assert feature_names(options, operands_of(*attention_inputs(SIZES, 4, option))) == kernel_cases.OPTION_SETS[option]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--kernels=atention"], "did you mean 'attention'"),
        (["--options=alibis"], "did you mean 'alibi'"),
        (["--dtype=float64"], "there are float32, bfloat16, float16"),
        (["--lengths=50,x"], "whole numbers"),
        (["--lengths=0"], "at least 1"),
        (["--rounds=0"], "at least 1"),
        (["--seconds=0"], "above 0"),
        (["--out=nowhere/out.json"], "no folder nowhere"),
        (["--kernels=chamfer", "--write_table"], "needs attention"),
        (["--round=3"], "did you mean 'rounds'"),
        (["--batch=many"], "invalid int"),
    ],
)
def test_bad_input_is_one_line(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels.main(words) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.startswith("error: ") and error.count("\n") == 1
