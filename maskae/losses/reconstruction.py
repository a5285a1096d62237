"""Reconstruction losses on patches."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maskae.vectors import at_least_float32


def patch_statistics(patches: jax.Array, epsilon: float = 1e-6) -> tuple[jax.Array, jax.Array]:
    """Mean and sqrt(variance + epsilon) of each patch [..., V] -> two of at least float32 [..., 1].

    The variance is the unbiased one (divided by V - 1), as in the released MAE code; `jnp.var` divides by V.
    """
    patches = at_least_float32(patches)
    mean = patches.mean(-1, keepdims=True)
    variance = patches.var(-1, keepdims=True, ddof=1)
    return mean, jnp.sqrt(variance + epsilon)


def normalise_patches(patches: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Each patch [..., V] minus its mean, over its standard deviation: the target of MAE's `norm_pix_loss` (He et al. 2022, section 3)."""
    mean, deviation = patch_statistics(patches, epsilon)
    return (at_least_float32(patches) - mean) / deviation


def standardise(values: jax.Array, axis: int = -1, epsilon: float = 1e-6) -> jax.Array:
    """Values less their mean over `axis`, over their unbiased standard deviation + epsilon; at least float32.

    VideoMAE's and AudioMAE's target: epsilon stands OUTSIDE the root, unlike in `normalise_patches`.
    """
    values = at_least_float32(values)
    centred = values - values.mean(axis, keepdims=True)
    return centred / (jnp.sqrt(jnp.square(centred).sum(axis, keepdims=True) / (values.shape[axis] - 1)) + epsilon)


def masked_mean_squared_error(prediction: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Squared error averaged over a patch's values, then over the removed patches of the whole batch; at least a float32 scalar.

    Args:
        prediction: [B, L, V].
        target: [B, L, V].
        mask: [B, L], 1 = removed. Kept patches do not count.
    """
    error = jnp.square(at_least_float32(prediction) - at_least_float32(target)).mean(-1)  # [B, L]
    mask = mask.astype(jnp.float32)
    return (error * mask).sum() / mask.sum()


def scaled_cosine_error(prediction: jax.Array, target: jax.Array, exponent: float) -> jax.Array:
    """(1 - cos)^exponent of each row pair (GraphMAE, Hou et al., KDD 2022, equation 2); float32 [...] of [..., D] twice.

    Vectors are divided by max(norm, 1e-12) as in the released code: a row of zeros has cosine 0, error 1 and a slope of 1e12 along the
    other row. CiteSeer's isolated nodes are such predictions at the first step, and Adam's second moment remembers them.
    """

    def unit(rows: jax.Array) -> jax.Array:
        rows = at_least_float32(rows)
        squares = jnp.square(rows).sum(-1, keepdims=True)
        # The root of 0 has an infinite slope, and infinity times 0 is NaN: no root is taken there.
        usable = squares > 1e-24
        return jnp.where(usable, rows * jax.lax.rsqrt(jnp.where(usable, squares, 1.0)), rows * 1e12)

    # Rounding can push a cosine past 1, where a power that is not whole would be NaN.
    return jnp.maximum(1.0 - (unit(prediction) * unit(target)).sum(-1), 0.0) ** exponent
