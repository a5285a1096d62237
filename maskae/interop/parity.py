"""Run a system on a reference case and compare every recorded output."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

import maskae.interop
from maskae.errors import UserError, nearest
from maskae.interop.case import Case, Reproduced


class Row(NamedTuple):
    """One recorded output: largest relative difference, what is allowed, and whether it agrees."""

    name: str
    difference: float
    allowed: float
    agrees: bool
    note: str


def replay_of(system: str) -> Callable[[Case], Mapping[str, Reproduced]]:
    """`maskae.interop.<system>.replay`. Raises UserError where the system has none."""
    name = f"maskae.interop.{system}"
    if system.isidentifier() and importlib.util.find_spec(name) is not None:
        module = importlib.import_module(name)
        if hasattr(module, "replay"):
            return module.replay
    known = [info.name for info in pkgutil.iter_modules(maskae.interop.__path__)]
    known = [each for each in known if hasattr(importlib.import_module(f"maskae.interop.{each}"), "replay")]
    raise UserError(f"no replay for the system '{system}'{nearest(system, known)}; there are {', '.join(known)}")


def compare(name: str, recorded: np.ndarray, reproduced: Reproduced | None) -> Row:
    """The row of one output; a missing one, another shape, and a value that is not finite disagree."""
    if reproduced is None:
        return Row(name, float("nan"), float("nan"), False, "not compared: the replay does not compute it")
    value = np.asarray(reproduced.value)
    if value.shape != recorded.shape:
        return Row(name, float("nan"), float("nan"), False, f"shape {value.shape}, recorded {recorded.shape}")
    left, right = value.astype(np.float64), recorded.astype(np.float64)
    slack = np.broadcast_to(0.0 if reproduced.slack is None else reproduced.slack, recorded.shape)
    note = reproduced.note
    if reproduced.skip is not None:
        keep = ~np.broadcast_to(reproduced.skip, recorded.shape)
        note = f"{keep.size - keep.sum()} of {keep.size} entries left out: {note}"
        left, right, slack = left[keep], right[keep], slack[keep]
    if not left.size:
        return Row(name, float("nan"), float("nan"), False, "nothing left to compare")
    scale = np.abs(right).max() or 1.0
    # Of NaN the maximum with 0 is NaN.
    difference = float(np.maximum(np.abs(left - right) - slack, 0.0).max() / scale)
    allowed = float(reproduced.relative + reproduced.absolute / scale)
    # `not >` would let NaN through.
    return Row(name, difference, allowed, bool(difference <= allowed), note)


def compare_case(case: Case) -> list[Row]:
    """A row for every recorded output, in the record's order."""
    reproduced = replay_of(case.record["system"])(case)
    listed = list(case.meanings)
    names = [name for name in listed if name in case.outputs] + sorted(set(case.outputs) - set(listed))
    rows = [compare(name, case.outputs[name], reproduced.get(name)) for name in names]
    # "gradnorm/<name>" in a list stands for a family of tensors.
    absent = [name for name in listed if name not in case.outputs and "<" not in name]
    return rows + [Row(name, float("nan"), float("nan"), False, "listed in case.json but not recorded") for name in absent]


def table(case: Case, rows: list[Row]) -> str:
    """The rows as aligned text, with a last line that counts them."""
    width = max([len(row.name) for row in rows] + [6])
    lines = [f"{case.record['system']}, case {case.record['case']}", f"{'tensor':{width}}  {'difference':>10}  {'allowed':>8}  verdict"]
    for row in rows:
        verdict = "ok" if row.agrees else "DIFFERS"
        lines.append(f"{row.name:{width}}  {row.difference:10.2e}  {row.allowed:8.1e}  {verdict:7}  {row.note}".rstrip())
    bad = [row.name for row in rows if not row.agrees]
    lines.append(f"{len(rows) - len(bad)} of {len(rows)} recorded tensors agree" + (f"; not: {', '.join(bad)}" if bad else ""))
    return "\n".join(lines)
