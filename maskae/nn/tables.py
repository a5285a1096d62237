"""Transformers over the columns of a table row, alone and beside an image (TIP, Du et al. 2024, arXiv 2407.07582, sections 3.1 and 3.2).

A row is float32 [B, N]: the codes 0, 1, ... of its categorical columns first, then its continuous values. Row token 0 is the class token,
token 1 + j is column j. Parameters start as the released code's: linear maps and embeddings N(0, 0.02^2), biases 0.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.data.columns import Columns
from maskae.nn.flops import block_flops, linear_flops
from maskae.nn.layers import Attention, Block, CrossAttention, Dtype, LayerNorm, Mlp
from maskae.nn.sharding import constrain
from maskae.nn.stack import run_blocks
from maskae.nn.vit import Encoded

EPSILON = 1e-5
BLOCKED = -1e9  # added to the score of a key that must not be looked at

small = nn.initializers.normal(0.02)
token_init = nn.initializers.truncated_normal(0.02)


def blocked_keys(hidden: jax.Array) -> jax.Array:
    """The attention bias that lets no token but itself look at a hidden column: bool [B, N] -> float32 [B, 1, 1 + N, 1 + N]."""
    blocked = jnp.pad(hidden, ((0, 0), (1, 0)))  # [B, 1+N]
    others = ~jnp.eye(blocked.shape[1], dtype=bool)
    return jnp.where(blocked[:, None, :] & others, BLOCKED, 0.0)[:, None]  # [B, 1, 1+N, 1+N]


class TableEncoder(nn.Module):
    """Pre-norm transformer over a row's columns; no norm after the last block.

    A categorical cell is a row of one embedding `category` [values, D], a continuous one x * w + b with `number/{kernel, bias}` shared by
    all such columns; a hidden cell is `mask_token` whatever its value. `column` [1+N, D] is added, then comes `norm`.
    """

    columns: Columns
    width: int
    depth: int
    heads: int = 8
    mlp_ratio: float = 4.0
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declare parameters and submodules under the names that stored weights have."""
        if self.columns.values:
            self.category = self.param("category", small, (self.columns.values, self.width))
        if self.columns.continuous:
            self.number = nn.Dense(self.width, kernel_init=small, dtype=self.dtype)
        self.cls_token = self.param("cls_token", token_init, (1, 1, self.width))
        self.mask_token = self.param("mask_token", token_init, (1, 1, self.width))
        self.column = self.param("column", small, (1 + self.columns.count, self.width))
        self.norm = LayerNorm(EPSILON, self.dtype)
        options: dict[str, Any] = {"epsilon": EPSILON, "kernel_init": small, "dtype": self.dtype}
        self.blocks = [Block(self.heads, self.mlp_ratio, "none", **options, name=f"block_{i}") for i in range(self.depth)]

    def embed(self, table: jax.Array, hidden: jax.Array) -> jax.Array:
        """Rows [B, N], hidden bool [B, N] -> tokens [B, 1+N, D]."""
        parts = [self.category.astype(self.dtype)[self.columns.codes(table)]] if self.columns.values else []
        if self.columns.continuous:
            parts.append(self.number(table[:, self.columns.categorical :, None].astype(self.dtype)))
        cells = jnp.concatenate(parts, 1)  # [B, N, D]
        cells = jnp.where(hidden[..., None], self.mask_token.astype(self.dtype), cells)
        first = jnp.broadcast_to(self.cls_token.astype(self.dtype), (len(table), 1, self.width))
        tokens = jnp.concatenate([first, cells], 1) + self.column.astype(self.dtype)  # [B, 1+N, D]
        return self.norm(tokens)

    def __call__(self, table: jax.Array, hidden: jax.Array, collect: bool = False) -> Encoded:
        """Rows [B, N], hidden bool [B, N] -> tokens [B, 1+N, D], and with `collect` those of every block."""
        tokens = constrain(self.embed(table, hidden), "batch")
        x, blocks = run_blocks(self, self.blocks, tokens, beside=blocked_keys(hidden), collect=collect)
        return Encoded(x, blocks)

    def flops(self) -> float:
        """Matmul FLOPs of one forward pass over one row; the lookups of categories are none."""
        return self.depth * block_flops(1 + self.columns.count, self.width, self.mlp_ratio)


