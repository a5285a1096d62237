"""metrics.jsonl and metrics.csv: what they hold, and that a kill and a resume leave what an uninterrupted run would have left."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from maskae.monitor import CsvWriter, JsonlWriter, MultiWriter, curves, open_writers, read_metrics


def open_tables(folder: Path, resume_step: int | None) -> MultiWriter:
    return open_writers(folder, resume_step=resume_step, tensorboard=False)


def write_steps(writers: MultiWriter, first: int, last: int) -> None:
    """Rows as a run gives them: a loss each step, an evaluation with columns of its own every fourth."""
    for step in range(first, last + 1):
        writers.scalars(step, {"loss": 1 / 3 / step, "grad_norm": math.sqrt(step)})
        if step % 4 == 0:
            writers.scalars(step, {f"evaluate/knn_{step // 8}": 0.1 * step})


def contents(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "metrics.jsonl").read_bytes(), (folder / "metrics.csv").read_bytes()


@pytest.mark.parametrize(("killed_at", "checkpoint"), [(3, 2), (6, 3), (7, 6), (8, 4), (13, 12)])
@pytest.mark.parametrize("cut", [0, 1, 9])
def test_resumed_files_equal_uninterrupted_ones(tmp_path: Path, killed_at: int, checkpoint: int, cut: int) -> None:
    write_steps(open_tables(tmp_path / "straight", None), 1, 16)
    write_steps(open_tables(tmp_path / "resumed", None), 1, killed_at)
    if cut:
        for name in ("metrics.jsonl", "metrics.csv"):
            path = tmp_path / "resumed" / name
            path.write_bytes(path.read_bytes()[:-cut])
    write_steps(open_tables(tmp_path / "resumed", checkpoint), checkpoint + 1, 16)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "straight")


def test_fresh_start_empties_the_files(tmp_path: Path) -> None:
    write_steps(open_tables(tmp_path, None), 1, 9)
    open_tables(tmp_path, None)
    assert contents(tmp_path) == (b"", b"step\n")


def test_new_column_rewrites_the_header_and_keeps_the_rows(tmp_path: Path) -> None:
    writer = CsvWriter(tmp_path / "metrics.csv", resume_step=None)
    writer.scalars(1, {"loss": 0.5})
    writer.scalars(2, {"accuracy, top 1": 0.25})
    writer.scalars(3, {"loss": 0.125})
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["loss"] for row in rows] == ["0.5", "", "0.125"]
    assert [row["accuracy, top 1"] for row in rows] == ["", "0.25", ""]
    assert [row["step"] for row in rows] == ["1", "2", "3"]


def test_floats_come_back_exactly(tmp_path: Path) -> None:
    values = {"third": 1 / 3, "tiny": 5e-324, "large": 1.7976931348623157e308, "whole": 3.0}
    for writer in (JsonlWriter(tmp_path / "m.jsonl", resume_step=None), CsvWriter(tmp_path / "m.csv", resume_step=None)):
        writer.scalars(7, values)
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 7} | values]
    header, row = (line.split(",") for line in (tmp_path / "m.csv").read_text().splitlines())
    assert dict(zip(header[1:], map(float, row[1:]), strict=True)) == values


def test_non_finite_values_are_strict_json_and_readable_csv(tmp_path: Path) -> None:
    writers = open_tables(tmp_path, None)
    writers.scalars(1, {"nan": math.nan, "up": math.inf, "down": -math.inf})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert math.isnan(row["nan"]) and row["up"] == math.inf and row["down"] == -math.inf
    cells = (tmp_path / "metrics.csv").read_text().splitlines()[1].split(",")
    assert math.isnan(float(cells[1])) and float(cells[2]) == math.inf and float(cells[3]) == -math.inf


def test_damaged_lines_are_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_steps(open_tables(tmp_path, None), 1, 3)
    (jsonl, table) = contents(tmp_path)
    lines = jsonl.splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(lines[0] + b"\x00\x00\xff\n" + lines[2])
    lines = table.splitlines(keepends=True)
    (tmp_path / "metrics.csv").write_bytes(lines[0] + lines[1] + b"2,0.1\n" + lines[3])
    open_tables(tmp_path, 3)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]
    assert [line.split(",")[0] for line in (tmp_path / "metrics.csv").read_text().splitlines()] == ["step", "1", "3"]
    assert "metrics.jsonl line 2" in caplog.text and "metrics.csv line 3" in caplog.text


def test_texts_live_in_the_jsonl_file_and_are_no_metrics(tmp_path: Path) -> None:
    writers = open_tables(tmp_path, None)
    writers.text(2, "note", "ein Satz, 数")
    writers.scalars(2, {"loss": 1.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) == {"step": 2, "text": {"note": "ein Satz, 数"}}
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 2, "loss": 1.0}]


def test_curves_join_rows_of_one_step(tmp_path: Path) -> None:
    writers = open_tables(tmp_path, None)
    writers.scalars(4, {"loss": 2.0})
    writers.scalars(4, {"accuracy": 0.5})
    writers.scalars(8, {"loss": 1.0})
    assert curves(read_metrics(tmp_path / "metrics.jsonl")) == {"loss": ([4, 8], [2.0, 1.0]), "accuracy": ([4], [0.5])}
    assert read_metrics(tmp_path / "absent.jsonl") == []
