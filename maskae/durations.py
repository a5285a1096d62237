"""Lengths of time in a config: every one has exactly one of four suffixes, and becomes steps here."""

from __future__ import annotations

import math
from collections.abc import Mapping

from maskae.errors import UserError

SUFFIXES = ("_steps", "_epochs", "_examples", "_percent")


def steps_per_epoch(examples_per_epoch: int, batch_size: int) -> int:
    """`examples_per_epoch // batch_size`: the incomplete last batch of an epoch is not a step (MAE, He et al. 2022, and most recipes).

    Raises:
      UserError: the batch is larger than an epoch.
    """
    if batch_size > examples_per_epoch:
        raise UserError(f"batch_size {batch_size} is larger than the {examples_per_epoch} examples of an epoch")
    return examples_per_epoch // batch_size


def duration_steps(
    values: Mapping[str, float | None],
    name: str,
    *,
    batch_size: int,
    examples_per_epoch: int | None = None,
    total_steps: float | None = None,
) -> float:
    """Steps, possibly a fraction of one, of the only duration `<name>_steps`, `_epochs`, `_examples` or `_percent` set in `values`.

    Args:
      values: a part of the config; a key that is absent or None is not set, other keys are not looked at.
      name: such as "warmup" for `warmup_epochs`; may be empty for `steps`, `epochs`, ...
      batch_size: global batch.
      examples_per_epoch: size of the training set, for `_epochs`.
      total_steps: length of the run, for `_percent` (100 is the whole run).

    Raises:
      UserError: none or more than one is set, it is negative or not finite, or it cannot be converted.
    """
    keys = [(name + suffix).removeprefix("_") for suffix in SUFFIXES]
    found = {key: float(value) for key in keys if (value := values.get(key)) is not None}
    if not found:
        raise UserError(f"a duration is missing: set one of {', '.join(keys)}")
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)} are both set; keep one and set the others to None")
    ((key, value),) = found.items()
    if not math.isfinite(value) or value < 0:
        raise UserError(f"{key} must be a number >= 0, not {value:g}")
    if key.endswith("steps"):
        return value
    if key.endswith("examples"):
        return value / batch_size
    if key.endswith("epochs"):
        if examples_per_epoch is None:
            raise UserError(f"{key} needs data with a known number of examples; use {keys[0]}")
        return value * steps_per_epoch(examples_per_epoch, batch_size)
    if total_steps is None:
        raise UserError(f"{key} is a share of the run's length and cannot be used here; use {keys[0]}")
    return value / 100 * total_steps


def whole_steps(steps: float) -> int:
    """`steps` rounded up to a number of steps that can be executed; 1e-6 of slack keeps 0.1 * 30 epochs from growing by one."""
    return math.ceil(steps - 1e-6)
