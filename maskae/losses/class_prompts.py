"""Classification by similarity with a prompt per class, at a temperature that depends on the domain.

GM-DF, Lai et al., arXiv 2406.20078, equations 9 to 11.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maskae.vectors import unit


def class_prompt_logits(features: jax.Array, prompts: jax.Array, temperature: jax.Array) -> jax.Array:
    """Cosine similarity of each feature [B, D] with its own class prompts [B, K, D], over its temperature [B]; float32 [B, K].

    The softmax of these over K with cross-entropy is the loss: examples are not each other's negatives, as they would be in a contrast over
    the batch, where two of one domain and class have the same prompt.
    """
    return jnp.einsum("bd,bkd->bk", unit(features), unit(prompts)) / temperature[:, None]


def domain_temperature(embedding: jax.Array, base: float, slope: float) -> jax.Array:
    """base + slope * |e| of each domain embedding [R, D]; float32 [R]."""
    squares = jnp.square(embedding.astype(jnp.float32)).sum(-1)
    return base + slope * jnp.sqrt(jnp.maximum(squares, 1e-24))
