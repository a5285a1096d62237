"""LAMB, the weight decay that rises, and the schedules of the convolutional recipes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.optim import make_optimizer
from maskae.schedules import cosine_between, make_schedule, warmup_constant, warmup_cosine_inclusive

PARAMS = {"a": {"kernel": jnp.arange(1.0, 7.0).reshape(2, 3), "bias": jnp.ones(3)}}
GRADS = {"a": {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "bias": jnp.asarray([0.5, -1.0, 2.0])}}
RATE = warmup_constant(0.1, 0)


def step(name: str, params: Any = PARAMS, grads: Any = GRADS, at: int = 0, **options: Any) -> Any:
    optimizer = make_optimizer(name, schedule=RATE, **options)
    return optimizer.update(grads, optimizer.init(params), params, at)[0]


def test_without_decay_lamb_is_adam() -> None:
    jax.tree.map(np.testing.assert_array_equal, step("lamb"), step("adam"))


def test_the_step_of_a_decayed_parameter_has_the_parameters_length() -> None:
    moved = step("lamb", weight_decay=0.04)
    kernel = PARAMS["a"]["kernel"]
    assert float(jnp.linalg.norm(moved["a"]["kernel"])) == pytest.approx(0.1 * float(jnp.linalg.norm(kernel)), rel=1e-5)
    np.testing.assert_array_equal(moved["a"]["bias"], step("adam")["a"]["bias"])
    longer = {"a": {**PARAMS["a"], "kernel": 3 * kernel}}
    # Adam's direction is blind to the gradient's size: three times the parameter takes three times the step, less decay's share.
    steeper = step("lamb", longer, GRADS, weight_decay=1e-9)
    np.testing.assert_allclose(steeper["a"]["kernel"], 3 * step("lamb", weight_decay=1e-9)["a"]["kernel"], rtol=1e-5)
    still = {"a": {**PARAMS["a"], "kernel": jnp.zeros((2, 3))}}
    np.testing.assert_allclose(step("lamb", still, weight_decay=0.04)["a"]["kernel"], step("adam")["a"]["kernel"])


def test_decay_follows_its_schedule() -> None:
    rising = cosine_between(0.04, 0.2, 11)
    assert [round(float(rising(at)), 4) for at in (0, 5, 10, 20)] == [0.04, 0.12, 0.2, 0.2]
    for at in (0, 10):
        fixed = step("adamw", at=at, weight_decay=float(rising(at)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), step("adamw", at=at, weight_decay=rising), fixed)


def test_sparks_cosine_ends_at_the_last_step_and_opening_doubles() -> None:
    schedule = warmup_cosine_inclusive(1.0, 0.001, 4.4, 20)
    assert [round(float(schedule(at)), 5) for at in (0, 2, 4, 19, 30)] == [0.005, 0.5025, 1.0, 0.001, 0.001]
    opening = make_schedule("unfreeze", peak=1.0, total_steps=200, warmup_steps=100)
    assert [round(float(opening(at)), 3) for at in (0, 99, 100, 110, 120, 130, 140, 190)] == [0, 0, 0.1, 0.2, 0.4, 0.8, 1, 1]
