"""Patch order and its inverse."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.nn.patches import patch_grid, patchify, unpatchify


def test_order_is_raster_and_within_a_patch_row_column_channel() -> None:
    images = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = np.asarray(patchify(jnp.asarray(images), 2))
    assert patches.shape == (2, 6, 12)
    for index, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        block = images[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_array_equal(patches[:, index], block.reshape(2, -1))


@pytest.mark.parametrize(("height", "width", "channels"), [(8, 8, 1), (4, 12, 3), (16, 8, 5)])
def test_unpatchify_is_the_inverse(height: int, width: int, channels: int) -> None:
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, height, width, channels)))
    grid = patch_grid(height, width, 4)
    np.testing.assert_array_equal(unpatchify(patchify(images, 4), grid, 4), images)


def test_patches_that_do_not_tile_are_refused() -> None:
    with pytest.raises(UserError, match="patch size 16 does not divide an image of 224 x 230"):
        patch_grid(224, 230, 16)
