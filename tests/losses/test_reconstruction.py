"""The reconstruction loss against its definition, its zero gradients, and the card's trivial values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from maskae.losses.reconstruction import masked_mean_squared_error, normalise_patches, patch_statistics
from maskae.nn.patches import patchify


def test_loss_is_the_mean_over_removed_patches_only() -> None:
    generator = np.random.default_rng(0)
    prediction, target = generator.normal(size=(2, 3, 5, 4))
    mask = np.asarray([[1, 0, 0, 1, 1], [0, 0, 1, 0, 0], [1, 1, 0, 0, 0]], float)
    expected = np.mean([((prediction - target)[b, t] ** 2).mean() for b in range(3) for t in range(5) if mask[b, t]])
    np.testing.assert_allclose(masked_mean_squared_error(prediction, target, mask), expected, rtol=1e-6)


def test_gradient_is_exactly_zero_at_kept_patches() -> None:
    target = jax.random.normal(jax.random.key(0), (2, 6, 4))
    mask = jnp.asarray([[1, 0, 1, 0, 0, 1], [0, 1, 1, 1, 0, 0]], jnp.float32)
    grad = jax.grad(masked_mean_squared_error)(jnp.ones((2, 6, 4)), target, mask)
    assert float(jnp.abs(grad[mask == 0]).max()) == 0.0
    assert float(jnp.abs(grad[mask == 1]).min()) > 0.0


def test_variance_is_the_unbiased_one() -> None:
    patch = np.asarray([[1.0, 2.0, 3.0, 6.0]])
    mean, deviation = patch_statistics(jnp.asarray(patch))
    np.testing.assert_allclose(mean, [[3.0]])
    np.testing.assert_allclose(deviation, [[np.sqrt(14 / 3 + 1e-6)]], rtol=1e-6)
    np.testing.assert_allclose(normalise_patches(jnp.asarray(patch)), (patch - 3) / np.sqrt(14 / 3 + 1e-6), rtol=1e-6)


def test_constant_patches_stay_finite_with_finite_gradients() -> None:
    np.testing.assert_array_equal(normalise_patches(jnp.full((1, 2, 4), 0.3)), 0.0)
    grad = jax.grad(lambda x: normalise_patches(x).sum())(jnp.full((1, 2, 4), 0.3))
    assert bool(jnp.isfinite(grad).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_is_float32_whatever_the_prediction_is(dtype: str) -> None:
    assert masked_mean_squared_error(jnp.ones((1, 2, 3), dtype), jnp.zeros((1, 2, 3)), jnp.ones((1, 2))).dtype == jnp.float32


def trivial_loss(images: np.ndarray, patch_size: int) -> float:
    target = normalise_patches(patchify(jnp.asarray(images), patch_size))
    return float(masked_mean_squared_error(jnp.zeros_like(target), target, jnp.ones(target.shape[:2])))


def test_zero_prediction_costs_767_of_768_where_no_patch_is_constant() -> None:
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3))
    assert trivial_loss(images, 16) == pytest.approx(767 / 768, abs=2e-6)


def test_zero_prediction_costs_the_share_of_patches_that_are_not_constant_on_digits() -> None:
    digits = load_digits()
    images, _ = train_test_split(digits.images, test_size=360, stratify=digits.target, random_state=0)
    images = (images - images.mean()) / images.std()
    assert trivial_loss(images[..., None], 2) == pytest.approx(0.5442, abs=1e-4)


def test_a_constant_patch_has_a_target_of_zero_in_double_precision() -> None:
    with jax.enable_x64(True):
        # A value whose sum float32 rounds; over the root of 1e-6 that would be 1e-5 and more.
        target = normalise_patches(jnp.full((1, 3072), -1.986328125 / 3))
        assert target.dtype == jnp.float64 and float(jnp.abs(target).max()) < 1e-9
