"""Contrast of every node with its weighted neighbours against all nodes, in memory of the pairs alone (SCGC, arXiv 2204.12656).

With weights G_ij that are 0 for most pairs, cosines s_ij (s_ii := 0) and e_ij = exp(scale * s_ij),

    loss = -mean_i log( sum_j G_ij e_ij / sum_j e_ij + 1e-8 ).

The diagonal stays in both sums with e_ii = 1. `scale` MULTIPLIES the cosine as in the released code; the text divides by a temperature.
The numerator is a sum over the pairs of weight above 0, the denominator one over blocks of nodes (`maskae.losses.blocked`), so that with N
nodes of width d and P pairs no more than O(N d + N block + P d) is held.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maskae.errors import UserError
from maskae.losses.blocked import Anchors, Candidates, Computation, Pairs, row_losses
from maskae.vectors import unit

SMALLEST_SHARE = 1e-8


class Neighbourhood(NamedTuple):
    """The pairs (row, column) of weight above 0 in any order, int32 [P] each, and their weights float32 [P]; padding has weight 0."""

    rows: jax.Array
    columns: jax.Array
    weights: jax.Array


def neighbourhood_contrast(
    codes: jax.Array, pairs: Neighbourhood, scale: float, *, computation: Computation | None = None
) -> jax.Array:
    """The loss above of codes [N, d]; float32 scalar. Codes of length 0 have cosine 0 with everything, and no gradient.

    Args:
        codes: not normalised; gradients flow to both sides of every pair.
        pairs: no gradient flows into the weights.
        scale: of the cosines; 0 gives log N for weights that sum to 1, without gradient.
        computation: how the denominators are computed; changes neither value nor gradient.

    Raises:
        UserError: where shapes do not fit.
    """
    if codes.ndim != 2 or not pairs.rows.shape == pairs.columns.shape == pairs.weights.shape or pairs.rows.ndim != 1:
        shapes = ", ".join(str(each.shape) for each in (codes, *pairs))
        raise UserError(f"neighbourhood_contrast: codes, rows, columns and weights have shapes {shapes}; want [N, d] and [P] three times")
    directions = unit(codes)
    cosines = (directions[pairs.rows] * directions[pairs.columns]).sum(-1)  # [P]
    affinities = jnp.exp(scale * jnp.where(pairs.rows == pairs.columns, 0.0, cosines))
    weights = jax.lax.stop_gradient(pairs.weights.astype(jnp.float32))
    near = jax.ops.segment_sum(weights * affinities, pairs.rows, codes.shape[0])  # [N]
    share = near * jnp.exp(-log_affinity_sums(directions, scale, computation or Computation()))
    return -jnp.log(share + SMALLEST_SHARE).mean()


def log_affinity_sums(directions: jax.Array, scale: float, computation: Computation) -> jax.Array:
    """log sum_j e_ij of every row of unit vectors [N, d], with e_ii = 1; float32 [N].

    It is the log-sum-exp inside the cross-entropy of row i against itself, with that pair's own exponential replaced by 1.
    """
    rows = jnp.arange(directions.shape[0], dtype=jnp.int32)
    every = Pairs(Anchors(rows, rows, jnp.zeros((len(rows), 0), jnp.int32)), Candidates(rows, rows, rows), None)
    factor = jnp.asarray(scale, jnp.float32)
    losses, _ = row_losses(directions, directions, factor, every, exclude_self=False, key_gradient=True, computation=computation)
    own = factor * jnp.square(directions).sum(-1)
    total = losses + own
    return total + jnp.log1p(jnp.exp(-total) - jnp.exp(own - total))
