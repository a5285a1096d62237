"""Point sets: farthest point sampling and groups of nearest neighbours, as used by the point-cloud autoencoders."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maskae.errors import UserError


class Groups(NamedTuple):
    """`centres` [B, G, D]; `offsets` [B, G, M, D]: members minus their centre; `members` int32 [B, G, M], nearest first."""

    centres: jax.Array
    offsets: jax.Array
    members: jax.Array


def farthest_point_sampling(points: jax.Array, count: int, valid: jax.Array | None = None) -> jax.Array:
    """Points picked one by one, each the farthest from those picked before (Eldar et al. 1997; Point-MAE, section 3.1).

    The first pick is the first valid point; equal distances go to the lowest index. No valid point is picked twice while another is left,
    duplicates included; past that the first valid point is repeated. No gradient flows through the choice.

    Args:
        points: [B, N, D] floats; distances are taken in float32 (float64 where given).
        count: picks per set, 1..N, static.
        valid: bool [B, N], False at padding. A set with no valid point yields zeros.

    Returns:
        int32 [B, count].

    Raises:
        UserError: where `count` is out of range or `valid` does not fit the points.
    """
    _check(points, count, valid)
    points = _comparable(points)
    real = jnp.ones(points.shape[:2], bool) if valid is None else jnp.asarray(valid, bool)
    points = jnp.where(real[:, :, None], points, 0)  # padding may hold NaN, which minimum would spread
    # Picked points sit at -1, below every distance, and padding below them, so that argmax needs no case for an exhausted set.
    distances = jnp.where(real, jnp.inf, -jnp.inf).astype(points.dtype)  # [B, N]
    rows = jnp.arange(points.shape[0])
    first = jnp.argmax(distances, axis=1)  # [B]

    def pick(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        distances, last = carry
        latest = jnp.square(points - points[rows, last][:, None]).sum(-1)  # [B, N]
        distances = jnp.minimum(distances, latest)
        taken = (jnp.arange(points.shape[1]) == last[:, None]) & real
        distances = jnp.where(taken, -1, distances)
        return (distances, jnp.argmax(distances, axis=1)), last

    _, picks = jax.lax.scan(pick, (distances, first), length=count)  # [count, B]
    return picks.T.astype(jnp.int32)


def nearest_neighbours(centres: jax.Array, points: jax.Array, count: int, valid: jax.Array | None = None) -> jax.Array:
    """The `count` points nearest to each centre, nearest first, equal distances by lowest index.

    Squared distances are summed from differences: the expansion |c|^2 - 2cp + |p|^2 can rank a centre behind its close neighbours.

    Args:
        centres: [B, G, D] floats.
        points: [B, N, D] floats.
        count: neighbours per centre, 1..N, static.
        valid: bool [B, N], False at padding. Where a set has fewer valid points than `count`, the nearest one fills up.

    Returns:
        int32 [B, G, count].

    Raises:
        UserError: where `count` is out of range or the shapes do not fit.
    """
    _check(points, count, valid)
    if centres.ndim != 3 or centres.shape[0] != points.shape[0] or centres.shape[2] != points.shape[2]:
        raise UserError(f"centres of shape {centres.shape} do not fit points of shape {points.shape}; want [B, G, D] and [B, N, D]")
    centres, points = _comparable(centres), _comparable(points)
    distances = jnp.square(centres[:, :, None] - points[:, None]).sum(-1)  # [B, G, N]
    if valid is not None:
        distances = jnp.where(jnp.asarray(valid, bool)[:, None], distances, jnp.inf)
    negative, members = jax.lax.top_k(-distances, count)  # [B, G, count]
    return jnp.where(jnp.isneginf(negative), members[..., :1], members).astype(jnp.int32)


def group_points(points: jax.Array, groups: int, size: int, valid: jax.Array | None = None) -> Groups:
    """Patches of a point cloud: sampled centres and their neighbours relative to them, not rescaled (Point-MAE, section 3.1).

    Gradients flow to the coordinates of centres and members, not through the choice of them.

    Args:
        points: [B, N, D] floats.
        groups: number of centres G, 1..N.
        size: members per group M, 1..N, the centre itself first.
        valid: bool [B, N], False at padding.

    Raises:
        UserError: where a count is out of range or `valid` does not fit the points.
    """
    points = jnp.asarray(points)
    picks = farthest_point_sampling(points, groups, valid)  # [B, G]
    centres = jnp.take_along_axis(points, picks[:, :, None], axis=1)  # [B, G, D]
    members = nearest_neighbours(centres, points, size, valid)  # [B, G, M]
    neighbourhoods = jax.vmap(lambda cloud, chosen: cloud[chosen])(points, members)  # [B, G, M, D]
    return Groups(centres, neighbourhoods - centres[:, :, None], members)


def _comparable(points: jax.Array) -> jax.Array:
    """Coordinates without gradient, in at least float32: bfloat16 distances would tie."""
    return jax.lax.stop_gradient(jnp.asarray(points, jnp.promote_types(points.dtype, jnp.float32)))


def _check(points: jax.Array, count: int, valid: jax.Array | None) -> None:
    if points.ndim != 3:
        raise UserError(f"points have shape {points.shape}; want [B, N, D]")
    if not 1 <= count <= points.shape[1]:
        raise UserError(f"cannot choose {count} of {points.shape[1]} points")
    if valid is not None and valid.shape != points.shape[:2]:
        raise UserError(f"valid has shape {valid.shape}; the points need {points.shape[:2]}")
