"""A window of steps recorded by JAX's profiler."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

logger = logging.getLogger(__name__)


class Profiler:
    """Records the steps `first_step` to `last_step`, both included, into `<folder>/profile`, which TensorBoard and Perfetto can show.

    A profiler that fails is named in the log and switched off; it never stops the run.

    Args:
        folder: the run's folder.
        first_step: first step to record, counted from 1; 0 records nothing. Past the first few steps compilation is over.
        last_step: last step to record.

    Raises:
        ValueError: the window ends before it begins.
    """

    def __init__(self, folder: Path, *, first_step: int = 0, last_step: int = 0) -> None:
        if last_step < first_step:
            raise ValueError(f"the profiler's last step {last_step} comes before its first step {first_step}")
        self._folder = folder / "profile"
        self._first_step = first_step
        self._last_step = last_step
        self._enabled = first_step > 0
        self._active = False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Put around the dispatch of step number `step`: starts the recording where it is due and marks the step in it."""
        if self._enabled and not self._active and self._first_step <= step <= self._last_step:
            self._start()
        with jax.profiler.StepTraceAnnotation("train", step_num=step) if self._active else contextlib.nullcontext():
            yield

    def after_step(self, step: int, wait_for: Any = None) -> None:
        """Ends the recording after the last step; `wait_for` are that step's results, so that its work is in the recording."""
        if self._active and step >= self._last_step:
            if wait_for is not None:
                jax.block_until_ready(wait_for)
            self.close()

    def close(self) -> None:
        """Ends the recording if it still goes on (a run that ended inside the window)."""
        if not self._active:
            return
        self._active = self._enabled = False
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, ValueError, OSError) as error:
            logger.warning("the profile could not be written: %s", error)
        else:
            logger.info("profile of steps %d to %d written to %s", self._first_step, self._last_step, self._folder)

    def _start(self) -> None:
        try:
            jax.profiler.start_trace(str(self._folder))
            self._active = True
        except (RuntimeError, ValueError, OSError) as error:
            self._enabled = False
            logger.warning("the profiler could not be started: %s", error)
