"""Distances between a student's features and a frozen teacher's, and the normalisations of the teacher's (MaskAlign, MR-MAE)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maskae.errors import check_choice
from maskae.vectors import standardise, unit

TARGETS = ("none", "l2", "whiten", "batch")
DISTANCES = ("l2", "l1", "smooth_l1")


def normalise_features(features: jax.Array, how: str) -> jax.Array:
    """A teacher's features [B, N, D] as the target, float32 (MaskAlign, Xue et al. 2023, section 3.3 and released code).

    "none"; "l2": unit vectors; "whiten"; "batch": one mean and one unbiased deviation of the whole array, epsilon 1e-6, so that the target
    of an example depends on the others. Raises UserError for another name.
    """
    check_choice("target", how, TARGETS)
    features = features.astype(jnp.float32)
    if how == "none":
        return features
    if how == "l2":
        return unit(features)
    if how == "whiten":
        return standardise(features)
    return (features - features.mean()) / jnp.sqrt(features.var(ddof=1) + 1e-6)


def feature_distance(prediction: jax.Array, target: jax.Array, kind: str) -> jax.Array:
    """Mean over all entries of two arrays of one shape, float32 scalar: "l2" d^2, "l1" |d|, "smooth_l1" twice Huber's of beta 1.

    The latter, d^2 where |d| < 1 and else 2 |d| - 1, is that of MaskAlign's code; its paper has half of it. Raises UserError for another
    name.
    """
    check_choice("distance", kind, DISTANCES)
    difference = jnp.abs(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    if kind == "l2":
        return jnp.square(difference).mean()
    if kind == "l1":
        return difference.mean()
    return jnp.where(difference < 1, jnp.square(difference), 2 * difference - 1).mean()
