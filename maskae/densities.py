"""Densities with closed forms: Gaussian mixtures, their score and Hessian, and the best denoiser of samples from them.

What a denoiser learns is known exactly here (Alain and Bengio, "What Regularized Auto-Encoders Learn from the Data-Generating
Distribution", JMLR 15, 2014, theorem 1): `r(x) = x + sigma^2 grad log p_sigma(x)` with p_sigma the density convolved with N(0, sigma^2 I).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SPIRAL_STEP, SPIRAL_TURN = 0.1, (3.0, 12.0)  # radius per radian, and the range of the angle
SPIRAL_DEVIATION, CURVE_DEVIATION = 0.05, 0.1
CURVE_COMPONENTS = 256


class Mixture(NamedTuple):
    """Of K Gaussians in d dimensions: `weights` [K] that sum to 1, `means` [K, d], `covariances` [K, d, d]."""

    weights: Any
    means: Any
    covariances: Any


def _parts(mixture: Mixture, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Joint log density with every component [..., K], the components' scores [..., K, d], their precisions [K, d, d]."""
    x = jnp.asarray(x)
    weights, means, covariances = (jnp.asarray(part, x.dtype) for part in mixture)
    precisions = jnp.linalg.inv(covariances)
    centred = x[..., None, :] - means  # [..., K, d]
    scores = -jnp.einsum("kij,...kj->...ki", precisions, centred)  # [..., K, d]
    constants = jnp.log(weights) - 0.5 * (jnp.linalg.slogdet(covariances)[1] + x.shape[-1] * jnp.log(2 * jnp.pi))
    return constants + 0.5 * (scores * centred).sum(-1), scores, precisions


@jax.jit
def log_density(mixture: Mixture, x: jax.Array) -> jax.Array:
    """log p of points [..., d] -> [...], in their precision."""
    return jax.nn.logsumexp(_parts(mixture, x)[0], axis=-1)


@jax.jit
def score(mixture: Mixture, x: jax.Array) -> jax.Array:
    """Gradient of log p, [..., d] -> [..., d]."""
    joint, scores, _ = _parts(mixture, x)
    return jnp.einsum("...k,...ki->...i", jax.nn.softmax(joint, axis=-1), scores)


@jax.jit
def hessian(mixture: Mixture, x: jax.Array) -> jax.Array:
    """Second derivatives of log p, [..., d] -> [..., d, d]."""
    joint, scores, precisions = _parts(mixture, x)
    shares = jax.nn.softmax(joint, axis=-1)  # [..., K]
    mean = jnp.einsum("...k,...ki->...i", shares, scores)
    second = jnp.einsum("...k,...ki,...kj->...ij", shares, scores, scores)
    return second - jnp.einsum("...k,kij->...ij", shares, precisions) - mean[..., :, None] * mean[..., None, :]


def widened(mixture: Mixture, sigma: float) -> Mixture:
    """p_sigma: the mixture convolved with N(0, sigma^2 I)."""
    covariances = np.asarray(mixture.covariances)
    return mixture._replace(covariances=covariances + sigma**2 * np.eye(covariances.shape[-1]))


def optimal_denoiser(mixture: Mixture, sigma: float) -> Callable[[jax.Array], jax.Array]:
    """The map [..., d] -> [..., d] that minimises E|r(x + sigma e) - x|^2, exactly, for any sigma."""
    wide = widened(mixture, sigma)
    return lambda x: x + sigma**2 * score(wide, x)


def optimal_jacobian(mixture: Mixture, x: jax.Array, sigma: float) -> jax.Array:
    """Its derivative I + sigma^2 Hessian of log p_sigma, [..., d, d]."""
    return jnp.eye(x.shape[-1], dtype=x.dtype) + sigma**2 * hessian(widened(mixture, sigma), x)


def affine_optimum(covariance: np.ndarray, weight: float) -> np.ndarray:
    """Slope A [d, d] of both criteria's optimum on Gaussian data, r(x) = mean + A (x - mean): C (C + weight I)^-1.

    Of a sample's covariance (divided by N) it is the exact minimiser of the contractive criterion among affine maps, weight being lambda;
    the denoising one has it in expectation, with weight sigma^2.
    """
    covariance = np.asarray(covariance, np.float64)
    return np.linalg.solve(covariance + weight * np.eye(len(covariance)), covariance).T


def contractive_optimum(grid: np.ndarray, at_points: np.ndarray, between: np.ndarray, weight: float) -> np.ndarray:
    """The minimiser [N] of the contractive criterion in one dimension, on an even grid with natural ends; float64.

    It minimises the sum of `p_k (r_k - x_k)^2 h + weight p_(k+1/2) ((r_(k+1) - r_k) / h)^2 h`, a tridiagonal system.

    Args:
        grid: points x, [N].
        at_points: density p at them, [N].
        between: density at the midpoints, [N - 1].
        weight: lambda, which is sigma^2 in the theorems.
    """
    from scipy.linalg import solve_banded

    stiffness = weight * between / (grid[1] - grid[0]) ** 2
    diagonal = at_points + np.pad(stiffness, (0, 1)) + np.pad(stiffness, (1, 0))
    bands = np.stack([np.pad(-stiffness, (1, 0)), diagonal, np.pad(-stiffness, (0, 1))])
    return solve_banded((1, 1), bands, at_points * grid)


def _two_dimensional() -> Mixture:
    return Mixture(np.ones(1), np.zeros((1, 2)), np.asarray([[[1.0, 0.6], [0.6, 0.8]]]))


def _two_modes() -> Mixture:
    return Mixture(np.full(2, 0.5), np.asarray([[-1.0], [1.0]]), np.full((2, 1, 1), 0.3**2))


def _along(curve: np.ndarray, deviation: float) -> Mixture:
    """Equal round Gaussians with their centres on a curve [K, d], near enough to each other to show no ripples."""
    count, dimensions = curve.shape
    return Mixture(np.full(count, 1 / count), curve, np.tile(deviation**2 * np.eye(dimensions), (count, 1, 1)))


def _spiral() -> Mixture:
    angle = np.linspace(*SPIRAL_TURN, CURVE_COMPONENTS)
    return _along(SPIRAL_STEP * angle[:, None] * np.stack([np.sin(angle), np.cos(angle)], 1), SPIRAL_DEVIATION)


def _curve() -> Mixture:
    angle = np.linspace(0, 2 * np.pi, CURVE_COMPONENTS, endpoint=False)
    waves = [wave(k * angle) / k for k in range(1, 6) for wave in (np.cos, np.sin)]
    return _along(np.stack(waves, 1), CURVE_DEVIATION)


DENSITIES: dict[str, Callable[[], Mixture]] = {
    "gaussian": _two_dimensional,  # 2-D, correlated
    "mixture": _two_modes,  # 1-D, two modes of deviation 0.3 at -1 and 1
    "spiral": _spiral,  # 2-D, near a spiral of one and a half turns
    "curve": _curve,  # 10-D, near a closed curve
}
