"""Compares two runs, or a run with a recorded reference curve, and says whether they agree.

    python tools/compare.py runs/a runs/b
    python tools/compare.py runs/a tests/refs/mae_tiny.json --metric loss --tolerance 1e-4

RUN is a run's folder or a reference file: {"losses": [...], "steps": [...], "tolerance": 1e-5}. Steps are 1, 2, ... where they are not
given. Columns `machine/...` (times, rates, memory) are never compared. Two values agree if |a - b| <= tolerance * max(|a|, |b|).

Exit status: 0 if the runs agree, 1 if they differ, 2 for bad input.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

# So that it also works in a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from maskae.errors import UserError, nearest
from maskae.monitor.tables import Curve, decode_number, is_machine_column
from maskae.plots import Chart, draw_charts
from maskae.run_folder import find_folder, flatten, read_json, read_run

DEFAULT_TOLERANCE = 1e-5
ROWS_SHOWN = 12
MOST_CHARTS = 12


@dataclass(frozen=True)
class Side:
    """One of the two things to compare."""

    name: str
    curves: Mapping[str, Curve]
    results: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float | None = None


@dataclass(frozen=True)
class Difference:
    """The two values of one metric at one step (None for an evaluation number) and their relative difference."""

    metric: str
    step: int | None
    first: float
    second: float
    relative: float

    def __str__(self) -> str:
        where = f" at step {self.step}" if self.step is not None else " in the evaluation"
        return f"{self.metric}{where}: {self.first:.8g} and {self.second:.8g} (relative difference {self.relative:.2g})"


def read_side(path: Path) -> Side:
    """Reads a run's folder or a reference file. Raises UserError for anything else."""
    if path.suffix == ".json" or path.is_file():
        return read_reference(path)
    run = read_run(find_folder(path))
    if not run.curves and not run.results:
        raise UserError(f"{path} holds no metrics: there is neither metrics.jsonl nor evaluation.json with numbers")
    results = {f"{kind} / {name}": float(value) for kind, metrics in run.results.items() for name, value in metrics.items()}
    curves = {name: curve for name, curve in run.curves.items() if not is_machine_column(name)}
    return Side(str(path), curves, results, flatten(run.config))


def read_reference(path: Path) -> Side:
    """Reads a recorded curve. Raises UserError where the file is missing or malformed."""
    if not path.is_file():
        beside = [file.name for file in path.parent.glob("*.json")] if path.parent.is_dir() else []
        raise UserError(f"no reference file {path}{nearest(path.name, beside)}")
    record = read_json(path)
    if "losses" not in record:
        raise UserError(f"{path} is no reference curve: it has no list 'losses'{nearest('losses', record)}")
    losses = _numbers(path, record, "losses")
    steps = _numbers(path, record, "steps") if "steps" in record else [float(step) for step in range(1, len(losses) + 1)]
    if len(steps) != len(losses):
        raise UserError(f"{path}: {len(steps)} steps, but {len(losses)} losses")
    tolerance = decode_number(record["tolerance"]) if "tolerance" in record else None
    return Side(str(path), {"loss": ([int(step) for step in steps], losses)}, tolerance=tolerance)


def _numbers(path: Path, record: Mapping[str, Any], key: str) -> list[float]:
    entries = record[key] if isinstance(record[key], list) else [None]
    numbers = [number for entry in entries if (number := decode_number(entry)) is not None]
    if not numbers or len(numbers) < len(entries):
        raise UserError(f"{path}: '{key}' must be a list of numbers")
    return numbers


def relative_difference(first: float, second: float) -> float:
    """|a - b| / max(|a|, |b|): 0 for equal values (also both NaN or the same infinity), infinite where only one is finite."""
    if first == second or (math.isnan(first) and math.isnan(second)):
        return 0.0
    if not (math.isfinite(first) and math.isfinite(second)):
        return math.inf
    return abs(first - second) / max(abs(first), abs(second))


def chosen_metrics(first: Side, second: Side, wanted: Sequence[str]) -> list[str]:
    """The metrics to compare: those asked for, or all that both sides have. Raises UserError for one that a side lacks."""
    for name in wanted:
        for side in (first, second):
            if name not in side.curves:
                raise UserError(
                    f"{side.name} has no metric '{name}'{nearest(name, side.curves)}; it has {', '.join(side.curves) or 'none'}"
                )
    return list(dict.fromkeys(wanted)) or [name for name in first.curves if name in second.curves]


def curve_differences(first: Side, second: Side, metrics: Sequence[str]) -> list[Difference]:
    """A `Difference` for every step that both sides have of every metric, in the order of the steps."""
    found = []
    for name in metrics:
        other = dict(zip(*second.curves[name], strict=True))
        for step, value in zip(*first.curves[name], strict=True):
            if step in other:
                found.append(Difference(name, step, value, other[step], relative_difference(value, other[step])))
    return sorted(found, key=lambda difference: difference.step or 0)


def result_differences(first: Side, second: Side) -> list[Difference]:
    """A `Difference` for every evaluation number that both sides have."""
    both = [name for name in first.results if name in second.results]
    return [
        Difference(name, None, first.results[name], second.results[name], relative_difference(first.results[name], second.results[name]))
        for name in both
    ]


