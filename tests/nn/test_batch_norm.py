"""Batch norm: torch's arithmetic, statistics of visible positions alone, over the global batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskae.nn.batch_norm import BatchNorm, moments

X = jax.random.normal(jax.random.key(0), (3, 4, 4, 5)) * 2 + 1
MASK = jax.random.bernoulli(jax.random.key(1), 0.5, (3, 4, 4))


def run(x: jax.Array, mask: jax.Array | None = None, train: bool = True) -> tuple[jax.Array, Any]:
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, mask, train=train)
    return norm.apply(variables, x, mask, train=train, mutable=["batch_stats"])


def test_visible_positions_are_normalised_as_if_they_were_alone() -> None:
    seen = np.asarray(MASK)
    rows = np.asarray(X)[seen]
    y, moved = run(X, MASK)
    np.testing.assert_allclose(np.asarray(y)[seen], (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5), atol=1e-5)
    assert np.abs(np.asarray(y)[~seen]).max() == 0
    np.testing.assert_allclose(moved["batch_stats"]["mean"], 0.1 * rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(moved["batch_stats"]["variance"], 0.9 + 0.1 * rows.var(0, ddof=1), atol=1e-6)


def test_a_full_mask_is_no_mask_and_one_cell_twice_counts_as_once() -> None:
    np.testing.assert_allclose(run(X, jnp.ones_like(MASK))[0], run(X)[0], atol=1e-6)
    once, twice = moments(X[:1], MASK[:1]), moments(jnp.concatenate([X[:1]] * 2), jnp.concatenate([MASK[:1]] * 2))
    np.testing.assert_allclose(once.mean, twice.mean, atol=1e-6)
    np.testing.assert_allclose(once.variance, twice.variance, atol=1e-6)
    assert float(twice.positions) == 2 * float(once.positions)


def test_evaluation_uses_and_keeps_the_running_statistics() -> None:
    y, kept = run(X, train=False)
    np.testing.assert_allclose(y, np.asarray(X) / np.sqrt(1 + 1e-5), rtol=1e-6)
    assert float(kept["batch_stats"]["mean"].sum()) == 0


def test_a_batch_of_hidden_positions_moves_nothing_and_stays_finite() -> None:
    y, kept = run(X, jnp.zeros_like(MASK))
    assert np.abs(np.asarray(y)).max() == 0
    np.testing.assert_array_equal(kept["batch_stats"]["variance"], 1)
    gradient = jax.grad(lambda x: run(x, jnp.zeros_like(MASK))[0].sum())(X)
    assert bool(jnp.isfinite(gradient).all())
