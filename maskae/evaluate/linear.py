"""Linear probe on cached features: a grid of learning rates, weight decays and kinds of features, trained at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maskae.evaluate.features import standardise
from maskae.evaluate.probe import Entry, make_plan, run_grid

MOMENTUM = 0.9


def linear_probe(
    train: Mapping[str, np.ndarray],
    train_labels: np.ndarray,
    val: Mapping[str, np.ndarray],
    val_labels: np.ndarray,
    *,
    learning_rates: Sequence[float] = (0.003, 0.01, 0.03, 0.1, 0.3),
    weight_decays: Sequence[float] = (0.0, 1e-3, 1e-2),
    epochs: int = 100,
    batch_size: int = 256,
    held_out_percent: float = 10.0,
    seed: int = 0,
) -> list[Entry]:
    """Softmax regression on standardised features by minibatch SGD (momentum 0.9, cosine to 0, coupled L2 on the kernel).

    Each entry of the grid sees the same batches. Choose with `maskae.evaluate.probe.select`, which looks at held-out training rows only.
    Independent of the scale and offset of each channel.

    Args:
        train: {kind of feature: [N, D of that kind]} with train_labels int [N]. val: the same kinds, [M, D], with val_labels int [M].
        learning_rates: at this batch size; no scaling rule is applied.
        held_out_percent: share of the training rows that selects and is not trained on.

    Returns:
        One entry per (kind, learning rate, weight decay), in this order. The numbers are a function of the arguments, `seed` included.
    """
    plan = make_plan(
        train_labels,
        learning_rates=learning_rates,
        weight_decays=weight_decays,
        epochs=epochs,
        batch_size=batch_size,
        held_out_percent=held_out_percent,
        seed=seed,
    )
    width = max(array.shape[1] for array in train.values())
    pairs = {kind: tuple(_widen(array, width) for array in standardise(train[kind], val[kind])) for kind in train}
    classes = int(max(train_labels.max(), val_labels.max())) + 1
    params = {"kernel": np.zeros((width, classes), np.float32), "bias": np.zeros(classes, np.float32)}
    fitted = {kind: pair[0] for kind, pair in pairs.items()}
    scored = {kind: pair[1] for kind, pair in pairs.items()}
    return run_grid(_logits, _sgd, params, (fitted, train_labels), (scored, val_labels), plan)


def _widen(array: np.ndarray, width: int) -> np.ndarray:
    """Zero columns up to a common width: their weights start at zero and get no gradient, so they change nothing."""
    return np.pad(array, ((0, 0), (0, width - array.shape[1])))


def _logits(params: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    return jnp.matmul(inputs, params["kernel"], precision=jax.lax.Precision.HIGHEST) + params["bias"]  # [B, K]


def _sgd(learning_rate: jax.Array, weight_decay: jax.Array, steps: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask={"kernel": True, "bias": False}),
        optax.sgd(lambda count: learning_rate * optax.cosine_decay_schedule(1.0, steps)(count), momentum=MOMENTUM),
    )
