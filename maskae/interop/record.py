"""Reading what the record of a reference case says in words or under official names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskae.errors import UserError
from maskae.interop.case import Case, Reproduced, after_steps
from maskae.interop.layout import Flat, Geometry, to_foreign
from maskae.interop.vit import LAYOUTS
from maskae.optim import Optimizer
from maskae.paths import flatten_paths
from maskae.schedules import Schedule, warmup_cosine

KEY_BIAS = "key bias: its true gradient is 0 and Adam turns rounding noise into steps"
UNSURE = "gradients so small that Adam turns their rounding into steps"
# What float32 leaves uncertain of a gradient, relative to the largest one of its tensor.
ROUNDING = 3e-7


def numbers_of(text: str, pattern: str) -> tuple[float, ...]:
    """The numbers that `pattern`'s groups match in a sentence of the record. Raises UserError where it does not match."""
    found = re.search(pattern, text)
    if found is None:
        raise UserError(f"the reference case says {text!r}, in which no {pattern!r} is found")
    return tuple(float(group) for group in found.groups())


def adam_constants(text: str) -> dict[str, Any]:
    """b1, b2 and eps of a recorded "AdamW betas (0.9, 0.95) eps 1e-8"."""
    return dict(zip(("b1", "b2", "eps"), numbers_of(text, r"betas \(([\d.]+), ([\d.]+)\) eps ([\d.e-]+)"), strict=True))


def recorded_schedule(options: Mapping[str, Any]) -> Schedule:
    """The warm-up cosine of a recorded training, its epochs in steps."""
    per_epoch = options["steps_per_epoch"]
    return warmup_cosine(options["lr"], options["min_lr"], options["warmup_epochs"] * per_epoch, options["epochs"] * per_epoch)


def image_size_of(options: Mapping[str, Any]) -> int | tuple[int, int]:
    """The recorded image size, one number or (height, width)."""
    size = options["img_size"]
    return size if isinstance(size, int) else (size[0], size[1])


def check_qkv_bias(case: Case, options: Mapping[str, Any]) -> None:
    """Raises UserError where a recorded classifier's attention has no biases: ours always has."""
    if not options.get("qkv_bias", True):
        raise UserError(f"{case.folder}: qkv_bias=False of the fine-tuned network cannot be replayed; there are biases here")


def official_names(tree: Any, geometry: Geometry) -> dict[str, np.ndarray]:
    """Parameters or their gradients under the names and in the shapes of MAE's released code, without the fixed position tables."""
    layout = dataclasses.replace(LAYOUTS["paper"], positions={})
    flat = {path: np.asarray(leaf) for path, leaf in flatten_paths(tree).items()}
    return {name: np.asarray(value) for name, value in to_foreign(flat, layout, geometry)[0].items()}


def key_bias(name: str, size: int) -> np.ndarray | None:
    """Where a fused qkv bias [3D] belongs to the keys, which the softmax does not see; None for every other parameter."""
    return np.arange(size) // (size // 3) == 1 if name.endswith("qkv.bias") else None


class Trained(NamedTuple):
    """What recorded AdamW steps came to: `params`; of every step `losses` and learning `rates` [steps]; and `reach`, like `params`, how far
    the rounding of gradients may have moved each entry.
    """

    params: Any
    losses: np.ndarray
    rates: np.ndarray
    reach: Any


def train(
    loss: Callable[[Any, jax.Array], jax.Array], optimizer: Optimizer, schedule: Schedule, params: Any, places: Sequence[float], b2: float
) -> Trained:
    """AdamW steps down `loss(params, number)`, step `number` at `places[number]` of the schedule; `b2` is the optimizer's."""

    @jax.jit
    def step(params: Any, memory: Any, number: jax.Array, place: jax.Array) -> tuple[Any, Any, jax.Array, Any]:
        value, grads = jax.value_and_grad(loss)(params, number)
        updates, memory = optimizer.update(grads, memory, params, place)
        corrected = 1 - b2 ** (number + 1.0)

        def reached(grad: jax.Array, square: jax.Array) -> jax.Array:
            return schedule(place) * ROUNDING * jnp.abs(grad).max() / (jnp.sqrt(square / corrected) + 1e-8)

        return jax.tree.map(jnp.add, params, updates), memory, value, jax.tree.map(reached, grads, memory["nu"])

    memory, losses, reach = optimizer.init(params), [], jax.tree.map(jnp.zeros_like, params)
    for number, place in enumerate(places):
        params, memory, value, farther = step(params, memory, jnp.asarray(number), jnp.asarray(place))
        losses.append(float(value))
        reach = jax.tree.map(jnp.add, reach, farther)
    return Trained(params, np.asarray(losses), np.asarray([float(schedule(place)) for place in places]), reach)


def trained_outputs(trained: Trained, official: Callable[[Any], Flat], prefix: str = "train_") -> dict[str, Reproduced]:
    """Losses, learning rates and the parameters after the steps, the latter under the names that `official` gives a tree.

    What rounding may have moved an entry comes on top of what is allowed.
    """
    found = {f"{prefix}losses": Reproduced(trained.losses), f"{prefix}lrs": Reproduced(trained.rates)}
    reach = official(trained.reach)
    for name, value in official(trained.params).items():
        keys = key_bias(name, value.size)
        row = after_steps(value, trained.rates, keys, "" if keys is None else KEY_BIAS)
        unsure = int((reach[name] > row.absolute).sum())
        note = f"{unsure} of {value.size} entries may lie farther: {UNSURE}" if unsure and keys is None else row.note
        found[f"{prefix}params/{name}"] = dataclasses.replace(row, note=note, slack=reach[name])
    return found
