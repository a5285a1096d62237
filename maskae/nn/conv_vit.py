"""The masked-convolution backbone: two stages of convolution blocks, then transformer blocks without CLS (ConvMAE, arXiv 2205.03892).

Strided convolutions never reach across a patch of the last stage, and the depth-wise ones see removed patches as zeros, so that what is
kept does not depend on what is removed.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.masking import Mask, take_tokens
from maskae.nn.flops import block_flops, linear_flops
from maskae.nn.heads import linear_init
from maskae.nn.layers import Block, DropPath, Dtype, LayerNorm, drop_path, gelu, uniform_fan_in, xavier
from maskae.nn.patches import patch_grid
from maskae.nn.positions import sincos_2d
from maskae.nn.sharding import constrain
from maskae.nn.stack import drop_path_rates, run_blocks

CONV_EPSILON = 1e-5
KERNEL = 5


def matrix_xavier(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Xavier-uniform of a convolution kernel [h, w, in, out] as the matrix that it is on patches."""
    return xavier(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)


def pointwise(inputs: int, outputs: int, dtype: Dtype, name: str) -> nn.Dense:
    """A 1 x 1 convolution with a framework's default start."""
    return nn.Dense(outputs, kernel_init=linear_init, bias_init=uniform_fan_in(inputs), dtype=dtype, name=name)


class Downsample(nn.Module):
    """A strided convolution without overlap, `conv`; with `norm`, layer norm and GELU behind it."""

    outputs: int
    stride: int
    with_norm: bool = True
    kernel_init: Any = linear_init
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H/stride, W/stride, outputs]."""
        window = (self.stride, self.stride)
        bias_init = uniform_fan_in(self.stride**2 * x.shape[-1])
        options: dict[str, Any] = {"kernel_init": self.kernel_init, "bias_init": bias_init, "dtype": self.dtype}
        x = nn.Conv(self.outputs, window, window, padding="VALID", name="conv", **options)(x)
        return gelu(LayerNorm(CONV_EPSILON, self.dtype, name="norm")(x)) if self.with_norm else x


class MaskedConvBlock(nn.Module):
    """x + conv2(depthwise(keep * conv1(norm1(x)))), then x + fc2(gelu(fc1(norm2(x)))); the depth-wise kernel is 5 x 5."""

    mlp_ratio: float = 4.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, visible: jax.Array | None = None, drop: DropPath | None = None) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]; `visible` [B, H, W, 1] is 1 where a pixel is kept."""
        x = constrain(x, "batch")
        channels = x.shape[-1]
        y = pointwise(channels, channels, self.dtype, "conv1")(LayerNorm(CONV_EPSILON, self.dtype, name="norm1")(x))
        y = y if visible is None else y * visible.astype(y.dtype)
        y = nn.Conv(
            channels,
            (KERNEL, KERNEL),
            feature_group_count=channels,
            kernel_init=linear_init,
            bias_init=uniform_fan_in(KERNEL**2),
            dtype=self.dtype,
            name="depthwise",
        )(y)
        x = x + _dropped(pointwise(channels, channels, self.dtype, "conv2")(y), drop, 0)
        hidden = int(channels * self.mlp_ratio)
        y = LayerNorm(CONV_EPSILON, self.dtype, name="norm2")(x)
        y = gelu(pointwise(channels, hidden, self.dtype, "fc1")(y))  # [B, H, W, hidden]
        return x + _dropped(pointwise(hidden, channels, self.dtype, "fc2")(y), drop, 1)


def _dropped(branch: jax.Array, drop: DropPath | None, which: int) -> jax.Array:
    if drop is None:
        return branch
    flat = branch.reshape(branch.shape[0], -1, branch.shape[-1])
    return drop_path(flat, drop.rate, drop.draws[which]).reshape(branch.shape)


class ConvStem(nn.Module):
    """The two convolutional stages and the step to patch tokens. Parameters: embed1..3, proj, stage{1,2}_block_{i}."""

    widths: tuple[int, int]
    depths: tuple[int, int]
    mlp_ratios: tuple[float, float]
    strides: tuple[int, int, int]
    outputs: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, visible: jax.Array | None = None, drop: DropPath | None = None) -> dict[str, jax.Array]:
        """[B, H, W, C] -> `embed1`, `stage1` and `stage2` (maps after each stage), `tokens` [B, N, D] in raster order.

        `visible` [B, rows, columns, 1] on the grid of tokens; `drop`: rates and draws of all convolution blocks.
        """
        x, named, index = images.astype(self.dtype), {}, 0
        for stage, (width, depth, ratio) in enumerate(zip(self.widths, self.depths, self.mlp_ratios, strict=True), start=1):
            x = Downsample(width, self.strides[stage - 1], dtype=self.dtype, name=f"embed{stage}")(x)
            named[f"embed{stage}"] = x
            cell = math.prod(self.strides[stage:])
            shown = None if visible is None else visible.repeat(cell, 1).repeat(cell, 2)
            for number in range(depth):
                own = None if drop is None else DropPath(drop.rate[index], drop.draws[index])
                x = MaskedConvBlock(ratio, self.dtype, name=f"stage{stage}_block_{number}")(x, shown, own)
                index += 1
            named[f"stage{stage}"] = x
        x = Downsample(self.outputs, self.strides[2], kernel_init=matrix_xavier, dtype=self.dtype, name="embed3")(x)
        x = x.reshape(x.shape[0], -1, self.outputs)  # [B, N, D]
        return named | {"tokens": nn.Dense(self.outputs, kernel_init=xavier, dtype=self.dtype, name="proj")(x)}


