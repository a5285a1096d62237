"""The fixed table's layout and the resize, against numbers worked out by hand and against PyTorch's."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from maskae.errors import UserError
from maskae.nn.positions import bicubic_matrix, resize_positions, sincos_2d


def test_cls_row_is_zero_and_the_first_token_is_sin_0_cos_0() -> None:
    table = sincos_2d(16, (14, 14))
    assert table.shape == (197, 16)
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table[0], 0)
    np.testing.assert_array_equal(table[1], [0, 0, 0, 0, 1, 1, 1, 1] * 2)


def test_columns_are_in_the_first_half_and_rows_in_the_second() -> None:
    table = sincos_2d(64, (14, 14), cls_token=False)
    right, below = table[1] - table[0], table[14] - table[0]
    assert np.abs(right[:32]).max() > 0
    assert not right[32:].any()
    assert np.abs(below[32:]).max() > 0
    assert not below[:32].any()


def test_a_wide_grid_has_its_own_columns() -> None:
    table = sincos_2d(8, (2, 5), cls_token=False)
    np.testing.assert_allclose(table[5 + 3, [0, 1]], np.sin([3, 3 / 100]), rtol=1e-6)
    np.testing.assert_allclose(table[5 + 3, [6, 7]], np.cos([1, 1 / 100]), rtol=1e-6)


def test_width_must_divide_by_four() -> None:
    with pytest.raises(UserError, match="multiple of 4, not 30"):
        sincos_2d(30, (4, 4))


def test_cubic_weights_by_hand() -> None:
    # Doubling two samples: the first output lies at -0.25, taps at -2, -1, 0 (all clamped to sample 0) and 1, where the kernel with
    # a = -0.75 is w(1.75) = -0.03515625, w(0.75) = 0.26171875, w(0.25) = 0.87890625 and w(1.25) = -0.10546875.
    matrix = bicubic_matrix(2, 4)
    np.testing.assert_allclose(matrix[0], [1.10546875, -0.10546875], atol=1e-12)
    np.testing.assert_allclose(matrix[1], [-0.10546875 + 0.87890625 - 0.0, 0.26171875 - 0.03515625], atol=1e-12)
    np.testing.assert_allclose(matrix[::-1, ::-1], matrix, atol=1e-12)


@pytest.mark.parametrize(("source", "target"), [(8, 10), (14, 7), (5, 5), (3, 16)])
def test_cubic_weights_sum_to_one(source: int, target: int) -> None:
    np.testing.assert_allclose(bicubic_matrix(source, target).sum(1), 1.0, atol=1e-12)


def test_resize_leaves_cls_and_equal_grids_alone() -> None:
    table = jnp.asarray(np.random.default_rng(0).normal(size=(1, 17, 8)), jnp.float32)
    assert resize_positions(table, (4, 4), (4, 4)) is table
    resized = resize_positions(table, (4, 4), (6, 3))
    assert resized.shape == (1, 19, 8)
    np.testing.assert_array_equal(resized[:, 0], table[:, 0])


def test_resize_keeps_rows_and_columns_apart() -> None:
    ramp = np.broadcast_to(np.arange(4.0)[:, None, None], (4, 6, 2)).reshape(1, 24, 2)
    resized = np.asarray(resize_positions(jnp.asarray(ramp, jnp.float32), (4, 6), (8, 6), prefix=0)).reshape(8, 6, 2)
    assert np.ptp(resized, axis=1).max() < 1e-6
    assert (np.diff(resized[:, 0, 0]) > 0).all()


def test_resize_refuses_a_table_of_another_grid() -> None:
    with pytest.raises(UserError, match="17 rows is not 1 \\+ 3 x 5"):
        resize_positions(jnp.zeros((1, 17, 8)), (3, 5), (4, 4))


def test_resize_equals_pytorch(shared: Path) -> None:
    weights = load_file(shared / "goldens/mae/a/weights.safetensors")
    resized = resize_positions(jnp.asarray(weights["pos_embed"]), (8, 8), (10, 10))
    np.testing.assert_allclose(resized, weights["finetune.pos_embed"], atol=1e-6)
