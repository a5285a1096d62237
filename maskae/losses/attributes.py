"""Attributes of images by which a vector can be moved: functions (images [B, H, W, C] in -1..1, their identity vectors [B, D]) -> [B]."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

Attribute = Callable[[jax.Array, jax.Array], jax.Array]
WEIGHT = 100.0


def cosine(one: jax.Array, other: jax.Array) -> jax.Array:
    """Cosine of each pair of vectors, [B, D] twice -> [B]."""
    lengths = jnp.linalg.norm(one, axis=-1) * jnp.linalg.norm(other, axis=-1)
    return (one * other).sum(-1) / jnp.maximum(lengths, 1e-8)


def slant(images: jax.Array, vectors: jax.Array) -> jax.Array:
    """How far the bright parts lean to the right, [B]: the covariance of their rows (upwards) and columns over the rows' variance.

    The stand-in for a head's yaw.
    """
    ink = jax.nn.relu(images.mean(-1) + 1) + 1e-3  # [B, H, W]
    ink = ink / ink.sum((1, 2), keepdims=True)
    up, right = -jnp.linspace(-1.0, 1.0, ink.shape[1])[:, None], jnp.linspace(-1.0, 1.0, ink.shape[2])[None]
    centred = [axis - (ink * axis).sum((1, 2), keepdims=True) for axis in (up, right)]
    return (ink * centred[0] * centred[1]).sum((1, 2)) / (ink * jnp.square(centred[0])).sum((1, 2))


def brightness(images: jax.Array, vectors: jax.Array) -> jax.Array:
    """The mean pixel, [B]."""
    return images.mean((1, 2, 3))


def quality(images: jax.Array, vectors: jax.Array) -> jax.Array:
    """The length of the image's identity vector, [B]: the stand-in for a quality network (MagFace)."""
    return jnp.linalg.norm(vectors, axis=-1)


ATTRIBUTES: dict[str, Attribute] = {"slant": slant, "brightness": brightness, "quality": quality}


def edit_error(images: jax.Array, seen: jax.Array, vectors: jax.Array, goals: Mapping[str, jax.Array]) -> jax.Array:
    """What AttrOP of Vec2Face (arXiv 2409.02979) descends, [B].

    100 times what the images' identities `seen` [B, D] lost of their cosine to the `vectors` [B, D] they came from, plus each attribute's
    distance to its goal [B], quality's only where it is below. Distances but quality's count 100 times: they are no degrees, as a yaw's.
    """
    error = WEIGHT * (1 - cosine(seen, vectors))
    for name, goal in goals.items():
        gap = goal - ATTRIBUTES[name](images, seen)
        error = error + (jax.nn.relu(gap) if name == "quality" else WEIGHT * jnp.abs(gap))
    return error
