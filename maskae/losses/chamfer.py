"""Chamfer distance between point sets, in memory linear in the number of points."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from maskae.errors import UserError, nearest

VARIANTS = ("l1", "l2")


def chamfer_distance(
    prediction: jax.Array,
    target: jax.Array,
    *,
    variant: str = "l2",
    prediction_valid: jax.Array | None = None,
    target_valid: jax.Array | None = None,
    pairs: int = 2**20,
) -> jax.Array:
    """Chamfer distance (Fan et al. 2017, equation 1), with means over all points of all sets; scalar, at least float32.

    "l2": mean over predicted points of the squared distance to the nearest target, plus the same in the other direction (Point-MAE,
    equation 4). "l1": half the sum of the two means of the unsquared distances. The gradient flows through nearest pairs only, equally near
    points giving it to the lowest index; a pair that coincides has gradient zero in both variants.

    Args:
        prediction: [..., P, D] floats.
        target: [..., T, D] floats, same leading axes and D.
        variant: "l1" or "l2".
        prediction_valid: bool [..., P], False at padding.
        target_valid: bool [..., T], False at padding. A point whose opposite set has no valid point does not count.
        pairs: most pairs of points compared at once, static: what the search may hold besides arrays of the inputs' size.

    Raises:
        UserError: where the variant is unknown or shapes do not fit.
    """
    if variant not in VARIANTS:
        raise UserError(f"no Chamfer variant {variant!r}; there are {', '.join(VARIANTS)}{nearest(variant, VARIANTS)}")
    prediction, prediction_mask = _flat_sets(prediction, prediction_valid, "prediction")  # [S, P, D], [S, P]
    target, target_mask = _flat_sets(target, target_valid, "target")  # [S, T, D], [S, T]
    if prediction.shape[0] != target.shape[0]:
        raise UserError(f"{prediction.shape[0]} predicted sets do not fit {target.shape[0]} target sets")
    forward = _mean_to_nearest(prediction, prediction_mask, target, target_mask, variant, pairs)
    backward = _mean_to_nearest(target, target_mask, prediction, prediction_mask, variant, pairs)
    return forward + backward if variant == "l2" else (forward + backward) / 2


def nearest_points(queries: jax.Array, keys: jax.Array, valid: jax.Array, pairs: int = 2**20) -> jax.Array:
    """Index of the key nearest to each query, the lowest of equally near ones, without the matrix of distances.

    Args:
        queries: [S, P, D] floats.
        keys: [S, T, D] floats.
        valid: bool [S, T], False at keys to pass over. Where all are passed over the index is 0.
        pairs: most pairs compared at once, static.

    Returns:
        int32 [S, P].

    Raises:
        UserError: where the shapes do not fit or `pairs` is below 1.
    """
    if queries.ndim != 3 or keys.ndim != 3 or (queries.shape[0], queries.shape[2]) != (keys.shape[0], keys.shape[2]):
        raise UserError(f"queries of shape {queries.shape} do not fit keys of shape {keys.shape}; want [S, P, D] and [S, T, D]")
    if pairs < 1:
        raise UserError(f"pairs is {pairs}; it must be at least 1")
    key_block = min(keys.shape[1], math.isqrt(pairs))
    query_block = min(queries.shape[1], pairs // key_block)
    together = max(1, pairs // (key_block * query_block))

    def search(item: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return _search_set(*item, query_block, key_block)

    items = jax.lax.stop_gradient((jnp.asarray(queries), jnp.asarray(keys), jnp.asarray(valid, bool)))
    if together >= queries.shape[0]:
        return jax.vmap(lambda *item: search(item))(*items)
    return jax.lax.map(search, items, batch_size=together)


def _search_set(queries: jax.Array, keys: jax.Array, valid: jax.Array, query_block: int, key_block: int) -> jax.Array:
    """Nearest key of each query of one set [P, D] against [T, D], one tile of distances at a time -> int32 [P]."""
    count, width = queries.shape
    query_tiles = _pad(queries, query_block).reshape(-1, query_block, width)  # [p, query_block, D]
    key_tiles = _pad(keys, key_block).reshape(-1, key_block, width)  # [t, key_block, D]
    valid_tiles = _pad(valid, key_block).reshape(-1, key_block)  # [t, key_block]
    starts = jnp.arange(key_tiles.shape[0], dtype=jnp.int32) * key_block

    def search(tile: jax.Array) -> jax.Array:
        def compare(best: tuple[jax.Array, jax.Array], item: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, jax.Array], None]:
            key_tile, mask, start = item
            distances = jnp.square(tile[:, None] - key_tile[None]).sum(-1)  # [query_block, key_block]
            distances = jnp.where(mask, distances, jnp.inf)
            index = jnp.argmin(distances, axis=1).astype(jnp.int32)  # [query_block]
            value = distances.min(axis=1)
            # Strictly nearer: an equal distance in a later tile must not displace the lower index.
            nearer = value < best[0]
            return (jnp.where(nearer, value, best[0]), jnp.where(nearer, start + index, best[1])), None

        empty = jnp.full(query_block, jnp.inf, tile.dtype), jnp.zeros(query_block, jnp.int32)
        return jax.lax.scan(compare, empty, (key_tiles, valid_tiles, starts))[0][1]

    return jax.lax.map(search, query_tiles).reshape(-1)[:count]


def _mean_to_nearest(
    queries: jax.Array, query_mask: jax.Array, keys: jax.Array, key_mask: jax.Array, variant: str, pairs: int
) -> jax.Array:
    """Mean (squared or plain) distance from the counted queries [S, P, D] to their nearest keys [S, T, D]; scalar."""
    index = nearest_points(queries, keys, key_mask, pairs)  # [S, P]
    counted = query_mask & key_mask.any(axis=1, keepdims=True)  # [S, P]
    difference = queries - jnp.take_along_axis(keys, index[:, :, None], axis=1)  # [S, P, D]
    # Selected before squaring, so that padding of any value, NaN included, has neither value nor gradient.
    square = jnp.square(jnp.where(counted[:, :, None], difference, 0)).sum(-1)  # [S, P]
    if variant == "l1":
        # sqrt has an infinite slope at zero: coincident points take the constant branch on both sides of the root.
        apart = square > 0
        square = jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1)), 0)
    return square.sum() / jnp.maximum(counted.sum(), 1).astype(square.dtype)


def _pad(array: jax.Array, block: int) -> jax.Array:
    """Zeros (False) up to a multiple of `block` on axis 0."""
    return jnp.pad(array, [(0, -array.shape[0] % block)] + [(0, 0)] * (array.ndim - 1))


def _flat_sets(points: jax.Array, valid: jax.Array | None, name: str) -> tuple[jax.Array, jax.Array]:
    """Points [..., P, D] -> at least float32 [S, P, D], and their mask bool [S, P]."""
    if points.ndim < 2 or points.shape[-2] < 1:
        raise UserError(f"{name} has shape {points.shape}; want [..., P, D] with at least one point")
    if valid is not None and valid.shape != points.shape[:-1]:
        raise UserError(f"{name}_valid has shape {valid.shape}; the points need {points.shape[:-1]}")
    points = jnp.asarray(points, jnp.promote_types(points.dtype, jnp.float32))
    mask = jnp.ones(points.shape[:-1], bool) if valid is None else jnp.asarray(valid, bool)
    return points.reshape(-1, *points.shape[-2:]), mask.reshape(-1, points.shape[-2])
