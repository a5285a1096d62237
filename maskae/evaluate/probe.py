"""The engine of the trained probes: a grid of learning rates and weight decays fitted and scored at once in one compiled program.

Selection: the winner is the entry with the best accuracy on a held-out, stratified part of the TRAINING features. The validation split is
scored once at the end and never chooses anything, so its accuracy is an honest estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maskae.errors import UserError

Params = Any
Apply = Callable[[Params, jax.Array], jax.Array]
MakeOptimizer = Callable[[jax.Array, jax.Array, int], optax.GradientTransformation]


@dataclass(frozen=True)
class Entry:
    """One trained probe of the grid. `top1`, `top5` are shares in 0..1 on validation rows; top5 is None with five classes or fewer."""

    feature: str
    learning_rate: float
    weight_decay: float
    held_out_top1: float
    held_out_loss: float
    top1: float
    top5: float | None


@dataclass(frozen=True)
class Plan:
    """What to train on: rows of the training features per step, rows that only select, and the grid."""

    batches: np.ndarray  # int32 [steps, batch]
    held_out: np.ndarray  # int32 [rows]
    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]


def make_plan(
    labels: np.ndarray,
    *,
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    epochs: int,
    batch_size: int,
    held_out_percent: float,
    seed: int,
) -> Plan:
    """The held-out rows and the batches of all epochs, both a function of (labels, seed) alone.

    Raises:
        UserError: an empty grid, a negative weight decay, or too few labelled rows to hold any out.
    """
    if not learning_rates or not weight_decays:
        raise UserError("a probe needs at least one learning rate and one weight decay")
    if min(weight_decays) < 0:
        raise UserError(f"weight_decays = {tuple(weight_decays)}: none may be negative")
    fit, held_out = split_held_out(labels, held_out_percent, seed)
    batches = shuffled_batches(fit, batch_size, epochs, seed)
    return Plan(batches, held_out, tuple(learning_rates), tuple(weight_decays))


def split_held_out(labels: np.ndarray, percent: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the fitted and of the held-out rows: `percent` of each class, at least one where the class has two rows or more."""
    if not 0 < percent < 100:
        raise UserError(f"held_out_percent = {percent}: it must lie between 0 and 100")
    generator = np.random.default_rng([seed, 0])
    fit, held_out = [], []
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(len(rows) * percent / 100)), len(rows) - 1)
        held_out.append(rows[:count])
        fit.append(rows[count:])
    chosen = np.sort(np.concatenate(held_out))
    if not len(chosen):
        raise UserError(f"a probe cannot hold out training examples for its selection: no class has two of them ({len(labels)} in all)")
    return np.sort(np.concatenate(fit)).astype(np.int32), chosen.astype(np.int32)


def shuffled_batches(rows: np.ndarray, batch_size: int, epochs: int, seed: int) -> np.ndarray:
    """int32 [steps, batch]: each epoch is a new order of the rows; the last incomplete batch of an epoch is dropped."""
    batch_size = min(batch_size, len(rows))
    steps = len(rows) // batch_size
    generator = np.random.default_rng([seed, 1])
    orders = [generator.permutation(rows)[: steps * batch_size].reshape(steps, batch_size) for _ in range(epochs)]
    return np.concatenate(orders).astype(np.int32)


