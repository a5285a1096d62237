"""The table of record: MAE B, L and H at the paper's batch on TPU slices from 16 to 256 chips, as Markdown."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from maskae.config import load_config
from maskae.planning.chips import GIB, parse_topology
from maskae.planning.plan import plan
from maskae.planning.report import Report, report_from_json

SLICES = {
    "v5e": ("4x4", "8x8", "16x16"),
    "v5p": ("2x2x4", "4x4x4", "4x8x8"),
    "v6e": ("4x4", "8x8", "16x16"),
}
MODELS = ("base", "large", "huge")
HEADER = (
    "| MAE | slice | chips | fsdp | batch per chip | remat | memory GiB (state + rest) | of | limits | compute / memory / links ms "
    "| MFU at best | images/s at best | how |"
)


def table(cache: Path | None, overrides: Sequence[str] = (), only: str = "", formula: bool = False) -> list[str]:
    """The table's lines. Each compilation takes minutes.

    Args:
        cache: folder where compiled plans are kept and taken from.
        overrides: of every row's config.
        only: selects rows by the beginning of their topology.
        formula: estimate the rows that are not in `cache` instead of compiling them.
    """
    lines = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    for model, topology, settings in rows():
        if topology.startswith(only):
            lines.append(row(model, cached_plan(cache, model, topology, [*settings, *overrides], formula)))
    return lines


def rows() -> Iterator[tuple[str, str, list[str]]]:
    """(model, topology, overrides of its recipe) of every row.

    Parameters are split over as many chips as a slice of 16 has: then a chip's share of them, like its share of the batch, is at its
    largest there and never grows.
    """
    for kind, shapes in SLICES.items():
        for model in MODELS:
            for shape in shapes:
                yield model, f"{kind}:{shape}", settings_of(model, kind, shape)


def settings_of(model: str, kind: str, shape: str) -> list[str]:
    """The overrides with which a row runs: how parameters are split, and what is recomputed where memory is short."""
    settings = ["mesh.fsdp=16" if model != "base" else "mesh.fsdp=1"]
    small = parse_topology(f"{kind}:{shape}").size <= 16
    if kind == "v5e" and small and model != "base":
        settings.append("model.remat=full")
    return settings


def cached_plan(cache: Path | None, model: str, topology: str, overrides: Sequence[str], formula: bool = False) -> Report:
    """The plan of one row, from `cache` where it is there, else compiled and put there, or with `formula` estimated."""
    name = f"configs/mae.py:{model}"
    key = hashlib.sha256(json.dumps([name, topology, list(overrides)]).encode()).hexdigest()[:12]
    path = cache / f"{model}_{topology.replace(':', '_')}_{key}.json" if cache else None
    if path and path.is_file():
        return report_from_json(json.loads(path.read_text()))
    if formula:
        return plan(name, load_config(name, overrides), parse_topology(topology), formula=True)
    report = plan(name, load_config(name, overrides), parse_topology(topology))
    print(f"{name} {topology} {' '.join(overrides)}: {report.memory.total / GIB:.2f} GiB", file=sys.stderr, flush=True)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report.to_json(), indent=1))
    return report


def row(model: str, report: Report) -> str:
    """One line of the table."""
    memory, seconds = report.memory, report.seconds
    state, rest = memory.arguments / GIB, (memory.total - memory.arguments) / GIB
    cells = [model, report.topology, str(report.chips), str(report.mesh["fsdp"]), f"{report.batch_size / report.chips:g}",
             report.remat or "", f"{memory.total / GIB:.2f} ({state:.2f} + {rest:.2f})", f"{memory.usable / GIB:.2f}"]
    if seconds is None:
        cells += ["does not fit", "", "", ""]
    else:
        times = " / ".join(f"{value * 1e3:.1f}" for value in (seconds.compute, seconds.memory, seconds.interconnect))
        cells += [seconds.binds, times, f"{(report.utilisation or 0) * 100:.0f} %", f"{report.examples_per_second or 0:,.0f}"]
    cells.append(report.method)
    return "| " + " | ".join(cells) + " |"
