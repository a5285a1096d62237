"""Losses of a discriminator on its logits for real and for generated images; the generator's is minus their mean for generated ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maskae.errors import check_choice

DISCRIMINATOR_LOSSES = ("mse", "hinge", "vanilla")


def discriminator_loss(real: jax.Array, fake: jax.Array, kind: str = "mse") -> jax.Array:
    """Half the sum of both means: squares to 1 and 0 (Mao et al. 2017), hinge (Lim & Ye 2017), or softplus (Goodfellow et al. 2014).

    Args:
        real, fake: logits of any shape.
        kind: one of `DISCRIMINATOR_LOSSES`.

    Returns:
        float32 scalar. Raises UserError for an unknown kind.
    """
    check_choice("discriminator loss", kind, DISCRIMINATOR_LOSSES)
    if kind == "mse":
        return 0.5 * (jnp.square(real - 1).mean() + jnp.square(fake).mean())
    if kind == "hinge":
        return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())
    return 0.5 * (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean())
