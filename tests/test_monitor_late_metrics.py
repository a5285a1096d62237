"""Metrics read one step late: what is waited for, the means, and that a resume gives the same ones."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.monitor import LateMetrics


class Watched:
    """A metric that notes when it is read."""

    def __init__(self, value: float, reads: list[float]) -> None:
        self._value = value
        self._reads = reads

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        self._reads.append(self._value)
        return np.asarray(self._value)


def losses(steps: int) -> Iterator[tuple[int, dict[str, jax.Array]]]:
    values = np.random.default_rng(0).normal(size=steps).astype(np.float32)
    for step, value in enumerate(values, start=1):
        yield step, {"loss": jnp.asarray(value), "learning_rate": jnp.asarray(step / 10, jnp.float32)}


def test_a_step_is_read_only_when_the_next_was_dispatched() -> None:
    reads: list[float] = []
    metrics = LateMetrics(lambda step, means: None, every_steps=1)
    assert metrics.add(1, {"loss": Watched(1.0, reads)}) is None
    assert reads == []
    assert metrics.add(2, {"loss": Watched(2.0, reads)}) == (1, {"loss": 1.0})
    assert reads == [1.0]
    metrics.flush()
    assert reads == [1.0, 2.0]


def test_means_over_the_interval_and_last_values() -> None:
    rows: list[tuple[int, dict[str, float]]] = []
    metrics = LateMetrics(lambda step, means: rows.append((step, means)), every_steps=4, last=frozenset({"learning_rate"}))
    taken = list(losses(10))
    for step, values in taken:
        metrics.add(step, values)
    assert [step for step, _ in rows] == [4, 8]
    metrics.flush()
    assert [step for step, _ in rows] == [4, 8, 10]
    for (_, means), part in zip(rows, (taken[:4], taken[4:8], taken[8:]), strict=True):
        assert means["loss"] == pytest.approx(np.mean([np.float64(values["loss"]) for _, values in part]), rel=1e-12)
        assert means["learning_rate"] == float(part[-1][1]["learning_rate"])
    metrics.flush()
    assert len(rows) == 3


def test_non_finite_values_are_counted_and_do_not_spoil_the_mean() -> None:
    rows: list[dict[str, float]] = []
    metrics = LateMetrics(lambda step, means: rows.append(means), every_steps=3)
    for step, value in enumerate([1.0, math.nan, 3.0, math.inf, math.nan, math.inf, 5.0], start=1):
        metrics.add(step, {"loss": jnp.float32(value)})
    metrics.flush()
    assert rows[0] == {"loss": 2.0, "loss/non_finite": 1.0}
    assert math.isnan(rows[1]["loss"]) and rows[1]["loss/non_finite"] == 3.0
    assert rows[2] == {"loss": 5.0}


@pytest.mark.parametrize("killed_after", [1, 3, 4, 5, 7, 8])
def test_a_resume_inside_an_interval_gives_the_same_means(killed_after: int) -> None:
    straight: list[tuple[int, dict[str, float]]] = []
    resumed: list[tuple[int, dict[str, float]]] = []
    metrics = LateMetrics(lambda step, means: straight.append((step, means)), every_steps=4)
    for step, values in losses(12):
        metrics.add(step, values)
    metrics.flush()

    metrics = LateMetrics(lambda step, means: resumed.append((step, means)), every_steps=4)
    for step, values in losses(killed_after):
        metrics.add(step, values)
    saved = json.dumps(metrics.state_dict())
    assert len(resumed) == killed_after // 4, "every row up to the checkpoint must be out before it"
    metrics = LateMetrics(lambda step, means: resumed.append((step, means)), every_steps=4)
    metrics.load_state_dict(json.loads(saved))
    for step, values in losses(12):
        if step > killed_after:
            metrics.add(step, values)
    metrics.flush()
    assert resumed == straight


def test_interval_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        LateMetrics(lambda step, means: None, every_steps=0)
