"""Losses of image-table pretraining (TIP, Du et al. 2024, arXiv 2407.07582, section 3.3): hidden cells, matching with hard negatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maskae.data.columns import Columns

LEAST_WEIGHT = 1e-4
LEAST_PROBABILITY = 1e-8


def negative_weights(similarity: jax.Array) -> jax.Array:
    """How likely each key is drawn as a query's negative: softmax + 1e-4, and 0 for its own (ALBEF's and BLIP's scheme).

    [B, B] of queries and keys -> float32 [B, B], not normalised, without gradient.
    """
    weights = jax.nn.softmax(jax.lax.stop_gradient(similarity.astype(jnp.float32)), 1) + LEAST_WEIGHT
    return jnp.where(jnp.eye(len(weights), dtype=bool), 0.0, weights)


def hard_negatives(similarity: jax.Array, noise: jax.Array) -> jax.Array:
    """One key for each query, drawn by `negative_weights`: int32 [B]. `noise`: Gumbel [B, B]; the largest log weight plus noise wins."""
    return jnp.argmax(jnp.log(negative_weights(similarity)) + noise, 1).astype(jnp.int32)


def matching_loss(logits: jax.Array, matched: jax.Array) -> jax.Array:
    """Mean cross-entropy of "no" and "yes" [N, 2] against `matched` bool [N]; float32 scalar."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), matched.astype(jnp.int32)[:, None], 1)
    return -chosen.mean()


def category_probabilities(logits: jax.Array, columns: Columns, softmax: str) -> jax.Array:
    """float32 [B, categorical, values]: over all columns' values ("joint", the released code), or only over the column's own ("column")."""
    wide = logits.astype(jnp.float32)
    if softmax == "column":
        owner = jnp.repeat(jnp.arange(columns.categorical), jnp.asarray(columns.cardinalities), total_repeat_length=columns.values)
        wide = jnp.where(owner == jnp.arange(columns.categorical)[:, None], wide, -jnp.inf)
    return jax.nn.softmax(wide)


def cell_losses(
    logits: jax.Array, numbers: jax.Array, table: jax.Array, counted: jax.Array, columns: Columns, softmax: str = "joint"
) -> tuple[jax.Array, jax.Array]:
    """Errors on the counted cells: -log(p + 1e-8) of the categorical ones, squared difference of the continuous ones.

    Each is the sum over the counted cells of the global batch over their number (over 1 where there are none).

    Args:
        logits: [B, categorical, values], what `CellPredictor` gives.
        numbers: [B, continuous], likewise.
        table: [B, N], the true row.
        counted: bool [B, N].
        columns: of the table.
        softmax: see `category_probabilities`.

    Returns:
        Two float32 scalars.
    """
    split, weight = columns.categorical, counted.astype(jnp.float32)
    difference = jnp.square(numbers.astype(jnp.float32) - table[:, split:])
    continuous = (difference * weight[:, split:]).sum() / jnp.maximum(weight[:, split:].sum(), 1.0)
    if not columns.values:
        return jnp.zeros(()), continuous
    probabilities = category_probabilities(logits, columns, softmax)
    chosen = jnp.take_along_axis(probabilities, columns.codes(table)[..., None], 2)[..., 0]  # [B, categorical]
    categorical = -(jnp.log(chosen + LEAST_PROBABILITY) * weight[:, :split]).sum()
    return categorical / jnp.maximum(weight[:, :split].sum(), 1.0), continuous