def class_rank(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """Place of the true class among scores [B, K], 0 is best; int32 [B].

    Equal scores count in order of class number, as argmax does: a probe that says the same of all classes is not always right. A row
    with any score that is not finite is wrong at every place (K), so a diverged probe cannot win.
    """
    true = jnp.take_along_axis(scores, labels[:, None], axis=1)  # [B, 1]
    earlier = jnp.arange(scores.shape[1]) < labels[:, None]  # [B, K]
    place = jnp.sum((scores > true) | ((scores == true) & earlier), axis=1)
    return jnp.where(jnp.all(jnp.isfinite(scores), axis=1), place, scores.shape[1])


def _score(apply: Apply, params: Params, inputs: jax.Array, labels: jax.Array, rows: jax.Array) -> jax.Array:
    """Sums of (top-1 hit, top-5 hit, cross-entropy), float32 [3], over rows [blocks, block] of inputs [N, ...]; row -1 is padding.

    The logits exist one block at a time.
    """

    def block(taken: jax.Array) -> jax.Array:
        real = taken >= 0
        label = labels[taken]
        logits = apply(params, inputs[taken])  # [block, K]
        place = class_rank(logits, label)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return jnp.stack([jnp.sum(jnp.where(real, value, 0.0)) for value in (place < 1, place < 5, loss)])

    return jax.lax.map(block, rows).sum(axis=0)


@partial(jax.jit, static_argnames=("apply", "make_optimizer"))
def fit_and_score(
    apply: Apply,
    make_optimizer: MakeOptimizer,
    params: Params,
    train: tuple[jax.Array, jax.Array],
    val: tuple[jax.Array, jax.Array],
    batches: jax.Array,
    score_rows: tuple[jax.Array, jax.Array],
    grid: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Trains features x grid probes together and scores each.

    Args:
        apply: (params, inputs [B, ...]) -> logits [B, K]. make_optimizer: (learning rate, weight decay, steps) -> optax transformation.
        params: where every probe starts.
        train, val: (inputs [features, N, ...] float32, labels int32 [N]).
        batches: int32 [steps, B] rows of `train`.
        score_rows: blocks of held-out rows of `train` and of rows of `val`, int32 [blocks, block].
        grid: learning rates and weight decays, float32 [G] each.

    Returns:
        Sums over the held-out and over the validation rows, each float32 [features, G, 3] as in `_score`.
    """

    def probe(inputs: jax.Array, val_inputs: jax.Array, learning_rate: jax.Array, weight_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
        optimizer = make_optimizer(learning_rate, weight_decay, len(batches))

        def loss(params: Params, rows: jax.Array) -> jax.Array:
            logits = apply(params, inputs[rows])
            return optax.softmax_cross_entropy_with_integer_labels(logits, train[1][rows]).mean()

        def step(carry: tuple[Params, Any], rows: jax.Array) -> tuple[tuple[Params, Any], None]:
            updates, state = optimizer.update(jax.grad(loss)(carry[0], rows), carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        (trained, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), batches)
        held_out = _score(apply, trained, inputs, train[1], score_rows[0])
        return held_out, _score(apply, trained, val_inputs, val[1], score_rows[1])

    # Inner map: the grid, sharing the gathered batch. Outer map: kinds of features.
    each = jax.vmap(jax.vmap(probe, (None, None, 0, 0)), (0, 0, None, None))
    return each(train[0], val[0], *grid)


def run_grid(
    apply: Apply,
    make_optimizer: MakeOptimizer,
    params: Params,
    train: tuple[dict[str, np.ndarray], np.ndarray],
    val: tuple[dict[str, np.ndarray], np.ndarray],
    plan: Plan,
    *,
    block: int = 1024,
) -> list[Entry]:
    """All entries of the grid, in the order feature, learning rate, weight decay.

    Args:
        train, val: ({feature name: float32 [N, ...]}, labels int [N]); all features of one shape. Other arguments as in `fit_and_score`.
        block: rows that are scored at a time.
    """
    grid = [(rate, decay) for rate in plan.learning_rates for decay in plan.weight_decays]
    classes = int(max(train[1].max(), val[1].max())) + 1
    pairs = [(np.stack(list(inputs.values())), labels.astype(np.int32)) for inputs, labels in (train, val)]
    rows = tuple(_blocks(chosen, block) for chosen in (plan.held_out, np.arange(len(val[1]), dtype=np.int32)))
    rates, decays = (np.asarray(column, np.float32) for column in zip(*grid, strict=True))
    scores = fit_and_score(apply, make_optimizer, params, pairs[0], pairs[1], plan.batches, rows, (rates, decays))
    counts = len(plan.held_out), len(val[1])
    held_out, final = ((np.asarray(array, np.float64) / count).tolist() for array, count in zip(scores, counts, strict=True))
    return [
        Entry(
            feature=feature,
            learning_rate=rate,
            weight_decay=decay,
            held_out_top1=held_out[f][g][0],
            held_out_loss=held_out[f][g][2],
            top1=final[f][g][0],
            top5=final[f][g][1] if classes > 5 else None,
        )
        for f, feature in enumerate(train[0])
        for g, (rate, decay) in enumerate(grid)
    ]


def _blocks(rows: np.ndarray, block: int) -> np.ndarray:
    """int32 [blocks, block], filled up with -1."""
    block = min(block, len(rows))
    return np.pad(rows, (0, -len(rows) % block), constant_values=-1).reshape(-1, block)


def select(entries: Sequence[Entry]) -> Entry:
    """The entry with the best held-out accuracy; of equals, the one with the lower held-out loss (one that is not finite is the last)."""
    return min(entries, key=lambda entry: (-entry.held_out_top1, entry.held_out_loss if np.isfinite(entry.held_out_loss) else np.inf))


def grid_metrics(name: str, entries: Sequence[Entry], *, report_grid: bool) -> dict[str, float]:
    """`<name>_top1` (and `_top5`) of the selected entry, its held-out accuracy and place in the grid; with `report_grid` every entry."""
    best = select(entries)
    metrics = {
        f"{name}_top1": best.top1,
        f"{name}_held_out_top1": best.held_out_top1,
        f"{name}_learning_rate": best.learning_rate,
        f"{name}_weight_decay": best.weight_decay,
    }
    if best.top5 is not None:
        metrics[f"{name}_top5"] = best.top5
    features = {entry.feature for entry in entries}
    for entry in entries if report_grid else ():
        kind = f"{entry.feature}_" if len(features) > 1 else ""
        metrics[f"{name}_grid/{kind}lr_{entry.learning_rate:g}_wd_{entry.weight_decay:g}_top1"] = entry.top1
    return metrics
