"""The one line that tells how far a run is."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time as system_time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from maskae.monitor.clock import format_seconds

logger = logging.getLogger(__name__)

# Without a terminal: the shortest and the longest time between two lines, and the share of the run so far that the time is in between.
SHORTEST_SECONDS, LONGEST_SECONDS, SHARE = 5.0, 600.0, 0.03


class Progress:
    """A progress bar on a terminal; elsewhere plain lines, first every few seconds and then ever fewer, so that log files stay short.

    Args:
        total_steps: steps of the whole run.
        initial_step: steps already taken.
        unit: what is counted per second.
        stream: where to write.
        time: a monotonic clock in seconds.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        initial_step: int = 0,
        unit: str = "examples",
        stream: TextIO | None = None,
        time: Callable[[], float] = system_time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._step = initial_step
        self._unit = unit
        self._stream = stream if stream is not None else sys.stderr
        self._time = time
        self._began = time()
        self._next_line = self._began
        self._last_line_step: int | None = None
        self._values = ""
        self._bar: Any = None
        if self._stream.isatty():
            from tqdm import tqdm

            # Our own rate and ETA in place of tqdm's, which count pauses and earlier steps.
            layout = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(total=total_steps, initial=initial_step, file=self._stream, dynamic_ncols=True, bar_format=layout)

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        examples_per_second: float | None = None,
        eta_seconds: float | None = None,
    ) -> None:
        """Shows that `step` steps are done; what is None is not shown."""
        parts = []
        if loss is not None:
            parts.append(f"loss {loss:.4g}")
        if examples_per_second is not None:
            parts.append(f"{examples_per_second:,.0f} {self._unit}/s")
        if eta_seconds is not None:
            parts.append(f"ETA {format_seconds(eta_seconds)}")
        self._values = "  ".join(parts)
        advance, self._step = step - self._step, step
        with self._stream_may_be_gone():
            if self._bar is not None:
                self._bar.set_postfix_str(self._values, refresh=False)
                self._bar.update(advance)
                return
            now = self._time()
            if now >= self._next_line or step >= self._total_steps:
                self._write_line()
                self._next_line = now + min(max((now - self._began) * SHARE, SHORTEST_SECONDS), LONGEST_SECONDS)

    def write(self, line: str) -> None:
        """Writes a line of its own, above the bar where there is one."""
        with self._stream_may_be_gone():
            if self._bar is not None:
                self._bar.write(line, file=self._stream)
            else:
                print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the last state on the screen."""
        with self._stream_may_be_gone():
            if self._bar is not None:
                self._bar.close()
            elif self._values:
                self._write_line()

    @contextlib.contextmanager
    def _stream_may_be_gone(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # A terminal that was closed, or a reader like `head` that has seen enough, must not end a run of days.
            logger.warning("no progress can be shown any more: %s", error)
            if self._bar is not None:
                self._bar.disable = True  # else it writes once more when it is collected
            self._bar, self._stream = None, open(os.devnull, "w")  # noqa: SIM115

    def _write_line(self) -> None:
        if self._last_line_step == self._step:
            return
        self._last_line_step = self._step
        percent = 100 * self._step / max(self._total_steps, 1)
        print(f"step {self._step}/{self._total_steps} ({percent:.0f}%)  {self._values}".rstrip(), file=self._stream, flush=True)
