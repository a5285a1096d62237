"""Attention in plain JAX: what the kernels are tested against, and what runs wherever no kernel was measured to be faster."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maskae.kernels.attention_cpu import plain_attention
from maskae.kernels.operands import Operands, Options


def attend(options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Output [B, N, H, D] in the query's dtype and log-sum-exp float32 [B, H, N]; keeps scores of [B, H, N, M].

    Products of the inputs' dtype summed in float32, softmax in float32. Differentiable by JAX; positions are constants. Rows with nothing
    to attend to give 0, -inf and no gradient.
    """
    # With the heads in front, since XLA multiplies three times slower on CPUs with the heads between tokens and vectors.
    query, key, value = (x.swapaxes(1, 2) for x in operands[:3])  # [B, H, N, D]
    scores = jnp.einsum("bhnd,bhmd->bhnm", query, key, preferred_element_type=jnp.float32) * options.scale  # [B, H, N, M]
    if operands.slopes is not None:
        scores = scores - operands.slopes[:, None, None] * distances(operands)[:, None]
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    allowed = allowed_pairs(operands)
    if allowed is not None:
        scores = jnp.where(allowed[:, None], scores, -jnp.inf)
    highest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    # Of a row without keys the highest score is -inf, and -inf - -inf would be NaN.
    highest = jnp.where(jnp.isneginf(highest), 0.0, highest)
    weights = jnp.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)  # [B, H, N, 1]
    # The logarithm of a replaced 0, so that the branch not taken has a finite gradient.
    safe = jnp.where(total == 0, 1.0, total)
    log_sum_exp = jnp.where(total == 0, -jnp.inf, highest + jnp.log(safe))[..., 0]
    out = jnp.einsum("bhnm,bhmd->bhnd", (weights / safe).astype(value.dtype), value, preferred_element_type=jnp.float32)
    return out.astype(query.dtype).swapaxes(1, 2), log_sum_exp


def is_plain(options: Options, operands: Operands) -> bool:
    """Whether an attention is the common one, without masks, biases or caps."""
    return options.soft_cap is None and all(operand is None for operand in operands[3:])


def attend_plainly(options: Options, operands: Operands) -> jax.Array:
    """The output of an attention that `is_plain`."""
    return plain_attention(operands.query, operands.key, operands.value, scale=options.scale)


def distances(operands: Operands) -> jax.Array:
    """Euclidean distance of every query from every key, float32 [B, N, M]; a constant of the derivative, whose root has none at 0."""
    assert operands.query_positions is not None and operands.key_positions is not None
    difference = operands.query_positions[:, :, None] - operands.key_positions[:, None]  # [B, N, M, C]
    return jax.lax.stop_gradient(jnp.sqrt(jnp.square(difference.astype(jnp.float32)).sum(-1)))  # [B, N, M]


def allowed_pairs(operands: Operands) -> jax.Array | None:
    """Which query may attend to which key: bool broadcastable to [B, N, M]; None where all may."""
    allowed = None if operands.key_mask is None else operands.key_mask[:, None]  # [B, 1, M]
    if operands.query_segments is not None and operands.key_segments is not None:
        same = operands.query_segments[:, :, None] == operands.key_segments[:, None]  # [B, N, M]
        allowed = same if allowed is None else same & allowed
    return allowed
