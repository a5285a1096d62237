"""Chamfer distance against float64 loops, its gradients, its padding, and the memory it may hold."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from maskae.errors import UserError
from maskae.losses.chamfer import VARIANTS, chamfer_distance, nearest_points

chamfer = jax.jit(chamfer_distance, static_argnames=("variant", "pairs"))
search = jax.jit(nearest_points, static_argnums=3)


def sets(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def slow_direction(queries, keys, query_mask, key_mask, variant):
    """Mean distance to the nearest key and its gradients to queries and keys, point by point in float64."""
    total, count = 0.0, 0
    query_gradient, key_gradient = np.zeros(queries.shape), np.zeros(keys.shape)
    for s, p in np.argwhere(query_mask):
        candidates = np.nonzero(key_mask[s])[0]
        if not candidates.size:
            continue
        distance = np.square(queries[s, p] - keys[s, candidates]).sum(-1)
        nearest, square = candidates[np.argmin(distance)], distance.min()
        slope = 2.0 if variant == "l2" else (1 / np.sqrt(square) if square > 0 else 0.0)
        total, count = total + (square if variant == "l2" else np.sqrt(square)), count + 1
        query_gradient[s, p] += slope * (queries[s, p] - keys[s, nearest])
        key_gradient[s, nearest] -= slope * (queries[s, p] - keys[s, nearest])
    count = max(count, 1)
    return total / count, query_gradient / count, key_gradient / count


def slow_chamfer(prediction, target, prediction_mask, target_mask, variant):
    prediction, target = prediction.astype(np.float64), target.astype(np.float64)
    there = slow_direction(prediction, target, prediction_mask, target_mask, variant)
    back = slow_direction(target, prediction, target_mask, prediction_mask, variant)
    scale = 1.0 if variant == "l2" else 0.5
    return scale * (there[0] + back[0]), scale * (there[1] + back[2]), scale * (there[2] + back[1])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pairs", [12, 2**20])
def test_values_and_gradients_equal_the_loops_at_any_block(variant, pairs):
    prediction, target = sets(0, 3, 9, 3), sets(1, 3, 7, 3)
    target[0, 2] = prediction[0, 4]  # a pair that coincides
    target[1, 5] = target[1, 1]  # a duplicate: its lowest index gets the gradient
    masks = np.random.default_rng(2).random((3, 9)) < 0.7, np.random.default_rng(3).random((3, 7)) < 0.7
    masks[1][2] = False  # a set without targets does not count
    masks[1][1, [1, 5]] = masks[0][0, 4] = masks[1][0, 2] = True
    expected = slow_chamfer(prediction, target, *masks, variant)
    hidden = np.where(masks[0][..., None], prediction, np.nan), np.where(masks[1][..., None], target, np.nan)

    def loss(prediction, target):
        return chamfer(prediction, target, variant=variant, prediction_valid=masks[0], target_valid=masks[1], pairs=pairs)

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*hidden)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(gradients[0], expected[1], atol=1e-6)
    np.testing.assert_allclose(gradients[1], expected[2], atol=1e-6)


def test_known_values_symmetry_and_order():
    a, b = sets(4, 2, 8, 3), sets(5, 2, 8, 3)
    order = np.random.default_rng(6).permutation(8)
    assert float(chamfer(a, a[:, order])) == 0
    np.testing.assert_allclose(chamfer(a, b), chamfer(b[:, order], a), rtol=1e-6)
    assert float(chamfer(np.float32([[0, 0]]), np.float32([[3, 4]]))) == 50
    assert float(chamfer(np.float32([[0, 0]]), np.float32([[3, 4]]), variant="l1")) == 5
    shift = np.float32([0.1, -0.2, 0.05])
    assert float(chamfer(a, a + shift)) <= 2 * np.square(shift).sum() + 1e-6
    assert chamfer(jnp.asarray(a, jnp.bfloat16), b).dtype == jnp.float32


def test_sets_of_padding_alone_give_zero_and_finite_gradients():
    a, b = sets(7, 1, 4, 3), sets(8, 1, 4, 3)
    empty = np.zeros((1, 4), bool)
    for variant in VARIANTS:
        value, gradient = jax.value_and_grad(lambda a, v=variant: chamfer(a, b, variant=v, target_valid=empty))(a)
        assert float(value) == 0 and (np.asarray(gradient) == 0).all()


@pytest.mark.parametrize("pairs", [1, 6])
def test_equally_near_keys_go_to_the_lowest_index_across_blocks(pairs):
    keys = np.float32([[[5], [1], [-1], [1], [5]]])
    assert search(np.float32([[[0], [4.5]]]), keys, np.ones((1, 5), bool), pairs)[0].tolist() == [1, 0]


def test_the_matrix_of_distances_never_exists():
    cloud = jax.ShapeDtypeStruct((1, 16384, 3), jnp.float32)
    compiled = jax.jit(jax.grad(lambda a, b: chamfer(a, b, pairs=2**16))).lower(cloud, cloud).compile()
    # 16,384 x 16,384 float32 distances are 1 GiB; the tile is 256 KiB and everything else a few arrays of the points' size.
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 2**20


def test_bad_arguments_are_named():
    a = sets(9, 1, 4, 3)
    with pytest.raises(UserError, match="did you mean 'l2'"):
        chamfer(a, a, variant="l22")
    with pytest.raises(UserError, match="do not fit"):
        chamfer(a, np.concatenate([a, a]))
    with pytest.raises(UserError, match="target_valid"):
        chamfer(a, a, target_valid=np.ones((1, 3), bool))


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_equal_the_reference_case(shared: Path, variant):
    folder = shared / "goldens" / "point_cmae" / "a"
    inputs, stored = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    value, gradient = jax.value_and_grad(chamfer)(inputs["chamfer/p"], inputs["chamfer/t"], variant=variant)
    np.testing.assert_allclose(value, stored[f"chamfer/{variant}"], rtol=1e-5)
    expected = stored[f"chamfer/d{variant}_dp"]
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())