class MaskedConvViT(nn.Module):
    """Convolutional stages, positions, transformer blocks on kept patches, and the stages' maps added before the final norm.

    Args:
        grid: rows and columns of tokens.
        trainable_position: the table [1, N, D] is a parameter `position`, for images of `grid` alone; else the fixed sine-cosine one.
        fuse: `fusion1` and `fusion2` bring the stages' maps to the tokens; pre-training alone has them.
        drop_path: rate at the last block of all, rising linearly from 0 at the first convolution block.
    """

    widths: tuple[int, int]
    depths: tuple[int, int]
    mlp_ratios: tuple[float, float]
    strides: tuple[int, int, int]
    width: int
    depth: int
    heads: int
    grid: tuple[int, int]
    mlp_ratio: float = 4.0
    trainable_position: bool = False
    fuse: bool = True
    final_norm: bool = True
    drop_path: float = 0.0
    attention: str = "xla"
    scan: bool = False
    remat: str = "none"
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declare the submodules under the names that stored weights have."""
        self.patch_embed = ConvStem(self.widths, self.depths, self.mlp_ratios, self.strides, self.width, self.dtype)
        if self.fuse:
            self.fusion1 = Downsample(self.width, math.prod(self.strides[1:]), with_norm=False, dtype=self.dtype)
            self.fusion2 = Downsample(self.width, self.strides[2], with_norm=False, dtype=self.dtype)
        if self.trainable_position:
            self.position = self.param("position", lambda _: jnp.asarray(sincos_2d(self.width, self.grid, cls_token=False))[None])
        options: dict[str, Any] = {"attention": self.attention, "dtype": self.dtype}
        self.blocks = [Block(self.heads, self.mlp_ratio, name=f"block_{i}", **options) for i in range(self.depth)]
        if self.final_norm:
            self.norm = LayerNorm(dtype=self.dtype)

    @property
    def total_depth(self) -> int:
        """Blocks of both kinds."""
        return sum(self.depths) + self.depth

    def __call__(
        self, images: jax.Array, mask: Mask | None = None, draws: jax.Array | None = None, collect: bool = False
    ) -> dict[str, Any]:
        """[B, H, W, C] -> by name: `latent` [B, n, D], the patches that `mask` keeps in its order (None: all, in raster order), and on the
        way there `embed1`, `stage1`, `stage2`, `tokens` [B, N, D] without positions, `x_masked` [B, n, D] with them, `y1` and `y2` where
        maps are fused, and with `collect` `blocks`. `draws`: uniform float32 [total_depth, 2, B] for drop path.
        """
        grid = patch_grid(images.shape[1], images.shape[2], math.prod(self.strides))
        early = late = None
        if draws is not None and self.drop_path:
            rates, cut = drop_path_rates(self.drop_path, self.total_depth), sum(self.depths)
            early, late = DropPath(rates[:cut], draws[:cut]), DropPath(rates[cut:], draws[cut:])
        visible = None if mask is None else (1 - mask.mask).reshape(-1, *grid, 1)
        named: dict[str, Any] = self.patch_embed(images, visible, early)
        table = self.position if self.trainable_position else jnp.asarray(sincos_2d(self.width, grid, cls_token=False))[None]
        x = named["x_masked"] = self._kept(named["tokens"] + table.astype(self.dtype), mask)  # [B, n, D]
        x, blocks = run_blocks(self, self.blocks, x, drop=late, scan=self.scan, remat=self.remat, collect=collect)
        if self.fuse:
            named["y1"], named["y2"] = self.fusion1(named["stage1"]), self.fusion2(named["stage2"])  # [B, rows, columns, D]
            for name in ("y1", "y2"):
                x = x + self._kept(named[name].reshape(named[name].shape[0], -1, self.width), mask)
        named["latent"] = self.norm(x) if self.final_norm else x
        return named | ({"blocks": blocks} if collect else {})

    @staticmethod
    def _kept(tokens: jax.Array, mask: Mask | None) -> jax.Array:
        return constrain(tokens if mask is None else take_tokens(tokens, mask.keep_indices), "batch")

    def flops(self, grid: tuple[int, int], kept: int, channels: int) -> float:
        """Matmul FLOPs (2 per multiply-add) of one image; the convolutional stages compute removed patches too."""
        patches, inside, total = grid[0] * grid[1], channels, 0.0
        for stage, (width, depth, ratio) in enumerate(zip(self.widths, self.depths, self.mlp_ratios, strict=True), start=1):
            area = patches * math.prod(self.strides[stage:]) ** 2
            total += linear_flops(area, self.strides[stage - 1] ** 2 * inside, width)
            total += depth * area * 2.0 * ((2 + 2 * ratio) * width**2 + KERNEL**2 * width)
            if self.fuse:
                total += linear_flops(patches, math.prod(self.strides[stage:]) ** 2 * width, self.width)
            inside = width
        total += linear_flops(patches, self.strides[2] ** 2 * inside, self.width) + linear_flops(patches, self.width, self.width)
        return total + self.depth * block_flops(kept, self.width, self.mlp_ratio)
