"""The residual network of face recognition: ArcFace's improved ResNet (Deng et al., arXiv 1801.07698), norms before convolutions, PReLU."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.nn.batch_norm import BatchNorm
from maskae.vectors import at_least_float32

DEPTHS = {"r18": (2, 2, 2, 2), "r50": (3, 4, 14, 3), "r100": (3, 13, 30, 3)}


def prelu(module: nn.Module, x: jax.Array, name: str) -> jax.Array:
    """max(x, 0) + slope min(x, 0) with a slope per channel."""
    slope: jax.Array = module.param(name, nn.initializers.constant(0.25), (x.shape[-1],))
    return jnp.where(x >= 0, x, slope.astype(x.dtype) * x)


class FaceBlock(nn.Module):
    """norm1, conv1, norm2, PReLU, conv2 (strided), norm3, and the shortcut."""

    width: int
    stride: int
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H/stride, W/stride, width]."""

        def norm(name: str, x: jax.Array) -> jax.Array:
            return BatchNorm(dtype=self.dtype, name=name)(x, train=self.train)

        def conv(taps: int, stride: int, name: str, x: jax.Array) -> jax.Array:
            pad = ((taps // 2,) * 2,) * 2
            return nn.Conv(self.width, (taps, taps), (stride, stride), padding=pad, use_bias=False, dtype=self.dtype, name=name)(x)

        branch = norm("norm2", conv(3, 1, "conv1", norm("norm1", x)))
        branch = norm("norm3", conv(3, self.stride, "conv2", prelu(self, branch, "slope")))
        if self.stride != 1 or x.shape[-1] != self.width:
            x = norm("shortcut_norm", conv(1, self.stride, "shortcut", x))
        return x + branch


class FaceNetwork(nn.Module):
    """Images to identity vectors.

    Names: `conv`, `norm`, `slope`, `stage{1..}_block{0..}`, `norm_out`, `vector/{kernel,bias}`, `vector_norm`. The scale of the last norm
    stays 1 in training, so that a vector's elements have roughly unit variance; systems that train it must hold it.

    Args:
        layers: blocks of each stage; every stage halves the resolution.
        widths: of each stage; the stem has the first one's.
        features: length of the vector.
        train: batch statistics.
    """

    layers: tuple[int, ...] = DEPTHS["r100"]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    features: int = 512
    train: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """[B, H, W, C] in -1..1 -> vectors at least float32 [B, features], not of length 1, and the stages' maps, fine to coarse."""
        pad = ((1, 1), (1, 1))
        x = nn.Conv(self.widths[0], (3, 3), padding=pad, use_bias=False, dtype=self.dtype, name="conv")(images.astype(self.dtype))
        x = prelu(self, BatchNorm(dtype=self.dtype, name="norm")(x, train=self.train), "slope")
        maps = []
        for stage, (count, width) in enumerate(zip(self.layers, self.widths, strict=True), start=1):
            for number in range(count):
                x = FaceBlock(width, 2 if number == 0 else 1, self.train, self.dtype, name=f"stage{stage}_block{number}")(x)
            maps.append(x)
        x = BatchNorm(dtype=self.dtype, name="norm_out")(x, train=self.train)
        x = at_least_float32(x).reshape(len(x), -1)  # [B, h*w*C]
        x = nn.Dense(self.features, dtype=x.dtype, name="vector")(x)  # [B, features]
        return BatchNorm(dtype=x.dtype, name="vector_norm")(x, train=self.train), tuple(maps)

    def flops(self, side: int, channels: int) -> float:
        """Matmul FLOPs (2 per multiply-add) of one image of `side` pixels: 24.2e9 for R100 at 112."""
        inside = self.widths[0]
        total = float(side * side * 9 * channels * inside)
        for count, width in zip(self.layers, self.widths, strict=True):
            for number in range(count):
                after = -(-side // 2) if number == 0 else side
                total += 9 * (side**2 * inside * width + after**2 * width**2) + (after**2 * inside * width if number == 0 else 0)
                side, inside = after, width
        return 2.0 * (total + side**2 * inside * self.features)
