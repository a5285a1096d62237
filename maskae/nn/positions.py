"""Position tables: the fixed 2-D sine-cosine table of MAE and the resize of any table to another grid."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from maskae.errors import UserError


def sincos_1d(width: int, coordinates: np.ndarray) -> np.ndarray:
    """[N] coordinates -> float64 [N, width]: all sines, then all cosines, of c * 10000^(-i / (width/2))."""
    half = width // 2
    omega = 10000.0 ** (-np.arange(half, dtype=np.float64) / half)  # [width/2]
    angles = np.asarray(coordinates, np.float64)[:, None] * omega  # [N, width/2]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [N, width]


def sinusoid(width: int, length: int) -> np.ndarray:
    """The table of Vaswani et al. 2017 over token indices i: sines in even channels j, cosines in odd, of i / 10000^(2 floor(j/2) / width).

    float32 [length, width], computed in float64.
    """
    channel = np.arange(width)
    angles = np.arange(length, dtype=np.float64)[:, None] / 10000.0 ** (2 * (channel // 2) / width)  # [length, width]
    return np.where(channel % 2 == 0, np.sin(angles), np.cos(angles)).astype(np.float32)


def sincos_2d(width: int, grid: tuple[int, int], cls_token: bool = True) -> np.ndarray:
    """The fixed table of MAE (He et al. 2022, released code) for a grid of (rows, columns) patches in raster order.

    The first half of the channels encodes the COLUMN index and the second half the row index, the other way round than the names in the
    released code suggest; weights trained there need this order.

    Returns:
        float32 [(1 +) rows*columns, width], computed in float64. With `cls_token` the first row, of CLS, is zero.

    Raises:
        UserError: where `width` is not a multiple of 4.
    """
    if width % 4:
        raise UserError(f"a 2-D sine-cosine position table needs a width that is a multiple of 4, not {width}")
    rows, columns = grid
    row, column = np.divmod(np.arange(rows * columns), columns)
    table = np.concatenate([sincos_1d(width // 2, column), sincos_1d(width // 2, row)], axis=1)  # [N, width]
    if cls_token:
        table = np.concatenate([np.zeros((1, width)), table], axis=0)  # [1+N, width]
    return table.astype(np.float32)


def sincos_at(width: int, coordinates: jax.Array) -> jax.Array:
    """The rows of `sincos_2d` at any (row, column) coordinates [..., 2], float32 [..., width]. Raises UserError as it does."""
    if width % 4:
        raise UserError(f"a 2-D sine-cosine position table needs a width that is a multiple of 4, not {width}")
    quarter = width // 4
    omega = jnp.asarray(10000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter), jnp.float32)
    row, column = (coordinates[..., axis, None].astype(jnp.float32) * omega for axis in (0, 1))  # [..., width / 4]
    return jnp.concatenate([jnp.sin(column), jnp.cos(column), jnp.sin(row), jnp.cos(row)], axis=-1)  # [..., width]


def bicubic_matrix(source: int, target: int) -> np.ndarray:
    """float64 [target, source]: 1-D cubic interpolation with a = -0.75, half-pixel centres, clamped borders and no antialiasing.

    These are PyTorch's conventions. `jax.image.resize` renormalises the kernel at the border instead of repeating the last sample, and its
    "cubic" has a = -0.5 and smooths when it shrinks.
    """
    a = -0.75
    matrix = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        first = math.floor(centre) - 1
        for tap in range(first, first + 4):
            distance = abs(centre - tap)
            if distance <= 1:
                weight = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
            else:
                weight = a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
            matrix[i, min(max(tap, 0), source - 1)] += weight
    return matrix


def resize_positions(table: jax.Array, source: tuple[int, int], target: tuple[int, int], prefix: int = 1) -> jax.Array:
    """Resize a position table [1, prefix + N, D] from one (rows, columns) grid to another; the `prefix` rows (CLS) stay as they are.

    Raises:
        UserError: where the table does not belong to the `source` grid.
    """
    if table.shape[1] != prefix + source[0] * source[1]:
        raise UserError(f"a position table of {table.shape[1]} rows is not {prefix} + {source[0]} x {source[1]}")
    if source == target:
        return table
    rows = jnp.asarray(bicubic_matrix(source[0], target[0]), jnp.float32)
    columns = jnp.asarray(bicubic_matrix(source[1], target[1]), jnp.float32)
    patches = jnp.reshape(table[0, prefix:], (*source, -1))  # [rows, columns, D]
    high = jax.lax.Precision.HIGHEST  # a table is not worth TF32's three digits
    patches = jnp.einsum("rh,cw,hwd->rcd", rows, columns, patches, precision=high)
    patches = patches.reshape(1, target[0] * target[1], -1)  # [1, N', D]
    return jnp.concatenate([table[:, :prefix], patches], axis=1)  # [1, prefix+N', D]
