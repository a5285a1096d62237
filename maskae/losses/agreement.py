"""Agreement of two sets of tokens by cosine, without negatives: for views that something else keeps from collapsing."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice
from maskae.vectors import unit

PAIRINGS = ("matched", "all")


def token_agreement(first: jax.Array, second: jax.Array, counted: jax.Array, pairing: str = "matched") -> jax.Array:
    """Mean over the counted tokens of one minus a cosine (Point-CMAE, Ren et al. 2024, section 3.3); float32 scalar in [0, 2].

    Args:
        first, second: [B, N, D]; token i of one view belongs to token i of the other. Gradients flow to both.
        counted: bool or 0/1 [B, N]; the mean is over all of them in the global batch. None counted gives 0.
        pairing: "matched" compares with the same token of the other view, the paper's statement; "all" with the mean over every token of
            the other view, what the released code computes.

    Raises:
        UserError: where shapes do not fit or the pairing is unknown.
    """
    check_choice("pairing", pairing, PAIRINGS)
    if first.shape != second.shape or first.shape[:-1] != counted.shape:
        raise UserError(f"tokens of shapes {first.shape} and {second.shape} with counted {counted.shape}; want [B, N, D] twice and [B, N]")
    other = unit(second)
    if pairing == "all":
        other = other.mean(axis=1, keepdims=True)  # [B, 1, D]; the mean of the cosines is the cosine with the mean
    weight = counted.astype(jnp.float32)
    distance = 1 - (unit(first) * other).sum(-1)  # [B, N]
    return (distance * weight).sum() / jnp.maximum(weight.sum(), 1.0)
