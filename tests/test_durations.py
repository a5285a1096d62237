"""Durations: each suffix by hand, and every wrong combination ends in a line that names the keys."""

from __future__ import annotations

import pytest

from maskae.durations import duration_steps, steps_per_epoch, whole_steps
from maskae.errors import UserError


def steps(**values: float | None) -> float:
    return duration_steps(values, "warmup", batch_size=4096, examples_per_epoch=1_281_167, total_steps=1000)


def test_each_suffix() -> None:
    assert steps(warmup_steps=7) == 7.0
    assert steps(warmup_epochs=40) == 40 * 312
    assert steps(warmup_epochs=0.5, warmup_steps=None) == 156.0
    assert steps(warmup_examples=6144) == 1.5
    assert steps(warmup_percent=10) == 100.0
    assert steps(warmup_steps=0, other_epochs=3) == 0.0


def test_an_empty_name() -> None:
    assert duration_steps({"epochs": 2, "warmup_epochs": 1}, "", batch_size=10, examples_per_epoch=35) == 6.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "set one of warmup_steps, warmup_epochs, warmup_examples, warmup_percent"),
        ({"warmup_steps": None}, "a duration is missing"),
        ({"warmup_steps": 3, "warmup_epochs": 1}, "warmup_steps and warmup_epochs are both set"),
        ({"warmup_epochs": -1}, "warmup_epochs must be a number >= 0, not -1"),
        ({"warmup_epochs": float("nan")}, "warmup_epochs must be a number"),
    ],
)
def test_bad_combinations(values: dict[str, float | None], message: str) -> None:
    with pytest.raises(UserError, match=message):
        steps(**values)


def test_what_cannot_be_converted() -> None:
    with pytest.raises(UserError, match="total_percent is a share of the run's length"):
        duration_steps({"total_percent": 10}, "total", batch_size=4)
    with pytest.raises(UserError, match="total_epochs needs data with a known number of examples"):
        duration_steps({"total_epochs": 10}, "total", batch_size=4)
    with pytest.raises(UserError, match="batch_size 64 is larger than the 32 examples"):
        duration_steps({"total_epochs": 10}, "total", batch_size=64, examples_per_epoch=32)


def test_rounding() -> None:
    assert steps_per_epoch(1437, 64) == 22
    assert [whole_steps(value) for value in (3.0, 3.2, 0.1 * 30, 0.0)] == [3, 4, 3, 0]
