"""Balanced assignment of samples to prototypes (Sinkhorn-Knopp; SwAV, Caron et al. 2020, arXiv 2006.09882, section 3.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maskae.vectors import at_least_float32


def sinkhorn(scores: jax.Array, epsilon: float = 0.05, iterations: int = 3) -> jax.Array:
    """Codes of a batch: exp(scores / epsilon) scaled in turn to equal totals of prototypes and of samples, samples last.

    Args:
        scores: [B, K], the similarities of B samples (the global batch) to K prototypes.
        epsilon: temperature; small ones make the codes hard.
        iterations: of both scalings.

    Returns:
        at least float32 [B, K] without gradient; rows sum to 1, columns to B / K after many iterations.
    """
    samples, prototypes = scores.shape
    # In logarithms: exp(1 / 0.05) would still fit into float32, but not with a smaller epsilon.
    log_codes = at_least_float32(jax.lax.stop_gradient(scores)) / epsilon
    for _ in range(iterations):
        log_codes = log_codes - jax.nn.logsumexp(log_codes, 0, keepdims=True) - jnp.log(float(prototypes))
        log_codes = log_codes - jax.nn.logsumexp(log_codes, 1, keepdims=True) - jnp.log(float(samples))
    return jax.nn.softmax(log_codes, 1)
