"""Effective rank and spread: known spectra, collapse, and what they must not depend on."""

from __future__ import annotations

import numpy as np
import pytest

from maskae.evaluate.rank import effective_rank, feature_std


def with_spectrum(spectrum: list[float], rows: int = 200, width: int = 10, seed: int = 0) -> np.ndarray:
    """Centred rows with these singular values."""
    generator = np.random.default_rng(seed)
    left = generator.normal(size=(rows, len(spectrum)))
    left, _ = np.linalg.qr(left - left.mean(axis=0))
    right, _ = np.linalg.qr(generator.normal(size=(width, width)))
    return (left * spectrum) @ right[: len(spectrum)]


@pytest.mark.parametrize("count", [1, 3, 10])
def test_flat_spectrum_counts_its_dimensions(count: int) -> None:
    assert effective_rank(with_spectrum([2.5] * count).astype(np.float32)) == pytest.approx(count, rel=1e-5)


def test_known_spectrum() -> None:
    share = np.array([0.5, 0.25, 0.125, 0.125])
    assert effective_rank(with_spectrum([8.0, 4.0, 2.0, 2.0])) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)


def test_equals_a_singular_value_decomposition_both_ways_round() -> None:
    for shape in ((100, 7), (7, 100)):
        features = np.random.default_rng(0).normal(2, 1, shape)
        singular = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
        singular = singular[singular > 1e-9]
        share = singular / singular.sum()
        assert effective_rank(features) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)


def test_independent_of_scale_shift_and_rotation() -> None:
    features = with_spectrum([3.0, 2.0, 1.0])
    rotation, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(10, 10)))
    expected = effective_rank(features)
    for changed in (features * 1e-9, features * 1e9, features + 3.0, features @ rotation):
        assert effective_rank(changed) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "features",
    [
        np.zeros((20, 5)),
        np.ones((1, 5)),
        np.zeros((1, 1)),
        np.full((20, 5), 3.7, np.float32),
        (np.full((500, 64), 3.7) + np.random.default_rng(0).uniform(-1e-7, 1e-7, (500, 64))).astype(np.float32),
    ],
)
def test_collapse_is_zero_not_rounding_noise(features: np.ndarray) -> None:
    assert effective_rank(features) == 0.0
    assert feature_std(features) == pytest.approx(0.0, abs=1e-6)


def test_duplicates_change_nothing() -> None:
    features = np.random.default_rng(0).normal(size=(30, 5))
    assert effective_rank(np.repeat(features, 4, axis=0)) == pytest.approx(effective_rank(features), rel=1e-9)
    assert feature_std(np.repeat(features, 4, axis=0)) == pytest.approx(feature_std(features), rel=1e-9)


def test_more_rows_than_the_limit_are_thinned_evenly() -> None:
    features = np.random.default_rng(0).normal(size=(1001, 4))
    assert effective_rank(features, max_examples=500) == effective_rank(features[::3])
    assert effective_rank(features, max_examples=1001) == effective_rank(features)


def test_feature_std_of_isotropic_and_of_narrow_features() -> None:
    generator = np.random.default_rng(0)
    isotropic = generator.normal(size=(5000, 32))
    assert feature_std(isotropic) == pytest.approx(1.0, abs=0.01)
    assert feature_std(isotropic * generator.uniform(1e-3, 1e3, (5000, 1))) == pytest.approx(feature_std(isotropic), rel=1e-9)
    assert feature_std(isotropic + 100.0) < 0.02


def test_feature_std_equals_a_slow_loop() -> None:
    features = np.random.default_rng(0).normal(1, 1, (40, 3))
    features[7] = 0.0
    unit = [row / max(np.sqrt((row**2).sum()), 1e-12) for row in features]
    deviations = [np.std([row[channel] for row in unit]) for channel in range(3)]
    assert feature_std(features) == pytest.approx(np.mean(deviations) * np.sqrt(3))
