"""Augmentations and samplings of point clouds on the device; draws depend on the key and on each example's global position alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maskae.nn.points import farthest_point_sampling

VERTICAL = 1  # the y axis, as in ShapeNet and ModelNet


def draw_scale_and_shift(
    key: jax.Array, example: jax.Array, scale: tuple[float, float], shift: float
) -> tuple[jax.Array, jax.Array]:
    """Per cloud and axis a factor from U[scale] and a translation from U[-shift, shift]; both float32 [B, 3]. `example` int32 [B]."""

    def draw(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale_key, shift_key = jax.random.split(jax.random.fold_in(key, i))
        factor = jax.random.uniform(scale_key, (3,), minval=scale[0], maxval=scale[1])
        return factor, jax.random.uniform(shift_key, (3,), minval=-shift, maxval=shift)

    return jax.vmap(draw)(example)


def scale_and_shift(points: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """Points [B, N, 3] times `scale` [B, 3] plus `shift` [B, 3]."""
    return points * scale[:, None] + shift[:, None]


def rotate(points: jax.Array, angle: jax.Array, axis: int = VERTICAL) -> jax.Array:
    """Points [B, N, 3] turned by `angle` [B] (radians, right-handed) about a coordinate axis, 0 to 2."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    cosine, sine = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = points[..., first], points[..., second]
    turned = points.at[..., first].set(cosine * a - sine * b)
    return turned.at[..., second].set(sine * a + cosine * b)


def random_rotation(points: jax.Array, example: jax.Array, key: jax.Array, axis: int = VERTICAL) -> jax.Array:
    """Points [B, N, 3], each cloud turned by its own uniform angle about a coordinate axis. `example` int32 [B]."""
    angle = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), maxval=2 * jnp.pi))(example)
    return rotate(points, angle, axis)


def random_subset(points: jax.Array, count: int, example: jax.Array, key: jax.Array) -> jax.Array:
    """`count` of the points [B, N, 3] of each cloud, in random order, without replacement -> [B, count, 3]."""

    def draw(i: jax.Array) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(key, i), points.shape[1])[:count]

    return jnp.take_along_axis(points, jax.vmap(draw)(example)[:, :, None], axis=1)


def spread_subset(points: jax.Array, count: int) -> jax.Array:
    """`count` of the points [B, N, 3] of each cloud by farthest point sampling -> [B, count, 3]."""
    return jnp.take_along_axis(points, farthest_point_sampling(points, count)[:, :, None], axis=1)
