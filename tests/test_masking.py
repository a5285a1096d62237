"""Masks have exact counts, exact inverses, and draws that belong to an example and not to its place in a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.masking import block_noise, draw_noise, grid_noise, keep_count, random_mask, restore_tokens, take_tokens


@pytest.mark.parametrize(
    ("length", "ratio", "keep"), [(196, 0.75, 49), (196, 0.7, 58), (256, 0.75, 64), (100, 0.9, 9), (20, 0.8, 3), (10, 0.9, 0)]
)
def test_kept_count_is_floored_in_floats_as_in_the_released_code(length: int, ratio: float, keep: int) -> None:
    assert keep_count(length, ratio) == keep


def test_mask_counts_and_inverse_are_exact() -> None:
    noise = draw_noise(jax.random.key(0), jnp.arange(5), 196)
    keep, mask, restore = random_mask(noise, 49)
    assert keep.shape == (5, 49)
    np.testing.assert_array_equal(mask.sum(-1), 147)
    tokens = jax.random.normal(jax.random.key(1), (5, 196, 3))
    shuffled = take_tokens(tokens, jnp.argsort(noise, axis=1))
    np.testing.assert_array_equal(take_tokens(shuffled, restore), tokens)
    kept_positions = np.zeros((5, 196))
    np.put_along_axis(kept_positions, np.asarray(keep), 1.0, axis=1)
    np.testing.assert_array_equal(mask, 1 - kept_positions)


def test_kept_tokens_return_to_their_places_and_mask_tokens_fill_the_rest() -> None:
    keep, mask, restore = random_mask(draw_noise(jax.random.key(0), jnp.arange(2), 12), 4)
    tokens = jax.random.normal(jax.random.key(1), (2, 12, 3))
    filled = restore_tokens(take_tokens(tokens, keep), jnp.full((1, 1, 3), 7.0), restore)
    np.testing.assert_array_equal(filled, np.where(np.asarray(mask)[:, :, None] > 0, 7.0, tokens))


def test_order_of_kept_tokens_is_that_of_the_noise() -> None:
    noise = jnp.asarray([[0.9, 0.1, 0.5, 0.3]])
    keep, mask, restore = random_mask(noise, 2)
    assert keep.tolist() == [[1, 3]]
    assert mask.tolist() == [[1, 0, 1, 0]]
    assert restore.tolist() == [[3, 0, 2, 1]]


def test_every_position_is_kept_equally_often() -> None:
    noise = draw_noise(jax.random.key(3), jnp.arange(10_000), 196)
    frequency = 1 - random_mask(noise, 49).mask.mean(0)
    assert frequency.shape == (196,)
    assert float(jnp.abs(frequency - 0.25).max()) < 0.02


def test_draws_follow_the_example_and_the_key() -> None:
    all_rows = draw_noise(jax.random.key(0), jnp.arange(8), 16)
    some = draw_noise(jax.random.key(0), jnp.asarray([5, 2]), 16)
    np.testing.assert_array_equal(some, all_rows[jnp.asarray([5, 2])])
    assert not np.array_equal(all_rows, draw_noise(jax.random.key(1), jnp.arange(8), 16))
    assert len(np.unique(np.asarray(all_rows), axis=0)) == 8


def test_grid_keeps_the_top_left_of_every_two_by_two() -> None:
    mask = random_mask(grid_noise(jnp.arange(2), (4, 6)), 6).mask.reshape(2, 4, 6)
    expected = np.ones((4, 6))
    expected[::2, ::2] = 0
    np.testing.assert_array_equal(mask, [expected, expected])


def test_blocks_have_exact_counts_and_are_more_compact_than_random_masks() -> None:
    def neighbours_removed_together(noise: jax.Array) -> float:
        mask = np.asarray(random_mask(noise, 98).mask).reshape(-1, 14, 14)
        np.testing.assert_array_equal(mask.sum((1, 2)), 98)
        return float((mask[:, :, 1:] * mask[:, :, :-1]).sum() / mask[:, :, 1:].sum())

    blocks = block_noise(jax.random.key(0), jnp.arange(32), (14, 14))
    random = draw_noise(jax.random.key(0), jnp.arange(32), 196)
    assert neighbours_removed_together(blocks) > 0.75
    assert neighbours_removed_together(random) < 0.6
    np.testing.assert_array_equal(blocks[7:8], block_noise(jax.random.key(0), jnp.asarray([7]), (14, 14)))


@pytest.mark.parametrize("keep", [0, 17])
def test_impossible_counts_are_refused(keep: int) -> None:
    with pytest.raises(UserError, match=f"cannot keep {keep} of 16"):
        random_mask(jnp.zeros((1, 16)), keep)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ways_to_move_tokens_agree_exactly(dtype: str) -> None:
    keep, _, restore = random_mask(draw_noise(jax.random.key(0), jnp.arange(3), 20), 7)
    tokens, weights = jax.random.normal(jax.random.key(1), (2, 3, 20, 5), dtype)
    token = jnp.full((1, 1, 5), 0.3, dtype)

    def moved(tokens: jax.Array, token: jax.Array, implementation: str) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        kept = take_tokens(tokens, keep, implementation)
        filled = restore_tokens(kept, token, restore, implementation)
        return (filled * weights).astype(jnp.float32).sum() + (kept * 3).astype(jnp.float32).sum(), (kept, filled)

    run = jax.jit(jax.value_and_grad(moved, (0, 1), has_aux=True), static_argnums=2)
    (_, values), (to_tokens, to_token) = run(tokens, token, "gather")
    assert np.count_nonzero(np.asarray(to_tokens).any(-1)) == 3 * 7
    for implementation in ("one_hot", "auto"):
        (_, others), (to_others, to_other) = run(tokens, token, implementation)
        for one, other in zip(values, others, strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(to_tokens, to_others)
        # A sum over all removed places, whose order is the compiler's.
        tolerance = 1e-5 if dtype == "float32" else 5e-2
        np.testing.assert_allclose(np.asarray(to_token, float), np.asarray(to_other, float), rtol=tolerance, atol=1e-5)


def test_the_move_is_chosen_for_the_device_that_the_program_is_for() -> None:
    indices = jnp.zeros((2, 3), jnp.int32)

    def products(platform: str, length: int) -> int:
        traced = jax.jit(take_tokens).trace(jax.ShapeDtypeStruct((2, length, 4), jnp.float32), indices)
        return traced.lower(lowering_platforms=(platform,)).as_text().count("dot_general")

    assert products("tpu", 8) == 1
    assert products("cpu", 8) == products("cuda", 8) == 0
    assert products("tpu", 2**20) == 0
    with pytest.raises(UserError, match="unknown token move 'onehot' .did you mean 'one_hot'"):
        take_tokens(jnp.zeros((2, 3, 4)), indices, "onehot")
