"""Images as sequences of patches."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maskae.errors import UserError


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of the patch grid. Raises UserError where the patches do not tile the image."""
    if height % patch_size or width % patch_size:
        raise UserError(f"patch size {patch_size} does not divide an image of {height} x {width} pixels")
    return height // patch_size, width // patch_size


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """[B, H, W, C] -> [B, N, p*p*C]: patches in raster order, the values of a patch ordered (row, column, channel)."""
    batch, height, width, channels = images.shape
    rows, columns = patch_grid(height, width, patch_size)
    x = images.reshape(batch, rows, patch_size, columns, patch_size, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)  # [B, rows, columns, p, p, C]
    return x.reshape(batch, rows * columns, patch_size * patch_size * channels)  # [B, N, p*p*C]


def unpatchify(patches: jax.Array, grid: tuple[int, int], patch_size: int) -> jax.Array:
    """[B, N, p*p*C] -> [B, H, W, C], the inverse of `patchify` on a grid of (rows, columns) patches."""
    batch, _, values = patches.shape
    rows, columns = grid
    channels = values // patch_size**2
    x = patches.reshape(batch, rows, columns, patch_size, patch_size, channels)
    x = jnp.transpose(x, (0, 1, 3, 2, 4, 5))  # [B, rows, p, columns, p, C]
    return x.reshape(batch, rows * patch_size, columns * patch_size, channels)  # [B, H, W, C]
