"""Soft clusters that sharpen themselves: "Unsupervised Deep Embedding for Clustering Analysis" (DEC), Xie et al., ICML 2016."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maskae.errors import UserError


def student_assignment(codes: jax.Array, centres: jax.Array, freedom: float = 1.0) -> jax.Array:
    """Membership of every row in every cluster by Student's t kernel (DEC, equation 1).

    Args:
        codes: [N, d].
        centres: [C, d].
        freedom: degrees of freedom v; the kernel is (1 + |z - mu|^2 / v)^(-(v + 1) / 2).

    Returns:
        float32 [N, C], rows sum to 1; 1/C everywhere where all centres coincide.

    Raises:
        UserError: where shapes do not fit.
    """
    if codes.ndim != 2 or centres.ndim != 2 or codes.shape[1] != centres.shape[1]:
        raise UserError(f"student_assignment: codes {codes.shape} and centres {centres.shape} must be [N, d] and [C, d]")
    # Differences, not the expanded square: codes lie close to their centres, where the expansion cancels.
    distances = jnp.square(codes.astype(jnp.float32)[:, None] - centres.astype(jnp.float32)).sum(-1)  # [N, C]
    return jax.nn.softmax(-(freedom + 1) / 2 * jnp.log1p(distances / freedom), axis=-1)


def sharpened_target(assignment: jax.Array) -> jax.Array:
    """p_ik proportional to q_ik^2 / sum_i q_ik, rows normalised (DEC, equation 3); [N, C] like `assignment`, without gradient.

    It favours what a row is sure of, and small clusters over large ones. One-hot rows stay as they are.
    """
    assignment = jax.lax.stop_gradient(assignment)
    mass = assignment.sum(0)
    weight = jnp.square(assignment) / jnp.where(mass > 0, mass, 1.0)
    return weight / weight.sum(-1, keepdims=True)


def cluster_divergence(assignment: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over rows of KL(target || assignment), both [N, C] (DEC, equation 2, there as a sum); float32 scalar, at least 0."""
    target = jax.lax.stop_gradient(target.astype(jnp.float32))
    present = target > 0
    logs = jnp.log(jnp.where(present, target, 1.0)) - jnp.log(jnp.where(present, assignment, 1.0))
    return (target * logs).sum(-1).mean()
