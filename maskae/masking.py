"""Maskers: a noise value per patch decides which patches are kept, so that every masker yields the same exact counts and index triple.

A masker is a function that draws the noise; `random_mask` turns noise into indices. Draws depend on the key and on each example's position
in the global batch alone, never on devices or hosts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maskae.errors import UserError


class Mask(NamedTuple):
    """`keep_indices` int32 [B, n] in shuffled order; `mask` float32 [B, L], 1 = removed; `restore` int32 [B, L]: raster to shuffled."""

    keep_indices: jax.Array
    mask: jax.Array
    restore: jax.Array


def keep_count(length: int, mask_ratio: float) -> int:
    """Number of kept patches, int(L * (1 - ratio)) in Python floats as in the released code: 196 patches at 0.7 keep 58, not 59."""
    return int(length * (1 - mask_ratio))


def random_mask(noise: jax.Array, keep: int) -> Mask:
    """Keep the `keep` patches of smallest noise (He et al. 2022, section 3; released code).

    Args:
        noise: float32 [B, L].
        keep: 1..L, static.

    Raises:
        UserError: where `keep` is out of range.
    """
    if not 1 <= keep <= noise.shape[1]:
        raise UserError(f"cannot keep {keep} of {noise.shape[1]} patches")
    shuffle = jnp.argsort(noise, axis=1)  # [B, L]
    restore = jnp.argsort(shuffle, axis=1)  # [B, L]
    return Mask(shuffle[:, :keep], (restore >= keep).astype(jnp.float32), restore)


def take_tokens(tokens: jax.Array, indices: jax.Array) -> jax.Array:
    """Select tokens [B, L, D] by int32 [B, n] -> [B, n, D]."""
    return jnp.take_along_axis(tokens, indices[:, :, None], axis=1)


def restore_tokens(kept: jax.Array, mask_token: jax.Array, restore: jax.Array) -> jax.Array:
    """Put kept tokens [B, n, D] back in their places among mask tokens [1, 1, D]: `restore` int32 [B, L] -> [B, L, D]."""
    batch, count, width = kept.shape
    removed = jnp.broadcast_to(mask_token, (batch, restore.shape[1] - count, width))
    return take_tokens(jnp.concatenate([kept, removed], axis=1), restore)


def draw_noise(key: jax.Array, example: jax.Array, length: int) -> jax.Array:
    """Uniform float32 [B, length], row i from `fold_in(key, example[i])`. `example` int32 [B]: the positions in the global batch."""
    return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (length,)))(example)


def grid_noise(example: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The regular mask of the MAE ablation: smallest noise at every second row and column, so that a quarter is kept in place. [B, L]."""
    rows, columns = grid
    row, column = jnp.divmod(jnp.arange(rows * columns), columns)
    noise = ((row % 2) + (column % 2) > 0).astype(jnp.float32)
    return jnp.broadcast_to(noise, (example.shape[0], rows * columns))


def block_noise(key: jax.Array, example: jax.Array, grid: tuple[int, int], blocks: int = 16, min_area: int = 16) -> jax.Array:
    """Block-wise masks (Bao et al. 2021, section 2.3; MAE's ablation) with an exact count and static shapes.

    Draws `blocks` rectangles, area uniform from `min_area` patches (at most a sixteenth of the grid) to 0.4 of the grid, log-uniform aspect
    in [0.3, 1/0.3]. Patches covered by earlier rectangles are removed first, those of one rectangle in random order, uncovered ones last.

    Returns:
        float32 [B, L]: larger = removed earlier.
    """
    rows, columns = grid
    length = rows * columns
    smallest = float(min(min_area, max(1, length // 16)))
    row, column = jnp.divmod(jnp.arange(length), columns)

    def draw(i: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.fold_in(key, i), 5)
        area = jax.random.uniform(keys[0], (blocks, 1), minval=smallest, maxval=max(smallest, 0.4 * length))
        aspect = jnp.exp(jax.random.uniform(keys[1], (blocks, 1), minval=math.log(0.3), maxval=-math.log(0.3)))
        height = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 1, rows)
        width = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 1, columns)
        top = jnp.floor(jax.random.uniform(keys[2], (blocks, 1)) * (rows - height + 1))
        left = jnp.floor(jax.random.uniform(keys[3], (blocks, 1)) * (columns - width + 1))
        covered = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)  # [blocks, L]
        first = jnp.where(covered.any(0), covered.argmax(0), blocks)
        return blocks - first + jax.random.uniform(keys[4], (length,))

    return jax.vmap(draw)(example)
