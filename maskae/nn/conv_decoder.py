"""A convolutional decoder from a small feature map to an image: VQGAN's (Esser et al. 2021) without attention and codebook, as in Vec2Face.

Names: `conv_in`, `mid_block{0,1}`, `level{i}_block{j}`, `level{i}_upsample`, `norm_out`, `conv_out`; level 0 is the finest, and runs last.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.nn.sharding import constrain
from maskae.vectors import at_least_float32

GROUPS = 32


def group_norm(groups: int, epsilon: float, dtype: Any, name: str) -> nn.GroupNorm:
    """Group norm with the two-pass variance, statistics in at least float32."""
    return nn.GroupNorm(groups, epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


class ConvResidual(nn.Module):
    """norm, SiLU, 3x3, norm, SiLU, 3x3, and the shortcut; convolutions without bias.

    Where the width changes the released code's shortcut is a 1x1 convolution of the BRANCH, not of the input, which is lost: so it is here.
    """

    outputs: int
    groups: int = GROUPS
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, outputs]."""
        branch = x
        for number in (1, 2):
            branch = nn.silu(group_norm(self.groups, 1e-6, self.dtype, f"norm{number}")(branch))
            branch = nn.Conv(self.outputs, (3, 3), use_bias=False, dtype=self.dtype, name=f"conv{number}")(branch)
        if x.shape[-1] != self.outputs:
            x = nn.Conv(self.outputs, (1, 1), use_bias=False, dtype=self.dtype, name="shortcut")(branch)
        return constrain(x + branch, "batch")


class ConvDecoder(nn.Module):
    """Doubles the resolution between levels.

    Args:
        width: channels of a level are this times its multiplier.
        multipliers: fine to coarse; (1, 1, 2, 2, 4) for base, 112 pixels from 7 x 7.
        blocks: residual blocks of each level.
        channels: of the image.
        groups: of the norms; must divide every width.
        remat: compute every block anew in the backward pass.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    channels: int = 3
    groups: int = GROUPS
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """[B, h, w, C] -> at least float32 [B, h * 2^(levels-1), ..., channels], no output nonlinearity, and intermediate maps by name."""
        make = nn.remat(ConvResidual, prevent_cse=False) if self.remat else ConvResidual
        named: dict[str, jax.Array] = {}
        x = nn.Conv(self.width * self.multipliers[-1], (3, 3), dtype=self.dtype, name="conv_in")(x.astype(self.dtype))
        named["conv_in"] = x
        for number in (0, 1):
            x = make(x.shape[-1], self.groups, self.dtype, name=f"mid_block{number}")(x)
        named["mid"] = x
        for level in reversed(range(len(self.multipliers))):
            for number in range(self.blocks):
                x = make(self.width * self.multipliers[level], self.groups, self.dtype, name=f"level{level}_block{number}")(x)
            named.setdefault("first_level", x)
            if level:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = nn.Conv(x.shape[-1], (3, 3), dtype=self.dtype, name=f"level{level}_upsample")(x)  # [B, 2H, 2W, C]
        x = nn.silu(group_norm(self.groups, 1e-6, self.dtype, "norm_out")(x))
        return at_least_float32(nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv_out")(x)), named

    def flops(self, side: int, inputs: int) -> float:
        """Matmul FLOPs (2 per multiply-add) of one image from a map of `side` x `side` x `inputs`: 35.8e9 for base."""
        inside = self.width * self.multipliers[-1]
        area = float(side * side)
        total = area * 9 * (inputs * inside + 4 * inside**2)
        for level in reversed(range(len(self.multipliers))):
            outputs = self.width * self.multipliers[level]
            for _ in range(self.blocks):
                total += area * (9 * outputs * (inside + outputs) + (outputs**2 if inside != outputs else 0))
                inside = outputs
            if level:
                area *= 4
                total += area * 9 * inside**2
        return 2.0 * (total + area * 9 * inside * self.channels)
