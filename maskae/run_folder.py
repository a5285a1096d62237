"""What a run's folder holds, read back for the report and for comparisons."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskae.errors import UserError, nearest
from maskae.monitor.tables import Curve, curves, read_metrics


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it; what is not there is empty.

    Args:
        workdir: the folder.
        config: the resolved config, nested.
        summary: sizes of model and data, versions, devices.
        totals: times and unreadable records, of a run that came to its end.
        curves: metric -> (steps, values).
        results: kind of features ("pretrained", "untrained", "raw pixels") -> metric -> value.
        results_step: the step of the evaluation.
        panels: picture name -> its files, oldest first.
    """

    workdir: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    totals: Mapping[str, Any]
    curves: Mapping[str, Curve]
    results: Mapping[str, Mapping[str, float]]
    results_step: int | None
    panels: Mapping[str, list[Path]]

    @property
    def last_step(self) -> int:
        """The last step that any metric speaks of; 0 where there is none."""
        return max((steps[-1] for steps, _ in self.curves.values()), default=0)


def find_folder(path: Path) -> Path:
    """`path` if it is a folder. Raises UserError that names the nearest folder beside it."""
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is not a run's folder")
    beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    hint = nearest(path.name, beside)
    raise UserError(f"no run folder {path}{hint}" if path.parent.is_dir() else f"no run folder {path}: there is no folder {path.parent}")


def read_run(workdir: Path) -> RunRecord:
    """Reads a run's folder. Raises UserError where it does not exist or one of its JSON files is damaged."""
    workdir = find_folder(workdir)
    evaluation = read_json(workdir / "evaluation.json")
    panels: dict[str, list[Path]] = {}
    for file in sorted((workdir / "panels").glob("*.png")):
        panels.setdefault(file.stem.partition("_")[2], []).append(file)
    return RunRecord(
        workdir=workdir,
        config=read_json(workdir / "config.json"),
        summary=read_json(workdir / "summary.json"),
        totals=read_json(workdir / "totals.json"),
        curves=curves(read_metrics(workdir / "metrics.jsonl")),
        results=evaluation.get("rows", {}),
        results_step=evaluation.get("step"),
        panels=panels,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} where there is no file. Raises UserError for a damaged one."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the text's encoding, or of the JSON
        raise UserError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; empty dicts stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat
