"""A request to stop, from a scheduler or from Ctrl-C."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax

from maskae.processes import Agreement

logger = logging.getLogger(__name__)


class StopRequested(Exception):
    """Ends an evaluation that is under way when the run is told to stop."""


class Stop:
    """Remembers a request to stop (SIGTERM of a scheduler, Ctrl-C) until the step under way has ended, on every process.

    A second Ctrl-C ends at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._received: signal.Signals | None = None
        self._agreement = Agreement()
        self._breaks = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number)
        if jax.process_count() == 1:
            self.signal = self._received
        if self._breaks:
            self._breaks = False
            raise StopRequested

    def agree(self) -> None:
        """Sets `signal` to what any process has received, on all after the same step. Each calls it once per step."""
        number = self._agreement(self._received or 0)
        self.signal = signal.Signals(number) if number else None

    @contextmanager
    def breaking(self) -> Iterator[None]:
        """Inside, a request ends what is under way by StopRequested, which is swallowed here: minutes of evaluation are no reason to
        lose the checkpoint that a scheduler leaves seconds for. With several processes all must go through it together."""
        self._breaks = jax.process_count() == 1
        try:
            yield
        except StopRequested:
            logger.info("the evaluation under way is left out")
        finally:
            self._breaks = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes both signals inside, and gives them back."""
        before = {number: signal.signal(number, self) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
