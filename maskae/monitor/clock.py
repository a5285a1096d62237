"""The run's clock: throughput, waiting for data, time left and device-hours, with pauses left out and totals that survive a resume."""

from __future__ import annotations

import contextlib
import time as system_time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax

# Steps over which the rate and the time left are taken: long enough to be steady, short enough to follow a change.
WINDOW = 100


class Clock:
    """Measures the training time of a run; everything inside `pause` is accounted for apart.

    Steps are dispatched asynchronously, so one step's time at the host says little; over some steps the times agree, because
    `LateMetrics` holds the host to the device's pace.

    Args:
        devices: number of devices of the whole run (all hosts).
        total_steps: steps of the whole run, for the time left.
        time: a monotonic clock in seconds.
        also_pause: entered with every pause; `Watchdog.pause` belongs here.
    """

    def __init__(
        self,
        *,
        devices: int,
        total_steps: int,
        time: Callable[[], float] = system_time.monotonic,
        also_pause: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._devices = devices
        self._total_steps = total_steps
        self._time = time
        self._also_pause = also_pause
        self._running_since: float | None = None
        self._pause_depth = 0
        self._train_seconds = 0.0
        self._earlier_device_seconds = 0.0  # of the processes before a resume, perhaps on other numbers of devices
        self._earlier_train_seconds = 0.0
        self._wait_seconds = 0.0
        self._examples = 0
        self._steps = 0
        self._pauses: dict[str, float] = {}
        self._ticks: deque[tuple[int, float, int]] = deque(maxlen=WINDOW + 1)  # (step, train seconds, examples)
        self._mark = (0, 0.0, 0, 0.0)  # steps, train seconds, examples, wait seconds at the last call of `rates`

    def start(self, step: int) -> None:
        """Starts to measure; `step` is the number of steps already taken (0, or the restored checkpoint's)."""
        if self._running_since is not None:
            raise RuntimeError("the clock was started twice")
        self._running_since = self._time()
        self._ticks.append((step, 0.0, self._examples))
        self._mark = (self._steps, 0.0, self._examples, self._wait_seconds)

    def tick(self, step: int, examples: int) -> None:
        """Call after each step: its number (1 for the first) and the examples in its global batch."""
        self._examples += examples
        self._steps += 1
        self._ticks.append((step, self._trained(), self._examples))
        if self._steps == 2:
            self._ticks.popleft()  # a process's first step compiles, unless that was a pause: it must not weigh on the rate

    @contextlib.contextmanager
    def pause(self, name: str, wait_for: Any = None) -> Iterator[None]:
        """Time inside does not count as training but under `name` ("compile", "evaluate", "save"); pauses may be nested.

        `wait_for`: arrays that are waited for before the pause begins, so that steps still in flight count as training.
        """
        if wait_for is not None:
            jax.block_until_ready(wait_for)
        if self._pause_depth:
            yield
            return
        self._train_seconds = self._trained()
        began = self._time()
        self._pause_depth += 1
        try:
            with self._also_pause():
                yield
        finally:
            self._pause_depth -= 1
            now = self._time()
            self._pauses[name] = self._pauses.get(name, 0.0) + now - began
            if self._running_since is not None:
                self._running_since = now

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Put around the call that takes the next batch from the input pipeline."""
        began = self._trained()
        try:
            yield
        finally:
            self._wait_seconds += self._trained() - began

    def examples_per_second(self) -> float | None:
        """The rate over the last steps, all devices together; None before there is one."""
        seconds, examples = self._window(2)
        return examples / seconds if seconds > 0 else None

    def eta_seconds(self) -> float | None:
        """Training time left at the present pace, without the pauses to come; None before there is a pace."""
        seconds, steps = self._window(0)
        return (self._total_steps - self._ticks[-1][0]) * seconds / steps if steps > 0 and seconds > 0 else None

    def rates(self) -> dict[str, float]:
        """The `machine/...` columns of the interval since the last call; those of an interval without a step are left out.

        `machine/examples_per_second`, `machine/examples_per_second_per_device`, `machine/step_seconds`, `machine/data_wait_share` (the
        share of the training time that was spent waiting for data), `machine/eta_seconds`, `machine/train_seconds`, `machine/device_hours`.
        """
        now = (self._steps, self._trained(), self._examples, self._wait_seconds)
        steps, seconds, examples, waited = (new - old for new, old in zip(now, self._mark, strict=True))
        columns = {}
        if steps > 0 and seconds > 0:
            self._mark = now
            columns["machine/examples_per_second"] = examples / seconds
            columns["machine/examples_per_second_per_device"] = examples / seconds / self._devices
            columns["machine/step_seconds"] = seconds / steps
            columns["machine/data_wait_share"] = waited / seconds
        eta = self.eta_seconds()
        if eta is not None:
            columns["machine/eta_seconds"] = eta
        totals = self.totals()
        return columns | {"machine/train_seconds": totals["train_seconds"], "machine/device_hours": totals["device_hours"]}

    def totals(self) -> dict[str, Any]:
        """Sums over the whole run, resumed parts included, for the report: train_seconds, device_hours, examples_seen,
        data_wait_seconds, pause_seconds by name.
        """
        trained = self._trained()
        device_seconds = self._earlier_device_seconds + trained * self._devices
        return {
            "train_seconds": self._earlier_train_seconds + trained,
            "device_hours": device_seconds / 3600,
            "examples_seen": self._examples,
            "data_wait_seconds": self._wait_seconds,
            "pause_seconds": dict(self._pauses),
        }

    def state_dict(self) -> dict[str, Any]:
        """The totals as JSON, for the checkpoint's metadata."""
        return self.totals()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from the totals of `state_dict`; call before `start`."""
        if self._running_since is not None:
            raise RuntimeError("load the clock's state before it is started")
        self._earlier_train_seconds = float(state["train_seconds"])
        self._earlier_device_seconds = float(state["device_hours"]) * 3600
        self._examples = int(state["examples_seen"])
        self._wait_seconds = float(state["data_wait_seconds"])
        self._pauses = {name: float(value) for name, value in state["pause_seconds"].items()} | self._pauses

    def _trained(self) -> float:
        """Training seconds of this process."""
        if self._running_since is None or self._pause_depth:
            return self._train_seconds
        now = self._time()
        self._train_seconds += now - self._running_since
        self._running_since = now
        return self._train_seconds

    def _window(self, column: int) -> tuple[float, float]:
        """(seconds, steps or examples) from the oldest tick kept to the newest."""
        if len(self._ticks) < 2:
            return 0.0, 0.0
        first, last = self._ticks[0], self._ticks[-1]
        return last[1] - first[1], last[column] - first[column]


def format_seconds(seconds: float) -> str:
    """`0:01:12`, `13:05:59` or `2d 04:05:06`."""
    days, rest = divmod(round(seconds), 24 * 3600)
    hours, rest = divmod(rest, 3600)
    minutes, seconds_left = divmod(rest, 60)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}:{seconds_left:02d}"
    return f"{hours}:{minutes:02d}:{seconds_left:02d}"
