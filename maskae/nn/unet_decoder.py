"""SparK's way back from a sparse pyramid to pixels (Tian et al., ICLR 2023, arXiv 2301.03580, section 3.3): densify, then a light UNet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice
from maskae.nn.batch_norm import BatchNorm
from maskae.nn.layers import LayerNorm
from maskae.nn.sharding import constrain
from maskae.nn.sparse_conv import masked, visible_at
from maskae.vectors import at_least_float32

DENSIFY_NORMS = ("bn", "ln", "none")

truncated = nn.initializers.truncated_normal(0.02)
kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def clipped_normal(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """N(0, 0.02^2) truncated at -0.02 and 0.02: SparK's mask tokens (elsewhere its truncation is at 2 in absolute terms, so none)."""
    return 0.02 * jax.random.truncated_normal(key, -1.0, 1.0, tuple(shape), dtype)


class Densify(nn.Module):
    """A sparse map made dense: norm over visible positions, a learned token at the hidden ones, a convolution to the decoder's width.

    `window` taps per axis; 0 leaves the convolution out.
    """

    channels: int
    window: int
    norm: str
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, visible: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """[B, H, W, C], bool [B, h, w] -> [B, H, W, channels], and the parts by name."""
        where = visible_at(visible, x.shape[1:3])
        normed = x
        if self.norm == "bn":
            normed = BatchNorm(dtype=self.dtype, name="norm")(x, where, train=self.train)
        elif self.norm == "ln":
            normed = masked(LayerNorm(1e-6, self.dtype, name="norm")(x), visible)
        token = self.param("mask_token", clipped_normal, (1, 1, 1, x.shape[-1])).astype(self.dtype)
        dense = jnp.where(where[..., None], normed, token)
        if self.window:
            pad = self.window // 2
            padding = ((pad, pad), (pad, pad))
            conv = nn.Conv(self.channels, (self.window,) * 2, padding=padding, kernel_init=truncated, dtype=self.dtype, name="conv")
            dense = conv(dense)  # [B, H, W, channels]
        return dense, {"norm": normed, "proj": dense}


class UNetBlock(nn.Module):
    """Doubles the resolution: transposed convolution 4x4 stride 2, 3x3, norm, ReLU6, 3x3 to `outputs`, norm."""

    outputs: int
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, 2H, 2W, outputs]."""
        channels = x.shape[-1]
        # Padding 1 of the framework with the transposed semantics is 4 - 1 - 1 = 2 rows around the dilated input here.
        up = nn.ConvTranspose(
            channels, (4, 4), (2, 2), padding=((2, 2), (2, 2)), kernel_init=kaiming_fan_out, dtype=self.dtype, name="up"
        )
        x = up(x)  # [B, 2H, 2W, C]

        def step(x: jax.Array, width: int, number: int) -> jax.Array:
            conv = nn.Conv(width, (3, 3), use_bias=False, kernel_init=truncated, dtype=self.dtype, name=f"conv{number}")
            return BatchNorm(dtype=self.dtype, name=f"norm{number}")(conv(x), train=self.train)

        x = jnp.clip(step(x, channels, 1), 0, 6)
        return constrain(step(x, self.outputs, 2), "batch")


class SparkDecoder(nn.Module):
    """Densified maps, coarse to fine, are added before the blocks of a UNet whose widths halve; a 1x1 convolution gives the pixels.

    Names: `densify{0..}` (0 is the coarsest map), `block{0..}`, `head`.

    Args:
        width: of the coarsest level.
        blocks: doublings of the resolution, log2 of the encoder's reduction.
        channels: of the image.
        densify_norm: "bn" (residual networks), "ln" (ConvNeXt) or "none".
        remat: compute every block anew in the backward pass.
    """

    width: int
    blocks: int
    channels: int = 3
    densify_norm: str = "bn"
    train: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], visible: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps [B, h, w, C] fine to coarse and bool [B, h0, w0] -> pixels float32 [B, H, W, channels], and everything between by name."""
        check_choice("densify_norm", self.densify_norm, DENSIFY_NORMS)
        named: dict[str, jax.Array] = {}
        levels = []
        for i, x in enumerate(tuple(reversed(maps))[: self.blocks]):
            width = self.width // 2**i
            # At the coarsest level a map that already has the decoder's width is taken as it is.
            window = 0 if i == 0 and x.shape[-1] == width else (1 if i == 0 else 3)
            dense, parts = Densify(width, window, self.densify_norm, self.train, self.dtype, name=f"densify{i}")(x, visible)
            named |= {f"densify{i}_{name}": value for name, value in parts.items()}
            levels.append(dense)
        block = nn.remat(UNetBlock, prevent_cse=False) if self.remat else UNetBlock
        x = jnp.zeros_like(levels[0])
        for i in range(self.blocks):
            x = x + levels[i] if i < len(levels) else x
            x = block(max(self.width // 2 ** (i + 1), 1), self.train, self.dtype, name=f"block{i}")(x)
            named[f"decoder_block{i}"] = x
        head = nn.Conv(self.channels, (1, 1), kernel_init=truncated, dtype=self.dtype, name="head")
        pixels = at_least_float32(head(x))  # [B, H, W, channels]
        return pixels, named | {"rec_image": pixels}

    def flops(self, size: tuple[int, int], widths: Sequence[int]) -> float:
        """Matmul FLOPs (2 per multiply-add) for one image of `size` (H, W) and maps of `widths`, fine to coarse."""
        total = 0.0
        coarse = size[0] * size[1] / 4**self.blocks
        for i, inside in enumerate(tuple(reversed(tuple(widths)))[: self.blocks]):
            width = self.width // 2**i
            taps = 0 if i == 0 and inside == width else (1 if i == 0 else 9)
            total += coarse * 4**i * taps * inside * width
        for i in range(self.blocks):
            width, area = max(self.width // 2**i, 1), coarse * 4**i
            outputs = max(self.width // 2 ** (i + 1), 1)
            # The transposed convolution multiplies each input by its 16 taps.
            total += 16 * width**2 * area + 4 * area * 9 * width * (width + outputs)
        return 2.0 * (total + size[0] * size[1] * max(self.width // 2**self.blocks, 1) * self.channels)


def doublings(reduction: int) -> int:
    """log2 of the encoder's reduction. Raises UserError where it is no power of two."""
    blocks = round(math.log2(reduction))
    if 2**blocks != reduction:
        raise UserError(f"the encoder reduces by {reduction}, which is no power of two: no UNet leads back to the pixels")
    return blocks
