"""Distances of images as networks and eyes see them: LPIPS (Zhang et al. 2018, arXiv 1801.03924) and SSIM (Wang et al. 2004)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.vectors import at_least_float32

# ImageNet's statistics for images in -1..1.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
CONVOLUTIONS = (2, 2, 3, 3, 3)
WIDTHS = (64, 128, 256, 512, 512)
# Positions of shorter features keep less than length 1; Vec2Face's copy of LPIPS. LPIPS itself adds 1e-10 to every length.
SHORTEST = 1e-4


class Vgg(nn.Module):
    """VGG-16's convolutions (Simonyan & Zisserman 2015); the last map of each of the five stages. Names: `stage{0..4}_conv{0..}`."""

    widths: tuple[int, ...] = WIDTHS
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """[B, H, W, 3] -> five maps [B, H/2^i, W/2^i, widths[i]]."""
        maps: list[jax.Array] = []
        for stage, (count, width) in enumerate(zip(CONVOLUTIONS, self.widths, strict=True)):
            x = nn.max_pool(x, (2, 2), (2, 2)) if stage else x.astype(self.dtype)
            for number in range(count):
                x = nn.relu(nn.Conv(width, (3, 3), dtype=self.dtype, name=f"stage{stage}_conv{number}")(x))
            maps.append(x)
        return tuple(maps)

    def flops(self, side: int) -> float:
        """Matmul FLOPs (2 per multiply-add) of one image: 7.7e9 at 112 pixels."""
        total, inside = 0.0, 3
        for stage, (count, width) in enumerate(zip(CONVOLUTIONS, self.widths, strict=True)):
            for _ in range(count):
                total += (side // 2**stage) ** 2 * 9 * inside * width
                inside = width
        return 2.0 * total


def vgg_input(images: jax.Array) -> jax.Array:
    """Images [B, H, W, C] in -1..1 as VGG-16 saw ImageNet's; gray ones get three channels."""
    images = jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
    return (images - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)


def map_distance(maps: Sequence[jax.Array], others: Sequence[jax.Array], weights: Sequence[jax.Array] | None = None) -> jax.Array:
    """LPIPS' distance: squared difference of maps whose every position has length 1, weighted over channels, mean over positions, summed.

    Args:
        maps, others: the features [B, h, w, C] of two images.
        weights: [C] of each map; None is the mean over channels.

    Returns:
        At least float32 [B].
    """

    def unit(x: jax.Array) -> jax.Array:
        x = at_least_float32(x)
        squared = jnp.square(x).sum(-1, keepdims=True)
        # The gradient of a square root at 0 is no number.
        length = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
        return x / jnp.maximum(length, SHORTEST)

    total: Any = 0.0
    for index, (one, other) in enumerate(zip(maps, others, strict=True)):
        weight = jnp.full(one.shape[-1], 1 / one.shape[-1]) if weights is None else weights[index]
        total = total + (jnp.square(unit(one) - unit(other)) @ weight).mean((1, 2))
    return total


def structural_similarity(images: jax.Array, others: jax.Array, taps: int = 11, sigma: float = 1.5, data_range: float = 1.0) -> jax.Array:
    """SSIM of [B, H, W, C], a scalar, at least float32: mean over positions, channels and examples; K1 0.01, K2 0.03.

    The window is Gaussian, without padding. Images smaller than it get the largest odd one that fits.
    """

    def blur(x: jax.Array) -> jax.Array:
        for axis in (1, 2):
            count = min(taps, (x.shape[axis] - 1) // 2 * 2 + 1) if x.shape[axis] < taps else taps
            place = jnp.arange(count) - (count - 1) / 2
            window = jnp.exp(-jnp.square(place) / (2 * sigma**2))
            window = window / window.sum()
            reach = x.shape[axis] - count + 1
            x = sum(window[i] * jax.lax.slice_in_dim(x, i, i + reach, axis=axis) for i in range(count))  # type: ignore[assignment]
        return x

    a, b = at_least_float32(images), at_least_float32(others)
    stacked = jnp.concatenate([a, b, a * a, b * b, a * b], -1)
    mean_a, mean_b, square_a, square_b, product = jnp.split(blur(stacked), 5, axis=-1)
    first, second = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    variance_a, variance_b, covariance = square_a - mean_a**2, square_b - mean_b**2, product - mean_a * mean_b
    structure = (2 * covariance + second) / (variance_a + variance_b + second)
    return ((2 * mean_a * mean_b + first) / (mean_a**2 + mean_b**2 + first) * structure).mean()
