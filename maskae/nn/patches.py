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


def tubelets(video: jax.Array, patch_size: int, frames: int) -> jax.Array:
    """[B, T, H, W, C] -> [B, N, frames*p*p*C]: boxes of `frames` frames, time first, then raster order, values ordered (frame, row, column,
    channel). Raises UserError where they do not tile the video.
    """
    batch, length, height, width, channels = video.shape
    if length % frames:
        raise UserError(f"tubelets of {frames} frames do not tile a video of {length}")
    rows, columns = patch_grid(height, width, patch_size)
    x = video.reshape(batch, length // frames, frames, rows, patch_size, columns, patch_size, channels)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)  # [B, T/frames, rows, columns, frames, p, p, C]
    return x.reshape(batch, -1, frames * patch_size**2 * channels)  # [B, N, frames*p*p*C]


def untubelet(values: jax.Array, grid: tuple[int, int, int], patch_size: int, frames: int) -> jax.Array:
    """[B, N, frames*p*p*C] -> [B, T, H, W, C], the inverse of `tubelets` on a grid of (time, rows, columns)."""
    slots, rows, columns = grid
    x = values.reshape(len(values), slots, rows, columns, frames, patch_size, patch_size, -1)
    x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)  # [B, T/frames, frames, rows, p, columns, p, C]
    return x.reshape(len(values), slots * frames, rows * patch_size, columns * patch_size, -1)  # [B, T, H, W, C]


def difference_frames(video: jax.Array, group: int) -> jax.Array:
    """[B, T, H, W, C] in which every frame of `group` consecutive ones but the first is less that first; `group` divides T."""
    groups = video.reshape(len(video), -1, group, *video.shape[2:])
    return jnp.concatenate([groups[:, :, :1], groups[:, :, 1:] - groups[:, :, :1]], 2).reshape(video.shape)


def frames_to_channels(video: jax.Array, frames: int) -> jax.Array:
    """[B, T, H, W, C] -> [B*T/frames, H, W, frames*C]: a patch embedding of these images is one of tubelets."""
    batch, length, height, width, channels = video.shape
    x = video.reshape(batch, length // frames, frames, height, width, channels)
    return x.transpose(0, 1, 3, 4, 2, 5).reshape(batch * length // frames, height, width, frames * channels)
