"""Attention biases from distance: ALiBi on a grid of patches, within one sensor and across two (CROMA, Fuller et al. 2023, section 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def alibi_slopes(heads: int) -> np.ndarray:
    """The slopes of ALiBi (Press et al. 2022, section 3), float32 [heads], steepest first.

    2^(-8i/heads) for i = 1.. where `heads` is a power of two; else those of the power below, then every second one of the power above.
    """
    if heads & (heads - 1) == 0:
        return (2.0 ** (-8.0 / heads * np.arange(1, heads + 1))).astype(np.float32)
    below = 1 << (heads.bit_length() - 1)
    return np.concatenate([alibi_slopes(below), alibi_slopes(2 * below)[::2]])[:heads]


def patch_coordinates(grid: tuple[int, int]) -> np.ndarray:
    """(row, column) of every patch in raster order, in units of patches; float32 [rows*columns, 2]."""
    rows, columns = grid
    return np.stack(np.divmod(np.arange(rows * columns), columns), axis=1).astype(np.float32)


def take_positions(grid: tuple[int, int], indices: jax.Array) -> jax.Array:
    """Where the patches `indices` int32 [B, n] lie; float32 [B, n, 2]."""
    return jnp.asarray(patch_coordinates(grid))[indices]


def distance_bias(query_positions: jax.Array, key_positions: jax.Array, slopes: jax.Array) -> jax.Array:
    """-slope * Euclidean distance, to be added to scaled scores; the plain twin of what the attention kernels form on the way.

    Args:
        query_positions, key_positions: float32 [B, n, C], [B, m, C]; constants, no gradient.
        slopes: float32 [heads].

    Returns:
        float32 [B, heads, n, m].
    """
    difference = query_positions[:, :, None] - key_positions[:, None]  # [B, n, m, C]
    distance = jnp.sqrt(jax.lax.stop_gradient(jnp.square(difference).sum(-1)))  # [B, n, m]
    return -slopes[None, :, None, None] * distance[:, None]
