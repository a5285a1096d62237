"""Attentive probe: a learned query pools cached tokens by cross-attention, then LayerNorm and a linear head."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maskae.errors import UserError
from maskae.evaluate.features import standardise
from maskae.evaluate.probe import Entry, make_plan, run_grid

Params = dict[str, dict[str, jax.Array]]
FEATURE = "tokens"


def attentive_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    val: np.ndarray,
    val_labels: np.ndarray,
    *,
    heads: int = 4,
    learning_rates: Sequence[float] = (3e-4, 1e-3, 3e-3, 1e-2),
    weight_decays: Sequence[float] = (0.01,),
    epochs: int = 50,
    batch_size: int = 128,
    held_out_percent: float = 10.0,
    seed: int = 0,
) -> list[Entry]:
    """One learned query with `heads` heads attends over the tokens; AdamW with a cosine to 0, all entries of the grid at once.

    Selection as in the linear probe: `maskae.evaluate.probe.select` on held-out training rows. All tokens are on the device at once.

    Args:
        train: [N, T, D] with train_labels int [N]. val: [M, T, D] with val_labels int [M]. Channels are standardised over rows and tokens.
        heads: must divide D.

    Returns:
        One entry per (learning rate, weight decay). The numbers are a function of the arguments, `seed` included.

    Source: the attentive probes of CAE (arXiv 2202.03026) and V-JEPA (arXiv 2404.08471), one cross-attention without its MLP.
    """
    width = train.shape[-1]
    if width % heads:
        raise UserError(f"attentive probe: heads = {heads} does not divide the token width {width}")
    plan = make_plan(
        train_labels,
        learning_rates=learning_rates,
        weight_decays=weight_decays,
        epochs=epochs,
        batch_size=batch_size,
        held_out_percent=held_out_percent,
        seed=seed,
    )
    fitted, scored = standardise(train, val)
    classes = int(max(train_labels.max(), val_labels.max())) + 1
    params = initial_params(width, heads, classes, seed)
    return run_grid(attentive_logits, _adamw, params, ({FEATURE: fitted}, train_labels), ({FEATURE: scored}, val_labels), plan, block=256)


def initial_params(width: int, heads: int, classes: int, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Queries at zero, so that the probe starts as mean pooling; a Xavier value projection; a zero head."""
    generator = np.random.default_rng([seed, 2])
    bound = np.sqrt(3.0 / width)
    return {
        "query": {"kernel": np.zeros((heads, width), np.float32)},
        "value": {"kernel": generator.uniform(-bound, bound, (heads, width, width // heads)).astype(np.float32)},
        "norm": {"scale": np.ones(width, np.float32), "bias": np.zeros(width, np.float32)},
        "head": {"kernel": np.zeros((width, classes), np.float32), "bias": np.zeros(classes, np.float32)},
    }


def attentive_logits(params: Params, tokens: jax.Array) -> jax.Array:
    """Logits [B, K] of tokens [B, T, D].

    A learned query meets the key projection only in their product, one D-vector per head, and the value projection commutes with the
    weighted mean. So this is full cross-attention at T * D * heads instead of T * D * D multiplications per image.
    """
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("btd,hd->bht", tokens, params["query"]["kernel"], precision=highest) / np.sqrt(tokens.shape[-1])
    weights = jax.nn.softmax(scores, axis=-1)  # [B, heads, T]
    pooled = jnp.einsum("bht,btd->bhd", weights, tokens, precision=highest)  # [B, heads, D]
    x = jnp.einsum("bhd,hdv->bhv", pooled, params["value"]["kernel"], precision=highest)  # [B, heads, D / heads]
    x = x.reshape(len(tokens), -1)  # [B, D]
    x = jax.nn.standardize(x, axis=-1, epsilon=1e-6) * params["norm"]["scale"] + params["norm"]["bias"]
    return jnp.matmul(x, params["head"]["kernel"], precision=highest) + params["head"]["bias"]  # [B, K]


def _adamw(learning_rate: jax.Array, weight_decay: jax.Array, steps: int) -> optax.GradientTransformation:
    decayed = {"query": {"kernel": False}, "value": {"kernel": True}, "norm": False, "head": {"kernel": True, "bias": False}}
    return optax.adamw(
        lambda count: learning_rate * optax.cosine_decay_schedule(1.0, steps)(count),
        b1=0.9,
        b2=0.999,
        weight_decay=weight_decay,
        mask=decayed,
    )
