"""A fake stall, and the profiler's window."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from maskae.monitor import Profiler, Watchdog


class Time:
    """Seconds that pass only when told to, so that a busy machine is no stall."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_watchdog(folder: Path, clock: Time, stalls: list[float]) -> Watchdog:
    return Watchdog(folder, minimum_seconds=60.0, warmup_steps=3, poll_seconds=0.01, on_stall=lambda: stalls.append(clock.now), time=clock)


def beat_steps(watchdog: Watchdog, clock: Time, steps: int, seconds: float) -> None:
    for _ in range(steps):
        clock.now += seconds
        watchdog.beat()


def wait_until(stalls: list[float], count: int) -> bool:
    deadline = time.monotonic() + 10
    while len(stalls) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(stalls) == count


def let_it_look() -> None:
    time.sleep(0.15)


def test_a_stall_is_reported_once_with_the_stacks_of_all_threads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock, stalls, release = Time(), list[float](), threading.Event()

    def stuck_in_the_loader() -> None:
        release.wait(20)

    loader = threading.Thread(target=stuck_in_the_loader)
    loader.start()
    watchdog = make_watchdog(tmp_path / "run", clock, stalls)
    try:
        with caplog.at_level(logging.ERROR):
            beat_steps(watchdog, clock, 5, seconds=8.0)
            clock.now = 40 + 79
            let_it_look()
            assert stalls == [], "under 10 times the median of 8 s"
            clock.now = 40 + 81
            assert wait_until(stalls, 1)
            let_it_look()
            assert len(stalls) == 1, "one report for one stall"
        text = (tmp_path / "run" / "stacks.txt").read_text()
        assert "no step ended for 81.0 s; the median step takes 8 s" in text
        assert "stuck_in_the_loader" in text and "wait_until" in text
        assert "stuck_in_the_loader" in caplog.text
        beat_steps(watchdog, clock, 1, seconds=1.0)
        clock.now += 90
        assert wait_until(stalls, 2), "armed again by the next step"
    finally:
        release.set()
        watchdog.close()
        loader.join()


def test_no_report_before_the_warm_up_in_a_pause_or_under_the_minimum(tmp_path: Path) -> None:
    clock, stalls = Time(), list[float]()
    watchdog = make_watchdog(tmp_path, clock, stalls)
    try:
        clock.now = 1000.0  # building and compiling
        let_it_look()
        beat_steps(watchdog, clock, 2, seconds=0.1)
        clock.now += 1000  # two steps are not yet three
        let_it_look()
        beat_steps(watchdog, clock, 4, seconds=0.1)
        with watchdog.pause(), watchdog.pause():
            clock.now += 1000
            let_it_look()
        let_it_look()
        beat_steps(watchdog, clock, 1, seconds=0.1)
        clock.now += 59  # far over 10 times the median
        let_it_look()
        assert stalls == [] and not (tmp_path / "stacks.txt").exists()
        clock.now += 2
        assert wait_until(stalls, 1), "the pause did not enter the median"
    finally:
        watchdog.close()


def test_profile_of_a_window_of_steps(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, first_step=2, last_step=3)
    for step in range(1, 6):
        with profiler.step(step):
            result = jnp.ones(4).sum()
        profiler.after_step(step, wait_for=result)
        assert any(tmp_path.rglob("*.xplane.pb")) == (step >= 3)
    profiler.close()


def test_profile_is_written_when_the_run_ends_inside_the_window(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, first_step=1, last_step=9)
    with profiler.step(1):
        jnp.ones(4).sum()
    profiler.close()
    assert any(tmp_path.rglob("*.xplane.pb"))


def test_profiler_that_fails_does_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    jax.profiler.start_trace(str(tmp_path / "other"))  # only one recording can go on at a time
    try:
        profiler = Profiler(tmp_path, first_step=1, last_step=1)
        with profiler.step(1):
            pass
        profiler.after_step(1)
        profiler.close()
    finally:
        jax.profiler.stop_trace()
    assert "the profiler could not be started" in caplog.text


def test_profiler_off_by_default_and_window_checked(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path)
    with profiler.step(0):
        pass
    profiler.after_step(0)
    assert not (tmp_path / "profile").exists()
    with pytest.raises(ValueError, match="before its first step"):
        Profiler(tmp_path, first_step=5, last_step=4)
