"""Batch normalisation over the global batch, over all positions or over the visible ones alone (Ioffe & Szegedy 2015, arXiv 1502.03167).

Running statistics are the flax collection `batch_stats`; a system keeps them in `state`:

    y, moved = encoder.apply({"params": params, "batch_stats": state}, x, train=True, mutable=["batch_stats"])

The sums run over the whole leading axis: under jit that is the global batch, however it is split over devices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.vectors import at_least_float32

STATISTICS = "batch_stats"


class Moments(NamedTuple):
    """`mean` and biased `variance` [C], and `positions`, the number of positions that they were taken over."""

    mean: jax.Array
    variance: jax.Array
    positions: jax.Array


def moments(x: jax.Array, mask: jax.Array | None = None) -> Moments:
    """Statistics of each channel over every other axis of `x`, or over the positions where `mask` is true.

    Args:
        x: [..., C].
        mask: bool (or 0 and 1), broadcastable to x.shape[:-1] (visible cells, valid points); None takes all positions.

    Returns:
        `Moments` in at least float32. No visible position at all gives mean and variance 0 and 0 positions.
    """
    wide = at_least_float32(x)
    axes = tuple(range(x.ndim - 1))
    if mask is None:
        count = jnp.asarray(x.size // x.shape[-1], wide.dtype)
        mean = wide.mean(axes)
        return Moments(mean, jnp.square(wide - mean).mean(axes), count)
    seen = jnp.broadcast_to(mask, x.shape[:-1]).astype(wide.dtype)[..., None]  # [..., 1]
    count = seen.sum()
    divisor = jnp.maximum(count, 1.0)
    mean = (wide * seen).sum(axes) / divisor
    # Two passes: E[x^2] - E[x]^2 loses the digits that parity needs.
    return Moments(mean, (jnp.square(wide - mean) * seen).sum(axes) / divisor, count)


def moved_statistics(running: dict[str, jax.Array], batch: Moments, momentum: float) -> dict[str, jax.Array]:
    """Running `mean` and `variance` [C] moved by `momentum` towards the batch's mean and UNBIASED variance, without gradient."""
    unbiased = batch.variance * batch.positions / jnp.maximum(batch.positions - 1, 1.0)
    new = jax.lax.stop_gradient({"mean": batch.mean, "variance": unbiased})
    # A batch in which nothing is visible says nothing.
    rate = jnp.where(batch.positions > 0, momentum, 0.0)
    return {name: running[name] + (rate * (new[name] - running[name])).astype(running[name].dtype) for name in new}


class BatchNorm(nn.Module):
    """y = (x - mean) / sqrt(variance + epsilon) * scale + bias, over the global batch; statistics and affine map in float32.

    Parameters `scale` and `bias` [C] (none where `affine` is False); running `mean` and `variance` [C] in the collection `batch_stats`.

    Args:
        momentum: share of the new batch in the running statistics: 0.1 is the default of torchvision (Keras' 0.99 is 0.01 here).
        epsilon: 1e-5 there (Keras 1e-3).
        affine: learned scale and bias.
        scale_init: value of `scale` at the start; 0 in the last norm of a residual branch makes the block start as the identity.
        dtype: of the output.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    affine: bool = True
    scale_init: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, *, train: bool) -> jax.Array:
        """[..., C] -> [..., C]. With `mask` (see `moments`) statistics are those of visible positions, and the others come out as 0.

        `train`: normalise by the batch's statistics and move the running ones (where `batch_stats` is mutable), else by the running ones.
        """
        channels = x.shape[-1]
        mean = self.variable(STATISTICS, "mean", jnp.zeros, (channels,))
        variance = self.variable(STATISTICS, "variance", jnp.ones, (channels,))
        used = Moments(mean.value, variance.value, jnp.zeros(()))
        if train:
            used = moments(x, mask)
            if not self.is_initializing() and self.is_mutable_collection(STATISTICS):
                moved = moved_statistics({"mean": mean.value, "variance": variance.value}, used, self.momentum)
                mean.value, variance.value = moved["mean"], moved["variance"]
        y = (at_least_float32(x) - used.mean) * jax.lax.rsqrt(used.variance + self.epsilon)
        if self.affine:
            scale = self.param("scale", nn.initializers.constant(self.scale_init), (channels,))
            y = y * scale + self.param("bias", nn.initializers.zeros, (channels,))
        if mask is not None:
            y = jnp.where(jnp.broadcast_to(mask, x.shape[:-1])[..., None], y, 0.0)
        return y.astype(self.dtype)
