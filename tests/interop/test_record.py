"""Recorded trainings: what rounding may do to each entry, and what is compared."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.interop.case import Case
from maskae.interop.parity import compare
from maskae.interop.record import check_qkv_bias, train, trained_outputs
from maskae.optim import make_optimizer

SLOPE = jnp.asarray([1.0, -0.5, 1e-9, 0.2])


def test_only_entries_of_small_gradient_may_lie_farther() -> None:
    schedule = lambda step: jnp.where(jnp.asarray(step) > 0, 0.1, 0.0)  # noqa: E731
    optimizer = make_optimizer("adamw", schedule=schedule, b2=0.95)
    trained = train(lambda p, number: jnp.vdot(p["w"], SLOPE), optimizer, schedule, {"w": jnp.zeros(4)}, (0, 1, 2), 0.95)
    np.testing.assert_allclose(trained.rates, [0, 0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(trained.params["w"][:2], [-0.2, 0.2], rtol=1e-5)
    found = trained_outputs(trained, lambda tree: {"weight": np.asarray(tree["w"])}, "ft_")
    assert set(found) == {"ft_losses", "ft_lrs", "ft_params/weight"}
    row = found["ft_params/weight"]
    assert "1 of 4 entries may lie farther" in row.note
    assert (row.slack[[0, 1, 3]] < 1e-6).all()
    recorded = np.asarray(trained.params["w"])
    assert compare("x", recorded + [0, 0, 0.1, 0], row).agrees
    assert not compare("x", recorded + [0, 0, 0, 1e-4], row).agrees


def test_zero_gradients_do_not_stop_the_training() -> None:
    schedule = lambda step: jnp.asarray(0.1)  # noqa: E731
    optimizer = make_optimizer("adamw", schedule=schedule)
    trained = train(lambda p, number: 0.0 * jnp.sum(p["w"]), optimizer, schedule, {"w": jnp.ones(2)}, range(2), 0.999)
    assert jax.tree.all(jax.tree.map(lambda leaf: bool((leaf == 0).all()), trained.reach))


def test_attention_without_biases_is_refused(tmp_path) -> None:
    case = Case(tmp_path, {}, {}, {}, {})
    check_qkv_bias(case, {})
    with pytest.raises(UserError, match="qkv_bias=False"):
        check_qkv_bias(case, {"qkv_bias": False})
