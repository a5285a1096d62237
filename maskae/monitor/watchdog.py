"""A thread that tells where a run hangs."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import logging
import statistics
import threading
import time as system_time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

# Steps whose durations the median is taken over.
WINDOW = 101


class Watchdog:
    """Writes the Python stacks of all threads when no step ends within `factor` times the median step time.

    It is armed after `warmup_steps` steps, so that compilation does not set it off, and rests inside `pause`. Each stall is reported
    once; the next `beat` arms it again. It works while the main thread is stuck in a compiled program, where no signal handler of
    Python runs. It ends nothing, unless `on_stall` does.

    Args:
        folder: the stacks are appended to `<folder>/stacks.txt`; made if it is not there.
        factor: multiple of the median step time that counts as a stall.
        minimum_seconds: shorter silences never count as a stall.
        warmup_steps: steps before it is armed.
        on_stall: called after the stacks were written, for instance to abort a run whose other hosts wait in a barrier.
        poll_seconds: time between two looks.
        time: a monotonic clock in seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        factor: float = 10.0,
        minimum_seconds: float = 60.0,
        warmup_steps: int = 5,
        on_stall: Callable[[], None] | None = None,
        poll_seconds: float = 1.0,
        time: Callable[[], float] = system_time.monotonic,
    ) -> None:
        self._file = folder / "stacks.txt"
        self._factor = factor
        self._minimum_seconds = minimum_seconds
        self._warmup_steps = warmup_steps
        self._on_stall = on_stall
        self._poll_seconds = poll_seconds
        self._time = time
        self._lock = threading.Lock()
        self._durations: deque[float] = deque(maxlen=WINDOW)
        self._last_beat: float | None = None
        self._beats = 0
        self._pauses = 0
        self._reported = False
        self._stopping = threading.Event()
        # A daemon: it must never keep a process alive that is done.
        self._thread = threading.Thread(target=self._watch, name="maskae-watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Call after each step."""
        now = self._time()
        with self._lock:
            if self._last_beat is not None:
                self._durations.append(now - self._last_beat)
            self._last_beat = now
            self._beats += 1
            self._reported = False

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Nothing inside counts as a stall or as step time; pauses may be nested."""
        with self._lock:
            self._pauses += 1
            began = self._time()
        try:
            yield
        finally:
            with self._lock:
                self._pauses -= 1
                if self._last_beat is not None and not self._pauses:
                    self._last_beat += self._time() - began

    def close(self) -> None:
        """Ends the thread."""
        self._stopping.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopping.wait(self._poll_seconds):
            with self._lock:
                stall = self._stall()
                self._reported = self._reported or stall is not None
            if stall is not None:
                self._report(*stall)

    def _stall(self) -> tuple[float, float] | None:
        """(seconds since the last step, median step time) if that is too long and not reported yet."""
        if self._last_beat is None or self._reported or self._pauses or self._beats < self._warmup_steps or not self._durations:
            return None
        silence = self._time() - self._last_beat
        median = statistics.median(self._durations)
        return (silence, median) if silence > max(self._factor * median, self._minimum_seconds) else None

    def _report(self, silence: float, median: float) -> None:
        head = f"no step ended for {silence:.1f} s; the median step takes {median:.3g} s ({self._beats} steps seen by this process)"
        # `faulthandler` writes to a file descriptor without taking any of Python's locks: it works in a process that hangs.
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file, "a+", encoding="utf-8") as file:
            file.write(f"\n{datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')} {head}\n")
            file.flush()
            start = file.tell()
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(start)
            stacks = file.read()
        logger.error("%s; the stacks of all threads, also in %s:\n%s", head, self._file, stacks)
        if self._on_stall is not None:
            self._on_stall()