def verdict(curve: Sequence[Difference], results: Sequence[Difference], tolerance: float) -> tuple[bool, str]:
    """(whether all agree, the sentence that says so or names the first that does not)."""
    everything = [*curve, *results]
    wrong = [difference for difference in everything if difference.relative > tolerance]
    if wrong:
        where = f"from step {wrong[0].step} on" if wrong[0].step is not None else "in the evaluation"
        return False, f"differ {where}: {wrong[0]}; {len(wrong)} of {len(everything)} numbers beyond {tolerance:g}"
    largest = max(everything, key=lambda difference: difference.relative)
    if largest.relative == 0:
        return True, f"agree: all {len(everything)} numbers are equal"
    where = f"at step {largest.step}" if largest.step is not None else "in the evaluation"
    return True, f"agree: largest relative difference {largest.relative:.2g} {where} ({largest.metric}), tolerance {tolerance:g}"


def table(metrics: Sequence[str], differences: Sequence[Difference]) -> list[str]:
    """The common steps of each metric as lines; of long curves some rows, the one with the largest difference among them."""
    lines = []
    for name in metrics:
        rows = [difference for difference in differences if difference.metric == name]
        if not rows:
            continue
        stride = max(1, math.ceil(len(rows) / ROWS_SHOWN))
        worst = max(rows, key=lambda row: row.relative)
        shown = [row for i, row in enumerate(rows) if i % stride == 0 or i == len(rows) - 1 or row is worst]
        lines.append(f"{name}: {len(rows)} common steps" + (f", {len(shown)} shown" if len(shown) < len(rows) else ""))
        lines.append(f"  {'step':>9s}  {'A':>14s}  {'B':>14s}  relative difference")
        lines += [f"  {row.step:9d}  {row.first:14.8g}  {row.second:14.8g}  {row.relative:.2g}" for row in shown]
    return lines


def notes(first: Side, second: Side, results: Sequence[Difference]) -> list[str]:
    """Evaluation numbers, metrics that only one side has, and settings that differ, as lines."""
    lines = []
    if results:
        width = max(len(row.metric) for row in results)
        lines.append("evaluation")
        lines += [f"  {row.metric:{width}s}  {row.first:12.6g}  {row.second:12.6g}  {row.relative:.2g}" for row in results]
    for letter, side, other in (("A", first, second), ("B", second, first)):
        alone = [name for name in (*side.curves, *side.results) if name not in other.curves and name not in other.results]
        if alone:
            lines.append(f"only in {letter}: {', '.join(alone)}")
    if first.config and second.config:
        keys = sorted(set(first.config) | set(second.config))
        missing = "(absent)"
        pairs = {key: (first.config.get(key, missing), second.config.get(key, missing)) for key in keys}
        changed = [f"  {key}: {a} | {b}" for key, (a, b) in pairs.items() if a != b]
        lines += ["settings that differ (A | B)", *changed] if changed else ["the settings are the same"]
    return lines


def plot(first: Side, second: Side, metrics: Sequence[str], path: Path) -> None:
    """Draws both curves of each metric, the loss and the longest first, into one PNG file. Raises UserError where it cannot be written."""
    shown = sorted(metrics, key=lambda name: (name != "loss", -len(first.curves[name][0])))[:MOST_CHARTS]
    charts = [Chart(name, {f"A: {first.name}": first.curves[name], f"B: {second.name}": second.curves[name]}) for name in shown]
    picture = draw_charts(charts, columns=min(3, len(charts)), kind="png")
    try:
        path.write_bytes(picture)
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}") from error


def compare(options: argparse.Namespace) -> bool:
    """Prints the comparison, draws it, and returns whether the two agree. Raises UserError for bad input."""
    first, second = read_side(options.run_a), read_side(options.run_b)
    tolerances = [value for value in (options.tolerance, first.tolerance, second.tolerance) if value is not None]
    tolerance = float(tolerances[0]) if tolerances else DEFAULT_TOLERANCE
    metrics = chosen_metrics(first, second, options.metric)
    curve = curve_differences(first, second, metrics)
    results = [] if options.metric else result_differences(first, second)
    if not curve and not results:
        raise UserError(f"nothing to compare: {first.name} and {second.name} have no step of a metric in common")
    print(f"A: {first.name}\nB: {second.name}")
    for line in (*table(metrics, curve), *notes(first, second, results)):
        print(line)
    if curve:
        plot(first, second, metrics, options.out)
        print(f"curves: {options.out}")
    agree, sentence = verdict(curve, results, tolerance)
    print(sentence)
    return agree


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_a", type=Path, metavar="RUN_A")
    parser.add_argument("run_b", type=Path, metavar="RUN_B")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), help="PNG file for the curves of both; default: compare.png here")
    parser.add_argument(
        "--metric", action="append", default=[], help="compare only this metric (may be given again); default: all in common"
    )
    parser.add_argument("--tolerance", type=float, help=f"relative; default: the reference file's, else {DEFAULT_TOLERANCE:g}")
    try:
        return 0 if compare(parser.parse_args(arguments)) else 1
    except UserError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
