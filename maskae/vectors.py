"""Arithmetic of vectors that layers, losses and systems share, with gradients that are never NaN: lengths of 1, norms, maxima."""

from __future__ import annotations

import jax
import jax.numpy as jnp

SMALLEST_NORM = 1e-12


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in float32, or in float64 where it is that already (reference computations)."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def unit(x: jax.Array, axis: int = -1) -> jax.Array:
    """At least float32, of x's shape and of length 1 along the axis; a zero vector stays zero, with gradient zero."""
    wide = at_least_float32(x)
    square = jnp.square(wide).sum(axis, keepdims=True)
    # The root of 0 has an infinite slope, and infinity times 0 is NaN: no root is taken there.
    positive = square > 0
    length = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
    return wide / jnp.maximum(length, SMALLEST_NORM)


def standardise(x: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """[..., D] -> at least float32 [..., D] of mean 0 and mean square 1 (less by epsilon / variance) along the last axis."""
    wide = at_least_float32(x)
    centred = wide - wide.mean(-1, keepdims=True)
    # The two-pass variance: E[x^2] - E[x]^2 loses the digits that parity needs.
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)


def maximum_over(x: jax.Array, axis: int) -> jax.Array:
    """The maximum along an axis, which goes away; its gradient goes to the first of the largest entries, as in PyTorch.

    The gradient of `jnp.max` looks for the entries that equal the maximum. Where a compiler computes `x` anew for that search, and rounds
    differently, it finds none and divides by their number.
    """
    axis %= x.ndim
    first = jnp.argmax(jax.lax.stop_gradient(x), axis, keepdims=True)
    chosen = jax.lax.broadcasted_iota(first.dtype, x.shape, axis) == first
    return jnp.where(chosen, x, 0).sum(axis)
