"""A gradient step inside a loss: what it changes, and that the outer gradient sees it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.inner_outer import inner_step

POINT = {"inner": jnp.array([0.7]), "outer": jnp.array([-0.4])}


def outer_loss(params: dict[str, jax.Array], rate: float, first_order: bool = False) -> jax.Array:
    """Two parameters: the inner one moves by the gradient of one function, another function is the loss after it."""

    def objective(inner: jax.Array) -> tuple[jax.Array, None]:
        return (jnp.sin(inner * params["outer"]) + inner**3).sum(), None

    adapted = inner_step(objective, params["inner"], rate, first_order=first_order)
    return (jnp.cos(2 * adapted.params + params["outer"]) * adapted.params).sum() + adapted.value


def gradient(rate: float, first_order: bool = False) -> dict[str, Any]:
    return jax.tree.map(float, jax.tree.map(jnp.squeeze, jax.grad(lambda p: outer_loss(p, rate, first_order))(POINT)))


def test_without_a_rate_it_is_the_plain_loss() -> None:
    inner, outer = float(POINT["inner"][0]), float(POINT["outer"][0])
    plain = np.cos(2 * inner + outer) * inner + np.sin(inner * outer) + inner**3
    assert float(outer_loss(POINT, 0.0)) == pytest.approx(plain, rel=1e-6)
    assert gradient(0.0) == gradient(0.0, first_order=True)


@pytest.mark.parametrize("name", ["inner", "outer"])
def test_the_outer_gradient_is_that_of_differences(name: str) -> None:
    step = 1e-2
    moved = [outer_loss({**POINT, name: POINT[name] + sign * step}, 0.3) for sign in (1, -1)]
    assert gradient(0.3)[name] == pytest.approx(float(moved[0] - moved[1]) / (2 * step), rel=1e-3)


def test_first_order_agrees_up_to_the_rate() -> None:
    apart = {rate: abs(gradient(rate)["inner"] - gradient(rate, first_order=True)["inner"]) for rate in (0.02, 0.01)}
    assert apart[0.01] > 0
    assert apart[0.02] / apart[0.01] == pytest.approx(2.0, rel=0.1)


def test_the_step_goes_down_its_objective() -> None:
    adapted = inner_step(lambda x: (jnp.square(x).sum(), "rest"), jnp.array([3.0, 4.0]), 0.25)
    np.testing.assert_allclose(adapted.params, [1.5, 2.0])
    assert float(adapted.value) == 25.0
    assert adapted.rest == "rest"
    assert float(adapted.gradient_norm) == pytest.approx(10.0)
