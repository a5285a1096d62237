"""Sampling and grouping of points: against slow loops, the reference case, and the rules for ties and padding."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from maskae.errors import UserError
from maskae.nn.points import farthest_point_sampling, group_points, nearest_neighbours

sample = jax.jit(farthest_point_sampling, static_argnums=1)
neighbours = jax.jit(nearest_neighbours, static_argnums=2)
group = jax.jit(group_points, static_argnums=(1, 2))


def clouds(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def slow_sampling(points: np.ndarray, count: int) -> list[int]:
    """One set [N, D] by the definition, in float64: the farthest of the points left, the lowest index of equals."""
    points = points.astype(np.float64)
    picks = [0]
    while len(picks) < count:
        left = [i for i in range(len(points)) if i not in picks]
        distance = [min(np.square(points[i] - points[j]).sum() for j in picks) for i in left]
        picks.append(left[int(np.argmax(distance))])
    return picks


def test_sampling_follows_the_definition_with_and_without_padding():
    points = clouds(0, 3, 20, 3)
    picks = sample(points, 9)
    assert picks.dtype == jnp.int32
    np.testing.assert_array_equal(picks, [slow_sampling(cloud, 9) for cloud in points])
    valid = np.random.default_rng(1).random((3, 20)) < 0.7
    valid[0, 0] = False  # the start moves to the first valid point
    expected = [np.nonzero(mask)[0][slow_sampling(cloud[mask], 9)] for cloud, mask in zip(points, valid, strict=True)]
    filled = np.where(valid[..., None], points, np.nan)
    np.testing.assert_array_equal(sample(filled, 9, valid), expected)


def test_sampling_takes_cube_corners_before_the_centre_and_all_points_once():
    corners = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), -1).reshape(8, 3)
    cube = np.concatenate([corners[:4], np.zeros((1, 3)), corners[4:]])[None].astype(np.float32)
    picks = sample(cube, 9)[0]
    assert picks[8] == 4 and sorted(picks.tolist()) == list(range(9))


def test_sampling_with_ties_duplicates_and_too_few_valid_points():
    line = np.float32([[[0], [1], [-1], [1], [0]]])
    assert sample(line, 5)[0].tolist() == [0, 1, 2, 3, 4]
    valid = np.array([[False, True, False, True, False]])
    assert sample(line, 5, valid)[0].tolist() == [1, 3, 1, 1, 1]
    assert sample(line, 2, np.zeros((1, 5), bool))[0].tolist() == [0, 0]


def test_sampling_ignores_rigid_motion_and_follows_a_permutation():
    points = clouds(3, 1, 30, 3)
    rotation = np.linalg.qr(clouds(4, 3, 3))[0]
    picks = np.asarray(sample(points, 10))
    np.testing.assert_array_equal(sample(points @ rotation + 0.5, 10), picks)
    order = np.concatenate([[0], 1 + np.random.default_rng(5).permutation(29)])
    np.testing.assert_array_equal(order[np.asarray(sample(points[:, order], 10))], picks)


def test_neighbours_are_the_nearest_valid_points_in_order():
    points, centres = clouds(6, 2, 15, 3), clouds(7, 2, 4, 3)
    valid = np.random.default_rng(8).random((2, 15)) < 0.7
    distance = np.square(centres[:, :, None].astype(np.float64) - points[:, None]).sum(-1)
    np.testing.assert_array_equal(neighbours(centres, points, 15), np.argsort(distance, -1, kind="stable"))
    distance = np.where(valid[:, None], distance, np.inf)
    padded = np.where(valid[..., None], points, np.nan)
    found = neighbours(centres, padded, 5, valid)
    np.testing.assert_array_equal(found, np.argsort(distance, -1, kind="stable")[..., :5])
    scarce = np.arange(15)[None].repeat(2, 0) == 9
    assert (np.asarray(neighbours(centres, points, 3, scarce)) == 9).all()


def test_neighbours_far_from_the_origin_keep_their_order_and_ties_go_to_the_lowest_index():
    points = np.float32([[[1000.0, 0], [1000.001, 0], [999.9995, 0], [1000.001, 0]]])
    assert neighbours(points[:, :1], points, 4)[0, 0].tolist() == [0, 2, 1, 3]


def test_groups_start_at_their_centre_and_pass_gradients_to_coordinates():
    points = clouds(9, 2, 16, 3)
    groups = group(points, 5, 4)
    assert groups.offsets.shape == (2, 5, 4, 3) and (np.asarray(groups.offsets[:, :, 0]) == 0).all()
    gathered = np.stack([cloud[member] for cloud, member in zip(points, np.asarray(groups.members), strict=True)])
    np.testing.assert_array_equal(groups.offsets, gathered - np.asarray(groups.centres)[:, :, None])
    weight = clouds(10, 2, 5, 4, 3)
    gradient = jax.grad(lambda cloud: (group(cloud, 5, 4).offsets * weight).sum())(points)
    expected = np.zeros((2, 16, 3))
    for b, g, m in np.ndindex(2, 5, 4):
        expected[b, groups.members[b, g, m]] += weight[b, g, m]
        expected[b, groups.members[b, g, 0]] -= weight[b, g, m]
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("call", [lambda x: sample(x, 7), lambda x: sample(x[0], 2)])
def test_counts_and_shapes_that_do_not_fit_are_named(call):
    with pytest.raises(UserError, match="points"):
        call(clouds(11, 2, 6, 3))
    with pytest.raises(UserError, match="valid"):
        neighbours(clouds(12, 2, 1, 3), clouds(11, 2, 6, 3), 2, np.ones((2, 5), bool))


def test_groups_equal_the_reference_case(shared: Path):
    stored = load_file(shared / "goldens" / "point_cmae" / "a" / "outputs.safetensors")
    groups = group(stored["pts_aug"], 64, 32)
    np.testing.assert_array_equal(sample(stored["pts_aug"], 64), stored["fps_idx"])
    np.testing.assert_array_equal(groups.members, stored["knn_idx"])
    np.testing.assert_array_equal(groups.centres, stored["center"])
    np.testing.assert_allclose(groups.offsets[:1], stored["neighborhood"], rtol=0, atol=3e-7)  # differences of rounded coordinates
