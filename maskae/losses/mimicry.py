"""Distances between a student's features and a frozen teacher's, and the normalisations of the teacher's (MaskAlign, MR-MAE)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maskae.errors import UserError, nearest

TARGETS = ("none", "l2", "whiten", "batch")
DISTANCES = ("l2", "l1", "smooth_l1")


def whiten(features: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """Layer norm without parameters: [..., D] -> float32 [..., D] of mean 0 and mean square 1 (less by epsilon / variance)."""
    features = features.astype(jnp.float32)
    centred = features - features.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)


def normalise_features(features: jax.Array, how: str) -> jax.Array:
    """A teacher's features [B, N, D] as the target, float32 (MaskAlign, Xue et al. 2023, section 3.3 and released code).

    "none"; "l2": unit vectors; "whiten"; "batch": one mean and one unbiased deviation of the whole array, epsilon 1e-6, so that the target
    of an example depends on the others. Raises UserError for another name.
    """
    features = features.astype(jnp.float32)
    if how == "none":
        return features
    if how == "l2":
        return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    if how == "whiten":
        return whiten(features)
    if how == "batch":
        return (features - features.mean()) / jnp.sqrt(features.var(ddof=1) + 1e-6)
    raise UserError(f"unknown target '{how}'{nearest(how, TARGETS)}; there are {', '.join(TARGETS)}")


def feature_distance(prediction: jax.Array, target: jax.Array, kind: str) -> jax.Array:
    """Mean over all entries of two arrays of one shape, float32 scalar: "l2" d^2, "l1" |d|, "smooth_l1" twice Huber's of beta 1.

    The latter, d^2 where |d| < 1 and else 2 |d| - 1, is that of MaskAlign's code; its paper has half of it. Raises UserError for another
    name.
    """
    difference = jnp.abs(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    if kind == "l2":
        return jnp.square(difference).mean()
    if kind == "l1":
        return difference.mean()
    if kind == "smooth_l1":
        return jnp.where(difference < 1, jnp.square(difference), 2 * difference - 1).mean()
    raise UserError(f"unknown distance '{kind}'{nearest(kind, DISTANCES)}; there are {', '.join(DISTANCES)}")
