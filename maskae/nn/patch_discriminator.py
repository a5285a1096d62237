"""Vec2Face's discriminator of image patches (arXiv 2409.02979, released code): parallel convolutions, strided stages, a map of logits."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.nn.conv_decoder import group_norm
from maskae.vectors import at_least_float32

TAPS = (3, 7, 15)
SLOPE = 0.1


class PatchDiscriminator(nn.Module):
    """`widths`: of the first layer and of every halving of the resolution after it. Names: `first_{taps}`, `stage{i}_{conv,norm,...}`.

    Args:
        widths: (64, 128, 256, 512) for base.
        groups: of the norms.
        window: taps of the last convolution, which has no padding.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512)
    groups: int = 8
    window: int = 4
    dtype: Any = jnp.float32

    @property
    def first_layer(self) -> tuple[tuple[int, int], ...]:
        """(width, taps) of the parallel convolutions: half of the channels, a quarter, and the rest."""
        whole = self.widths[0]
        return tuple(zip((whole // 2, whole // 4, whole - whole // 2 - whole // 4), TAPS, strict=True))

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> logits at least float32 [B, h, w, 1]: 11 x 11 for 112 pixels."""

        def activate(x: jax.Array) -> jax.Array:
            return nn.leaky_relu(x, SLOPE)

        x = images.astype(self.dtype)
        parts = [nn.Conv(share, (taps, taps), dtype=self.dtype, name=f"first_{taps}")(x) for share, taps in self.first_layer]
        x = activate(jnp.concatenate(parts, -1))
        for stage, width in enumerate(self.widths[1:], start=1):
            pad = ((1, 1), (1, 1))
            x = nn.Conv(width, (4, 4), (2, 2), padding=pad, dtype=self.dtype, name=f"stage{stage}_conv")(x)  # [B, H/2, W/2, width]
            x = activate(x)
            x = group_norm(self.groups, 1e-5, self.dtype, f"stage{stage}_norm")(x)
            branch = activate(group_norm(self.groups, 1e-5, self.dtype, f"stage{stage}_residual_norm")(x))
            x = x + nn.Conv(width, (3, 3), dtype=self.dtype, name=f"stage{stage}_residual_conv")(branch)
        x = activate(nn.Conv(x.shape[-1], (1, 1), dtype=self.dtype, name="logits_in")(x))
        return at_least_float32(nn.Conv(1, (self.window,) * 2, padding="VALID", dtype=self.dtype, name="logits_out")(x))

    def flops(self, side: int, channels: int) -> float:
        """Matmul FLOPs (2 per multiply-add) of one image of `side` pixels: 5.7e9 for base at 112."""
        total = float(side * side * channels * sum(share * taps**2 for share, taps in self.first_layer))
        inside = self.widths[0]
        for width in self.widths[1:]:
            side //= 2
            total += side * side * width * (16 * inside + 9 * width)
            inside = width
        return 2.0 * (total + side * side * inside**2 + (side - self.window + 1) ** 2 * self.window**2 * inside)
