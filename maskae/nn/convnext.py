"""ConvNeXt as a pyramid of maps (Liu et al. 2022, arXiv 2201.03545), dense or on visible cells only (SparK, arXiv 2301.03580).

Names: `downsample{0..3}/{conv,norm}`, `stage{0..}_block{0..}/{depthwise,norm,expand,project,gamma}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.nn.layers import LayerNorm, drop_path, gelu
from maskae.nn.resnet import Pyramid
from maskae.nn.sharding import constrain
from maskae.nn.sparse_conv import masked

SIZES: dict[str, dict[str, Any]] = {
    "convnext_tiny": {"layers": (3, 3, 9, 3), "channels": (96, 192, 384, 768)},
    "convnext_small": {"layers": (3, 3, 27, 3), "channels": (96, 192, 384, 768)},
    "convnext_base": {"layers": (3, 3, 27, 3), "channels": (128, 256, 512, 1024)},
    "convnext_large": {"layers": (3, 3, 27, 3), "channels": (192, 384, 768, 1536)},
}

truncated = nn.initializers.truncated_normal(0.02)


class ConvNeXtBlock(nn.Module):
    """7x7 depth-wise convolution, layer norm, 4x expansion with GELU, layer scale, residual. The mask is applied once at its end too."""

    layer_scale: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, visible: jax.Array | None = None, drop: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]. `drop`: the rate and the uniform draws [B] of stochastic depth."""
        channels = x.shape[-1]
        padding = ((3, 3), (3, 3))
        depthwise = nn.Conv(
            channels, (7, 7), padding=padding, feature_group_count=channels, kernel_init=truncated, dtype=self.dtype, name="depthwise"
        )
        y = masked(depthwise(x), visible)
        y = masked(LayerNorm(1e-6, self.dtype, name="norm")(y), visible)
        y = gelu(nn.Dense(4 * channels, kernel_init=truncated, dtype=self.dtype, name="expand")(y))  # [B, H, W, 4C]
        y = nn.Dense(channels, kernel_init=truncated, dtype=self.dtype, name="project")(y)  # [B, H, W, C]
        if self.layer_scale > 0:
            y = y * self.param("gamma", nn.initializers.constant(self.layer_scale), (channels,)).astype(y.dtype)
        y = masked(y, visible)
        if drop is not None:
            y = drop_path(y.reshape(y.shape[0], -1, channels), *drop).reshape(y.shape)
        return constrain(x + y, "batch")


class ConvNeXt(nn.Module):
    """The network up to its last map. Arguments as for `maskae.nn.resnet.ResNet`; it has no batch statistics.

    `layer_scale` is the value at the start (0: none).
    """

    layers: Sequence[int] = (3, 3, 9, 3)
    channels: Sequence[int] = (96, 192, 384, 768)
    layer_scale: float = 1e-6
    drop_path: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each map, fine to coarse."""
        return tuple(self.channels)[: len(self.layers)]

    @property
    def reductions(self) -> tuple[int, ...]:
        """Pixels per position of each map, fine to coarse."""
        return tuple(4 * 2**stage for stage in range(len(self.layers)))

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool,
        visible: jax.Array | None = None,
        drop_draws: jax.Array | None = None,
        collect: bool = False,
    ) -> Pyramid:
        """[B, H, W, C] -> the pyramid; see `maskae.nn.resnet.ResNet`."""
        named: dict[str, jax.Array] = {}
        x = masked(images.astype(self.dtype), visible)
        block = nn.remat(ConvNeXtBlock, prevent_cse=False) if self.remat else ConvNeXtBlock
        maps, index, depth = [], 0, sum(self.layers)
        for stage, (count, channels) in enumerate(zip(self.layers, self.channels, strict=False)):
            x = Downsample(channels, 4 if stage == 0 else 2, stage == 0, self.dtype, name=f"downsample{stage}")(x, visible)
            named |= {"stem": x} if stage == 0 else {}
            for number in range(count):
                drop = None
                if train and self.drop_path and drop_draws is not None:
                    drop = (jnp.float32(self.drop_path * index / max(depth - 1, 1)), drop_draws[index])
                x = block(self.layer_scale, self.dtype, name=f"stage{stage}_block{number}")(x, visible, drop)
                named[f"stage{stage}_block{number}"] = x
                index += 1
            maps.append(x)
        return Pyramid(tuple(maps), named if collect else {})

    def flops(self, size: tuple[int, int], channels: int = 3) -> float:
        """Matmul FLOPs (2 per multiply-add) of one forward pass over one image of `size` (H, W)."""
        total, inside = 0.0, channels
        for stage, (count, width) in enumerate(zip(self.layers, self.channels, strict=False)):
            area = (size[0] // self.reductions[stage]) * (size[1] // self.reductions[stage])
            total += area * width * inside * (16 if stage == 0 else 4)
            total += count * area * (49 * width + 8 * width**2)
            inside = width
        return 2.0 * total


class Downsample(nn.Module):
    """A strided convolution without overlap, with the layer norm after it (the stem) or before it."""

    channels: int
    stride: int
    norm_after: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, visible: jax.Array | None) -> jax.Array:
        """[B, H, W, C] -> [B, H/stride, W/stride, channels]."""
        norm = LayerNorm(1e-6, self.dtype, name="norm")
        window = (self.stride, self.stride)
        conv = nn.Conv(self.channels, window, window, padding="VALID", kernel_init=truncated, dtype=self.dtype, name="conv")
        if self.norm_after:
            return masked(norm(masked(conv(x), visible)), visible)
        return masked(conv(masked(norm(x), visible)), visible)
