"""Schedules against the closed form in float64, their invariants, and the recorded ones of the paper's code."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from maskae.errors import UserError
from maskae.schedules import SCHEDULES, Schedule, make_schedule, scaled_learning_rate, warmup_cosine, warmup_rsqrt, warmup_step


def curve(schedule: Schedule, steps: int) -> np.ndarray:
    return np.asarray(jax.vmap(schedule)(np.arange(steps)), np.float64)


def cosine_by_hand(step: float, peak: float, minimum: float, warmup: float, total: float) -> float:
    if step < warmup:
        return peak * step / warmup
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


@settings(max_examples=30, deadline=None)
@given(
    st.floats(1e-5, 10.0),
    st.floats(0.0, 0.9),
    st.one_of(st.just(0.0), st.floats(0.5, 900.0)),
    st.integers(901, 300_000),
    st.floats(0.0, 1.0),
)
def test_cosine_is_the_closed_form_also_near_the_end(peak: float, low: float, warmup: float, total: int, where: float) -> None:
    schedule = warmup_cosine(peak, low * peak, warmup, total)
    for step in (int(where * total), total - 1):
        expected = cosine_by_hand(step, peak, low * peak, warmup, total)
        np.testing.assert_allclose(float(schedule(step)), expected, rtol=2e-5, atol=1e-9 * peak)


def test_cosine_starts_at_zero_peaks_after_warmup_and_ends_at_the_minimum() -> None:
    schedule = warmup_cosine(2.4e-3, 1e-6, 40, 800)
    assert float(schedule(0)) == 0.0
    assert float(schedule(40)) == np.float32(2.4e-3)
    assert float(schedule(800)) == pytest.approx(1e-6, rel=1e-6)
    assert float(schedule(5000)) == pytest.approx(1e-6, rel=1e-6)
    rates = curve(schedule, 801)
    assert np.all(np.diff(rates[:41]) > 0) and np.all(np.diff(rates[40:]) < 0)


def test_warmup_of_a_fraction_of_a_step() -> None:
    schedule = warmup_cosine(1.0, 0.0, 1.5, 10)
    np.testing.assert_allclose(float(schedule(1)), 1 / 1.5, rtol=1e-6)


# Shapes of papers that begin or wait in ways of their own have tests of their own.
PLAIN = ("cosine", "linear", "constant", "rsqrt", "step")


@pytest.mark.parametrize("name", PLAIN)
def test_every_schedule_warms_up_and_never_exceeds_its_peak(name: str) -> None:
    rates = curve(make_schedule(name, peak=0.5, total_steps=100, warmup_steps=10, milestones=(50,), timescale=20.0), 120)
    assert rates[0] == 0.0
    np.testing.assert_allclose(rates[:11], 0.5 * np.arange(11) / 10, rtol=1e-6)
    assert np.all(np.diff(rates[10:]) <= 0) and rates.max() == 0.5


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "unfreeze"])
def test_without_warmup_the_first_step_has_the_peak(name: str) -> None:
    assert float(make_schedule(name, peak=0.5, total_steps=100)(0)) == 0.5


def test_values_of_the_other_shapes() -> None:
    np.testing.assert_allclose(curve(warmup_step(1.0, 0, (3, 5), 0.1), 7), [1, 1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-6)
    np.testing.assert_allclose(float(warmup_rsqrt(1.0, 0.0, 10, 30)(100)), 0.5, rtol=1e-6)
    np.testing.assert_allclose(float(warmup_rsqrt(1.0, 0.7, 10, 30)(100)), 0.7, rtol=1e-6)
    np.testing.assert_allclose(float(make_schedule("linear", peak=1.0, minimum=0.2, total_steps=10)(5)), 0.6, rtol=1e-6)


def test_a_delayed_parameter_does_not_move_before_its_time() -> None:
    np.testing.assert_array_equal(curve(make_schedule("delayed", peak=0.5, total_steps=10, warmup_steps=3), 5), [0, 0, 0, 0.5, 0.5])


def test_scaling_rule() -> None:
    assert scaled_learning_rate(1.5e-4, 4096) == pytest.approx(2.4e-3)
    assert scaled_learning_rate(0.1, 16384) == pytest.approx(6.4)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        make_schedule("cosin", peak=1.0, total_steps=10)
    with pytest.raises(UserError, match="warm-up of 20 steps is longer than the run of 10"):
        make_schedule("cosine", peak=1.0, total_steps=10, warmup_steps=20)
    with pytest.raises(UserError, match="total_steps > 0"):
        make_schedule("cosine", peak=1.0, total_steps=0)


def test_recorded_learning_rates_of_the_papers_code(shared: Path) -> None:
    folder = shared / "goldens" / "mae" / "a"
    case, outputs = json.loads((folder / "case.json").read_text()), load_file(folder / "outputs.safetensors")
    for key, name in (("pretrain_steps", "train_lrs"), ("finetune", "ft_train_lrs"), ("linear_probe", "probe_lrs")):
        options = case[key]
        per_epoch = options["steps_per_epoch"]
        schedule = warmup_cosine(options["lr"], options["min_lr"], options["warmup_epochs"] * per_epoch, options["epochs"] * per_epoch)
        np.testing.assert_allclose(curve(schedule, options["steps"]), outputs[name], rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(curve(warmup_cosine(2.4e-3, 0.0, 20, 100), 100), outputs["schedule_pretrain"], rtol=1e-6)
    np.testing.assert_allclose(curve(warmup_cosine(2e-3, 1e-6, 14, 70), 70), outputs["schedule_finetune"], rtol=1e-6)


def test_unshifted_cosine_counts_its_phase_from_step_zero():
    schedule = make_schedule("unshifted_cosine", peak=1.0, minimum=0.1, warmup_steps=10, total_steps=100)
    assert float(schedule(0)) == pytest.approx(0.1)
    assert float(schedule(5)) == pytest.approx(0.55)
    assert float(schedule(10)) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.1)) / 2)
    assert float(schedule(100)) == pytest.approx(0.1)
