"""Classification losses; the softmax is computed in float32 at least."""

from __future__ import annotations

import jax

from maskae.vectors import at_least_float32


def soft_target_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over the batch of -sum_k t_k log p_k. `logits` and `targets` [B, K], rows of `targets` sum to 1 (mixup, cutmix)."""
    log_probabilities = jax.nn.log_softmax(at_least_float32(logits))
    return -(at_least_float32(targets) * log_probabilities).sum(-1).mean()


def label_smoothing_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.1) -> jax.Array:
    """Cross-entropy against (1 - smoothing) on the label plus smoothing spread evenly over all classes (Szegedy et al. 2016, section 7).

    Args:
        logits: [B, K].
        labels: int32 [B].
        smoothing: 0 gives the plain cross-entropy.
    """
    classes = logits.shape[-1]
    targets = jax.nn.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
    return soft_target_cross_entropy(logits, targets)
