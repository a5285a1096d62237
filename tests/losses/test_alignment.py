"""The Gaussian 2-Wasserstein distance: its value in closed cases, its gradient where eigenvalues are equal, and its invariance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.losses.alignment import Gaussian, fit_gaussian, gaussian_wasserstein

WIDTH = 6
ROWS = jax.random.normal(jax.random.key(0), (20, WIDTH))
OTHERS = 0.5 * jax.random.normal(jax.random.key(1), (30, WIDTH)) + 1.0
MEAN = jnp.linspace(0.0, 1.0, WIDTH)
DIAGONALS = jnp.linspace(0.1, 0.9, WIDTH), jnp.linspace(2.0, 0.3, WIDTH)
distance = jax.jit(gaussian_wasserstein, static_argnames="kind")


def of_rows(first: jax.Array, second: jax.Array, kind: str = "full") -> jax.Array:
    return distance(fit_gaussian(first), fit_gaussian(second), kind=kind)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_identical_rows_have_none(kind: str) -> None:
    assert float(of_rows(ROWS, ROWS, kind)) == pytest.approx(0.0, abs=1e-5)
    assert float(of_rows(ROWS, OTHERS, kind)) > 1


def test_equal_covariances_leave_the_means() -> None:
    covariance = fit_gaussian(ROWS).covariance
    found = distance(Gaussian(jnp.zeros(WIDTH), covariance), Gaussian(MEAN, covariance), kind="full")
    assert float(found) == pytest.approx(float(jnp.square(MEAN).sum()), rel=1e-5)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_commuting_covariances_have_a_closed_form(kind: str) -> None:
    first, second = DIAGONALS
    found = distance(Gaussian(jnp.zeros(WIDTH), jnp.diag(first)), Gaussian(MEAN, jnp.diag(second)), kind=kind)
    expected = jnp.square(MEAN).sum() + jnp.square(jnp.sqrt(first) - jnp.sqrt(second)).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_a_common_rotation_changes_nothing() -> None:
    rotation = jnp.linalg.qr(jax.random.normal(jax.random.key(2), (WIDTH, WIDTH)))[0]
    assert float(of_rows(ROWS @ rotation, OTHERS @ rotation)) == pytest.approx(float(of_rows(ROWS, OTHERS)), rel=1e-5)


def test_covariances_shrink_towards_a_multiple_of_the_identity() -> None:
    plain, shrunk = fit_gaussian(ROWS, 0.0).covariance, fit_gaussian(ROWS, 0.25).covariance
    np.testing.assert_allclose(plain, np.cov(np.asarray(ROWS).T, bias=True), atol=1e-5)
    np.testing.assert_allclose(shrunk, 0.75 * plain + 0.25 * np.trace(plain) / WIDTH * np.eye(WIDTH), atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_gradients_are_those_of_differences_also_with_fewer_rows_than_channels(kind: str) -> None:
    few, far = ROWS[:3], OTHERS[:4]  # shrunk covariances with equal eigenvalues
    by_first, by_second = jax.jit(jax.grad(lambda a, b: of_rows(a, b, kind), argnums=(0, 1)))(few, far)
    ways = jax.random.normal(jax.random.key(3), few.shape), jax.random.normal(jax.random.key(4), far.shape)
    step = 1e-2
    change = of_rows(few + step * ways[0], far + step * ways[1], kind) - of_rows(few - step * ways[0], far - step * ways[1], kind)
    predicted = (by_first * ways[0]).sum() + (by_second * ways[1]).sum()
    assert float(change / (2 * step)) == pytest.approx(float(predicted), rel=2e-2)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match="alignment 'ful'.*'full'"):
        gaussian_wasserstein(fit_gaussian(ROWS), fit_gaussian(OTHERS), "ful")
