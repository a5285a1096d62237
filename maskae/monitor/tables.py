"""The two metric files that every run writes: `metrics.jsonl` and `metrics.csv`, and how they are read back.

Both survive a kill at any moment: a row is one flushed write, and a last line that was cut short is dropped at the next start. After a
resume from step s, rows beyond s are removed, because they are computed again; the files then equal those of a run that was never
interrupted, up to the columns named `machine/...`.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

logger = logging.getLogger(__name__)

# Columns of times, rates and memory, which depend on the machine and the hour: never compared between runs.
MACHINE_PREFIX = "machine/"
# JSON has no word for these; as strings they are valid JSON, and `float()` takes them back.
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

Row = dict[str, float]
Curve = tuple[list[int], list[float]]
Parsed = TypeVar("Parsed")


def is_machine_column(column: str) -> bool:
    """Whether a column holds times, rates or memory, which differ between two runs of the same computation."""
    return column.startswith(MACHINE_PREFIX)


def encode_number(value: float) -> float | str:
    """A float as strict JSON: itself if finite, else "NaN", "Infinity" or "-Infinity"."""
    value = float(value)
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def decode_number(value: Any) -> float | None:
    """The inverse of `encode_number`; None for anything that is not a number (booleans and texts included)."""
    if isinstance(value, str):
        return NON_FINITE.get(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def write_atomically(path: Path, text: str) -> None:
    """Replaces a text file in one move, so that a reader or a kill sees the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def undamaged_lines(path: Path, parse: Callable[[str], Parsed]) -> list[tuple[str, Parsed]]:
    """The lines of a text file that parse, with what they parse to; each other line is named in the log and left out.

    `parse` raises ValueError on a damaged line. A line without an end (a kill in the middle of a write) counts as damaged even
    where it parses: `0.12` may be the beginning of `0.1234`.
    """
    kept = []
    text = path.read_bytes().decode("utf-8", errors="replace") if path.exists() else ""
    for number, line in enumerate(io.StringIO(text), start=1):
        try:
            if not line.endswith("\n"):
                raise ValueError("it has no end")
            kept.append((line, parse(line)))
        except ValueError as error:
            logger.warning("%s line %d is damaged and is left out: %s", path, number, error)
    return kept


class JsonlWriter:
    """`metrics.jsonl`: one JSON object per call, `{"step": 20, "loss": 0.31}`; texts as `{"step": 20, "text": {"name": "..."}}`.

    Args:
        path: the file; its folder must exist.
        resume_step: rows beyond this step are dropped; None starts with an empty file.
    """

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        self._path = path
        self.truncate_after(-1 if resume_step is None else resume_step)

    def truncate_after(self, step: int) -> None:
        """Drops the rows beyond `step` and the damaged ones, and goes on appending behind the rest."""
        write_atomically(self._path, "".join(line for line, row in undamaged_lines(self._path, _parse_json_row) if row["step"] <= step))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one row."""
        self._append({"step": int(step)} | {name: encode_number(value) for name, value in values.items()})

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures are not kept here."""

    def text(self, step: int, name: str, text: str) -> None:
        """Appends one text."""
        self._append({"step": int(step), "text": {name: text}})

    def close(self) -> None:
        """Nothing is held open."""

    def _append(self, row: Mapping[str, Any]) -> None:
        _append_line(self._path, json.dumps(row, allow_nan=False) + "\n")


class CsvWriter:
    """`metrics.csv`: the column `step`, then every column ever seen in the order of its first value; empty where a row has no value.

    A new column rewrites the file with the new header, atomically. Non-finite values are `nan`, `inf`, `-inf`.

    Args:
        path: the file; its folder must exist.
        resume_step: rows beyond this step are dropped, and columns with them that no kept row uses; None starts with an empty file.
    """

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        self._path = path
        self._columns: list[str] = ["step"]
        self.truncate_after(-1 if resume_step is None else resume_step)

    def truncate_after(self, step: int) -> None:
        """Drops the rows beyond `step` and the damaged ones, and goes on appending behind the rest."""
        header, rows = self._read()
        rows = [row for row in rows if int(row[0]) <= step]
        used = [i for i, name in enumerate(header) if name == "step" or any(row[i] for row in rows)]
        self._columns = [header[i] for i in used]
        self._write([[row[i] for i in used] for row in rows])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one row, after a rewrite of the file where `values` has a new column."""
        new = [name for name in values if name not in self._columns]
        if new:
            _, rows = self._read()
            self._columns += new
            self._write([row + [""] * len(new) for row in rows])
        cells = [str(int(step)), *(repr(float(values[name])) if name in values else "" for name in self._columns[1:])]
        _append_line(self._path, _csv_text([cells]))

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures are not kept here."""

    def text(self, step: int, name: str, text: str) -> None:
        """Texts are not kept here."""

    def close(self) -> None:
        """Nothing is held open."""

    def _read(self) -> tuple[list[str], list[list[str]]]:
        header: list[str] = []

        def parse(line: str) -> list[str]:
            cells = next(csv.reader([line]), [])
            if header:
                _check_cells(cells, columns=len(header))
            elif cells[:1] != ["step"]:
                raise ValueError("the header does not begin with 'step'")
            else:
                header.extend(cells)
            return cells

        rows = [cells for _, cells in undamaged_lines(self._path, parse)]
        return header or ["step"], rows[1:]

    def _write(self, rows: Sequence[Sequence[str]]) -> None:
        write_atomically(self._path, _csv_text([self._columns, *rows]))


def read_metrics(path: Path) -> list[Row]:
    """The number rows of a `metrics.jsonl`, in the order of the file, each with its "step"; [] where there is no file."""
    rows = [row for _, row in undamaged_lines(path, _parse_json_row) if "text" not in row]
    return [{name: number for name, value in row.items() if (number := decode_number(value)) is not None} for row in rows]


def curves(rows: Iterable[Row]) -> dict[str, Curve]:
    """Column name -> (steps, values), from rows as `read_metrics` gives them; a step written twice keeps its last value."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step":
                found.setdefault(name, {})[int(row["step"])] = value
    return {name: (list(points), list(points.values())) for name, points in found.items()}


def _parse_json_row(line: str) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError("it is not an object with a step")
    return row


def _check_cells(cells: Sequence[str], columns: int) -> None:
    if len(cells) != columns:
        raise ValueError(f"{len(cells)} cells under {columns} columns")
    # Converts only to raise ValueError on a damaged cell.
    int(cells[0])
    for cell in filter(None, cells[1:]):
        float(cell)


def _csv_text(rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _append_line(path: Path, line: str) -> None:
    # Closed at once, hence one write: after a kill the line is there as a whole or, at worst, cut at its end.
    with open(path, "ab") as file:
        file.write(line.encode("utf-8"))
