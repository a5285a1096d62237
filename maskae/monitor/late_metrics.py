"""Metrics read one step late, so that the host never waits for the step that it has just dispatched."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


class LateMetrics:
    """Means of the metrics over a logging interval, read from the device one step late.

    `add(step, metrics)` is called just after step `step` was dispatched. It starts the copy of its metrics to the host and reads those of
    the step before, which are ready while the device works on this one. At every multiple of `every_steps` the means over the interval
    go to `write`.

    The mean is over the finite values; where a metric had other ones, their number is written as `<name>/non_finite` (a skipped step
    must neither hide nor make the whole interval NaN). A metric without any finite value is NaN.

    Args:
        write: called with (step, means) at the end of each interval.
        every_steps: length of the interval, at least 1.
        last: names of metrics whose last value is written in place of the mean (a learning rate, a running count).
    """

    def __init__(self, write: Callable[[int, dict[str, float]], None], *, every_steps: int, last: frozenset[str] = frozenset()) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, it is {every_steps}")
        self._write = write
        self._every_steps = every_steps
        self._last = last
        self._held: tuple[int, Mapping[str, Any]] | None = None
        self._step = 0
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._non_finite: dict[str, int] = {}

    def add(self, step: int, metrics: Mapping[str, Any]) -> tuple[int, dict[str, float]] | None:
        """Takes the scalars of a step just dispatched; returns (step, values) of the step before, or None at the first call."""
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        read = self.settle()
        self._held = (step, dict(metrics))
        return read

    def settle(self) -> tuple[int, dict[str, float]] | None:
        """Waits for the metrics that are still held and reads them; returns (step, values), or None where nothing is held."""
        if self._held is None:
            return None
        step, metrics = self._held
        self._held = None
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        self._accumulate(values)
        self._step = step
        if step % self._every_steps == 0:
            self._emit()
        return step, values

    def flush(self) -> None:
        """Reads what is held and writes the interval begun, if any. For the end of a run only: an interrupted one goes on with it."""
        self.settle()
        if self._counts:
            self._emit()

    def state_dict(self) -> dict[str, Any]:
        """The interval begun, as JSON, for the checkpoint's metadata: with it a resumed run writes the very same means.

        Reads what is held first, so that every row up to the checkpoint's step is on disk before the checkpoint is.
        """
        self.settle()
        return {"step": self._step, "sums": dict(self._sums), "counts": dict(self._counts), "non_finite": dict(self._non_finite)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the interval of `state_dict`."""
        self._held = None
        self._step = int(state["step"])
        self._sums = {name: float(value) for name, value in state["sums"].items()}
        self._counts = {name: int(value) for name, value in state["counts"].items()}
        self._non_finite = {name: int(value) for name, value in state["non_finite"].items()}

    def _accumulate(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._counts.setdefault(name, 0)
            if not math.isfinite(value):
                self._non_finite[name] = self._non_finite.get(name, 0) + 1
            elif name in self._last:
                self._sums[name], self._counts[name] = value, 1
            else:
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] += 1

    def _emit(self) -> None:
        means = {name: self._sums[name] / count if count else math.nan for name, count in self._counts.items()}
        means |= {f"{name}/non_finite": float(count) for name, count in self._non_finite.items()}
        for interval in (self._sums, self._counts, self._non_finite):
            interval.clear()
        self._write(self._step, means)
