"""Distances to a teacher's features and the normalisations of these."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.losses.mimicry import feature_distance, normalise_features
from maskae.vectors import standardise

FEATURES = 3 * jax.random.normal(jax.random.key(0), (4, 5, 64)) + 2


def test_whitened_tokens_have_mean_0_and_mean_square_1() -> None:
    white = standardise(FEATURES)
    np.testing.assert_allclose(white.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(jnp.square(white).mean(-1), 1, atol=1e-5)


@pytest.mark.parametrize(("kind", "zero"), [("l2", 1.0), ("smooth_l1", 0.849)])
def test_what_zero_is_away_from_whitened_gaussian_features(kind: str, zero: float) -> None:
    white = standardise(jax.random.normal(jax.random.key(1), (64, 8, 256)))
    assert float(feature_distance(jnp.zeros_like(white), white, kind)) == pytest.approx(zero, abs=3e-3)


@pytest.mark.parametrize(("kind", "of_half", "of_three"), [("smooth_l1", 0.25, 5.0), ("l1", 0.5, 3.0), ("l2", 0.25, 9.0)])
def test_distances_of_one_number(kind: str, of_half: float, of_three: float) -> None:
    for difference, expected in ((0.5, of_half), (-3.0, of_three)):
        assert float(feature_distance(jnp.full((2, 3), difference), jnp.zeros((2, 3)), kind)) == pytest.approx(expected)


def test_other_targets() -> None:
    np.testing.assert_array_equal(normalise_features(FEATURES, "none"), FEATURES)
    np.testing.assert_allclose(jnp.linalg.norm(normalise_features(FEATURES, "l2"), axis=-1), 1, rtol=1e-5)
    together = np.asarray(normalise_features(FEATURES, "batch"), np.float64)
    assert together.mean() == pytest.approx(0, abs=1e-5)
    assert together.std(ddof=1) == pytest.approx(1, abs=1e-5)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'whiten'"):
        normalise_features(FEATURES, "whitened")
    with pytest.raises(UserError, match="did you mean 'smooth_l1'"):
        feature_distance(FEATURES, FEATURES, "smoothl1")
