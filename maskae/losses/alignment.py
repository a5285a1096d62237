"""How far apart two sets of features lie: the 2-Wasserstein distance of the Gaussians fitted to them.

GM-DF, Lai et al., arXiv 2406.20078, equation 14; the distance is that of Dowson and Landau 1982. Means and covariances are those of the
whole global batch, whatever devices its rows lie on.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maskae.errors import check_choice

ALIGNMENTS = ("full", "diagonal", "none")
SMALLEST = 1e-12


class Gaussian(NamedTuple):
    """`mean` [D] and `covariance` [D, D], float32."""

    mean: jax.Array
    covariance: jax.Array


def fit_gaussian(features: jax.Array, shrinkage: float = 0.1) -> Gaussian:
    """Mean and covariance of [N, D] (divided by N), the latter (1 - s) S + s tr(S)/D I: fewer rows than D leave it without full rank."""
    features = features.astype(jnp.float32)
    mean = features.mean(0)
    centred = features - mean
    covariance = jnp.einsum("nd,ne->de", centred, centred, precision=jax.lax.Precision.HIGHEST) / len(features)
    width = features.shape[1]
    covariance = (1 - shrinkage) * covariance + shrinkage * jnp.trace(covariance) / width * jnp.eye(width)
    return Gaussian(mean, covariance)


def symmetric_root(matrix: jax.Array) -> jax.Array:
    """The symmetric square root of a positive semidefinite [D, D]; not differentiable where eigenvalues are equal."""
    values, vectors = jnp.linalg.eigh(matrix)
    return (vectors * jnp.sqrt(jnp.maximum(values, 0.0))) @ vectors.T


@jax.custom_vjp
def trace_of_root(first: jax.Array, second: jax.Array) -> jax.Array:
    """tr((A^1/2 B A^1/2)^1/2) of two positive definite matrices [D, D]; differentiable also where they have equal eigenvalues."""
    root = symmetric_root(first)
    return jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(root @ second @ root), 0.0)).sum()


def _by_second(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The value, and its derivative by the second matrix: R (R B R)^-1/2 R / 2 with R = A^1/2. The derivative of eigenvectors, which is
    # infinite where eigenvalues are equal (as shrunk covariances of few rows have them), does not occur in it.
    root = symmetric_root(first)
    values, vectors = jnp.linalg.eigh(root @ second @ root)
    roots = jnp.sqrt(jnp.maximum(values, SMALLEST**2))
    carried = root @ vectors
    return roots.sum(), 0.5 * (carried / roots) @ carried.T


def _forward(first: jax.Array, second: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    value, by_second = _by_second(first, second)
    return value, (_by_second(second, first)[1], by_second)


def _backward(kept: tuple[jax.Array, jax.Array], d_value: jax.Array) -> tuple[jax.Array, jax.Array]:
    by_first, by_second = kept
    return d_value * by_first, d_value * by_second


trace_of_root.defvjp(_forward, _backward)


def gaussian_wasserstein(first: Gaussian, second: Gaussian, kind: str = "full") -> jax.Array:
    """The squared 2-Wasserstein distance of two Gaussians, float32 scalar.

    "full" is |m - n|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2); "diagonal" takes each covariance's diagonal alone, |m - n|^2 +
    sum (sqrt a - sqrt b)^2; "none" is 0. Raises UserError for another kind.
    """
    check_choice("alignment", kind, ALIGNMENTS)
    if kind == "none":
        return jnp.zeros(())
    apart = jnp.square(first.mean - second.mean).sum()
    if kind == "diagonal":
        deviations = [jnp.sqrt(jnp.maximum(jnp.diagonal(each.covariance), SMALLEST)) for each in (first, second)]
        return apart + jnp.square(deviations[0] - deviations[1]).sum()
    traces = jnp.trace(first.covariance) + jnp.trace(second.covariance)
    return apart + traces - 2 * trace_of_root(first.covariance, second.covariance)
