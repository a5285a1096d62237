"""A convolutional autoencoder of halving and doubling blocks, after a Keras tutorial's fashion (G-SimCLR, arXiv 2009.12007, section III.A).

Names: `block{i}/{conv,norm}`, and `head` at the decoder's end; running statistics under the same names in the collection `batch_stats`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.nn.batch_norm import BatchNorm
from maskae.nn.sharding import constrain

glorot = nn.initializers.glorot_uniform()


class ConvNormRelu(nn.Module):
    """A convolution of `window` x `window` taps that keeps the size, batch norm (Keras' momentum and epsilon), ReLU."""

    channels: int
    window: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, channels]."""
        x = nn.Conv(self.channels, (self.window,) * 2, kernel_init=glorot, dtype=self.dtype, name="conv")(x)
        return constrain(jax.nn.relu(BatchNorm(0.01, 1e-3, dtype=self.dtype, name="norm")(x, train=train)), "batch")


class HalvingEncoder(nn.Module):
    """Blocks of `widths`, each followed by a 2 x 2 max-pool."""

    widths: Sequence[int]
    window: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H / 2^n, W / 2^n, widths[-1]]."""
        x = images.astype(self.dtype)
        for number, width in enumerate(self.widths):
            x = ConvNormRelu(width, self.window, self.dtype, name=f"block{number}")(x, train=train)
            x = nn.max_pool(x, (2, 2), (2, 2))  # [B, H/2, W/2, width]
        return x


class DoublingDecoder(nn.Module):
    """Every block behind a 2 x nearest up-sampling; a convolution and a sigmoid give the pixels."""

    widths: Sequence[int]
    channels: int
    window: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """[B, h, w, C] -> float32 [B, h * 2^n, w * 2^n, channels] in (0, 1)."""
        for number, width in enumerate(self.widths):
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)  # [B, 2h, 2w, C]
            x = ConvNormRelu(width, self.window, self.dtype, name=f"block{number}")(x, train=train)
        x = nn.Conv(self.channels, (self.window,) * 2, kernel_init=glorot, dtype=self.dtype, name="head")(x)
        return jax.nn.sigmoid(x.astype(jnp.float32))


def autoencoder_flops(size: tuple[int, int], channels: int, widths: Sequence[int], window: int) -> float:
    """Matmul FLOPs (2 per multiply-add) of encoder and mirrored decoder for one image of `size` (H, W): 1.2e8 for CIFAR."""
    total, area, inside = 0.0, float(size[0] * size[1]), channels
    for width in widths:
        total += area * inside * width
        area, inside = area / 4, width
    for width in reversed(widths):
        area *= 4
        total += area * inside * width
        inside = width
    return 2.0 * window**2 * (total + area * inside * channels)