class FusionBlock(nn.Module):
    """x + attention(norm1(x)), then x + cross_attention(cross_norm(x), image tokens as they are), then x + mlp(norm2(x))."""

    heads: int
    mlp_ratio: float = 4.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, seen: jax.Array, drop: None = None) -> jax.Array:
        """[B, n, D] and the image's tokens [B, m, D] -> [B, n, D]."""
        x = constrain(x, "batch")
        options: dict[str, Any] = {"kernel_init": small, "dtype": self.dtype}
        branch = LayerNorm(EPSILON, self.dtype, name="norm1")(x)
        x = x + Attention(self.heads, "none", **options, name="attention")(branch)
        branch = LayerNorm(EPSILON, self.dtype, name="cross_norm")(x)
        x = x + CrossAttention(self.heads, key_value_bias=False, **options, name="cross_attention")(branch, seen)
        branch = LayerNorm(EPSILON, self.dtype, name="norm2")(x)
        return x + Mlp(int(x.shape[-1] * self.mlp_ratio), **options, name="mlp")(branch)


class FusionEncoder(nn.Module):
    """A row's tokens look at an image's; `image_embed` and `image_norm` bring the latter to the width of the former, once."""

    width: int
    depth: int
    heads: int = 8
    mlp_ratio: float = 4.0
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declare the submodules under the names that stored weights have."""
        self.image_embed = nn.Dense(self.width, kernel_init=small, dtype=self.dtype)
        self.image_norm = LayerNorm(EPSILON, self.dtype)
        self.blocks = [FusionBlock(self.heads, self.mlp_ratio, self.dtype, name=f"block_{i}") for i in range(self.depth)]
        self.norm = LayerNorm(EPSILON, self.dtype)

    def see(self, last_map: jax.Array) -> jax.Array:
        """An image encoder's last map [B, h, w, C] -> tokens [B, h*w, D]."""
        tokens = last_map.reshape(last_map.shape[0], -1, last_map.shape[-1])
        return self.image_norm(self.image_embed(tokens))

    def fuse(self, rows: jax.Array, seen: jax.Array, collect: bool = False) -> Encoded:
        """Row tokens [B, n, D], image tokens [B, m, D] -> tokens [B, n, D] after the last norm, and with `collect` every block's."""
        x, blocks = run_blocks(self, self.blocks, rows, beside=seen, collect=collect)
        return Encoded(self.norm(x), blocks)

    def __call__(self, rows: jax.Array, last_map: jax.Array) -> Encoded:
        """Row tokens [B, n, D] and a map [B, h, w, C] -> tokens [B, n, D]."""
        return self.fuse(rows, self.see(last_map))

    def flops(self, rows: int, seen: int) -> float:
        """Matmul FLOPs of `fuse` for one example of `rows` row tokens and `seen` image tokens."""
        cross = linear_flops(2 * rows + 2 * seen, self.width, self.width) + 4.0 * rows * seen * self.width
        return self.depth * (block_flops(rows, self.width, self.mlp_ratio) + cross)


class CellPredictor(nn.Module):
    """What a cell's value is: one map `category` for all categorical columns onto all their values, one `number` for all continuous."""

    columns: Columns
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens [B, 1+N, D] -> logits [B, categorical, values] and values [B, continuous]; the class token is not read."""
        cells, split = tokens[:, 1:], self.columns.categorical
        logits = jnp.zeros((len(cells), 0, 0), self.dtype)
        numbers = jnp.zeros((len(cells), 0), self.dtype)
        if self.columns.values:
            logits = nn.Dense(self.columns.values, kernel_init=small, dtype=self.dtype, name="category")(cells[:, :split])
        if self.columns.continuous:
            numbers = nn.Dense(1, kernel_init=small, dtype=self.dtype, name="number")(cells[:, split:])[..., 0]
        return logits, numbers
