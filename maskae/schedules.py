"""Learning-rate schedules: pure functions of the train step, evaluated at every step (never per epoch), float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from maskae.errors import UserError, nearest

Schedule = Callable[[Any], jax.Array]


def scaled_learning_rate(base: float, batch_size: int, reference: int = 256) -> float:
    """Linear scaling rule: `base * batch_size / reference`, `batch_size` being the global batch over all devices and accumulation."""
    return base * batch_size / reference


def _with_warmup(peak: float, warmup_steps: float, after: Callable[[jax.Array], jax.Array]) -> Schedule:
    """0 at step 0, then a straight line that reaches `peak` at `warmup_steps` (which may be fractional), then `after(step)`."""

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        ramp = peak * step / warmup_steps if warmup_steps > 0 else jnp.full_like(step, peak)
        return jnp.where(step < warmup_steps, ramp, after(step))

    return schedule


def warmup_cosine(peak: float, minimum: float, warmup_steps: float, total_steps: float) -> Schedule:
    """Warm-up, then half a cosine to `minimum`, evaluated at every step (MAE, He et al. 2022: fractional epochs).

    `minimum + (peak - minimum) * (1 + cos(pi * t)) / 2` with `t = (step - warmup_steps) / (total_steps - warmup_steps)`; `minimum`
    is reached at `step = total_steps`, one after the last executed step, and held.
    """

    def after(step: jax.Array) -> jax.Array:
        left = jnp.clip((total_steps - step) / max(total_steps - warmup_steps, 1e-9), 0.0, 1.0)
        # (1 + cos(pi t)) / 2 == sin(pi (1 - t) / 2)^2: the sum loses all its float32 digits near the end, the square none.
        return minimum + (peak - minimum) * jnp.square(jnp.sin(0.5 * jnp.pi * left))

    return _with_warmup(peak, warmup_steps, after)


def unshifted_cosine(peak: float, minimum: float, warmup_steps: float, total_steps: float) -> Schedule:
    """Warm-up from `minimum`, then half a cosine whose phase counts from step 0, not from the end of the warm-up (timm's scheduler).

    The rate drops at the end of the warm-up to what the cosine has come to. Codes that step it per epoch hold each epoch's value, and most
    use the first one twice; here it is evaluated at every step.
    """

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        ramp = minimum + (peak - minimum) * step / max(warmup_steps, 1e-9)
        left = jnp.clip((total_steps - step) / total_steps, 0.0, 1.0)
        return jnp.where(step < warmup_steps, ramp, minimum + (peak - minimum) * jnp.square(jnp.sin(0.5 * jnp.pi * left)))

    return schedule


def warmup_cosine_inclusive(peak: float, minimum: float, warmup_steps: float, total_steps: float, start: float = 0.005) -> Schedule:
    """SparK's (Tian et al. 2023, released code): a line from `start * peak`, then half a cosine that reaches `minimum` AT the last step.

    The warm-up is rounded to whole steps.
    """
    warmup = round(warmup_steps)

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        ramp = peak * (start + (1 - start) * step / max(warmup, 1))
        left = jnp.clip((total_steps - 1 - step) / max(total_steps - 1 - warmup, 1e-9), 0.0, 1.0)
        return jnp.where(step < warmup, ramp, minimum + (peak - minimum) * jnp.square(jnp.sin(0.5 * jnp.pi * left)))

    return schedule


def warmup_cosine_twice(peak: float, minimum: float, warmup_steps: float, total_steps: float) -> Schedule:
    """VideoMAE's (released code): `warmup_cosine`, but the line reaches `peak` at the last warm-up step, and the cosine starts there again.

    The warm-up is rounded to whole steps.
    """
    warmup = round(warmup_steps)
    after = warmup_cosine(peak, minimum, warmup, total_steps)

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        return jnp.where(step < warmup, peak * step / max(warmup - 1, 1), after(step))

    return schedule


def warmup_cosine_periodic(peak: float, warmup_steps: int, period: float) -> Schedule:
    """Lightning-Bolts' schedule, whose step is one EPOCH in the CT study's BYOL: it falls to 0 at `period` and rises again after it.

    The warm-up starts at 0 and has reached `peak` one step before `warmup_steps`. For reproduction; `warmup_cosine` is the sane one.
    """

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        ramp = peak * step / max(warmup_steps - 1, 1)
        wave = peak * (1 + jnp.cos(jnp.pi * (step - warmup_steps) / (period - warmup_steps))) / 2
        return jnp.where(step < warmup_steps, ramp, wave)

    return schedule


def cosine_between(start: float, end: float, total_steps: float) -> Schedule:
    """Half a cosine from `start` to `end`, reached at the last step: the rising weight decay of SparK and DINO."""

    def schedule(step: Any) -> jax.Array:
        share = jnp.clip(jnp.asarray(step, jnp.float32) / max(total_steps - 1, 1), 0.0, 1.0)
        return start + (end - start) * jnp.square(jnp.sin(0.5 * jnp.pi * share))

    return schedule


def warmup_linear(peak: float, minimum: float, warmup_steps: float, total_steps: float) -> Schedule:
    """Warm-up, then a straight line to `minimum` at `total_steps`."""

    def after(step: jax.Array) -> jax.Array:
        left = jnp.clip((total_steps - step) / max(total_steps - warmup_steps, 1e-9), 0.0, 1.0)
        return minimum + (peak - minimum) * left

    return _with_warmup(peak, warmup_steps, after)


def warmup_constant(peak: float, warmup_steps: float) -> Schedule:
    """Warm-up, then `peak` for ever."""
    return _with_warmup(peak, warmup_steps, lambda step: jnp.full_like(step, peak))


def warmup_rsqrt(peak: float, minimum: float, warmup_steps: float, timescale: float) -> Schedule:
    """Warm-up, then `peak / sqrt(1 + (step - warmup_steps) / timescale)`, never below `minimum`; it does not depend on the run's length."""

    def after(step: jax.Array) -> jax.Array:
        return jnp.maximum(minimum, peak * jax.lax.rsqrt(1 + jnp.maximum(step - warmup_steps, 0.0) / timescale))

    return _with_warmup(peak, warmup_steps, after)


def warmup_step(peak: float, warmup_steps: float, milestones: Sequence[float], factor: float) -> Schedule:
    """Warm-up, then `peak` times `factor` for every milestone (in steps) that has been reached."""
    edges = tuple(float(milestone) for milestone in milestones)

    def after(step: jax.Array) -> jax.Array:
        passed = sum(((step >= edge).astype(jnp.float32) for edge in edges), jnp.zeros_like(step))
        return peak * factor**passed

    return _with_warmup(peak, warmup_steps, after)


def unfreeze(peak: float, frozen_steps: float) -> Schedule:
    """0 for `frozen_steps`, then `peak / 10`, doubling with every tenth of that time up to `peak` (the CT study fine-tunes so)."""

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        doublings = jnp.floor(jnp.maximum(step - frozen_steps, 0.0) / max(frozen_steps / 10, 1e-9))
        # 2^4 > 10: the bound keeps the power finite.
        return jnp.where(step < frozen_steps, 0.0, peak * jnp.minimum(1.0, 0.1 * 2.0 ** jnp.minimum(doublings, 8.0)))

    return schedule


def delayed(peak: float, waiting_steps: float) -> Schedule:
    """0 for `waiting_steps`, so that not even weight decay moves a parameter, then `peak`: a discriminator that joins late."""
    return lambda step: jnp.where(jnp.asarray(step, jnp.float32) < waiting_steps, 0.0, peak)


def cosine_restarts(
    peak: float, minimum: float, warmup_steps: float, total_steps: float, *, period: float = 0.0, growth: float = 2.0
) -> Schedule:
    """Warm-up, then half cosines from `peak` to `minimum`, each `growth` times as long as the one before (SGDR, Loshchilov & Hutter 2017).

    The first is `period` steps long; 0 takes all that the warm-up leaves of the run. Raises UserError for a length that cannot be.
    """
    period = period or max(total_steps - warmup_steps, 1.0)
    if period < 1 or growth < 1:
        raise UserError(f"a schedule with restarts needs period >= 1 step and growth >= 1, not {period:g} and {growth:g}")
    edges = [0.0, float(period)]
    while edges[-1] < total_steps - warmup_steps:
        edges.append(edges[-1] + period * growth ** (len(edges) - 1))
    starts, ends = jnp.asarray(edges[:-1], jnp.float32), jnp.asarray(edges[1:], jnp.float32)

    def after(step: jax.Array) -> jax.Array:
        # Counted, not by a logarithm, which rounding would put one step off.
        cycle = jnp.clip((step[..., None] - warmup_steps >= starts).sum(-1) - 1, 0, len(starts) - 1)
        left = jnp.clip((ends[cycle] - (step - warmup_steps)) / (ends[cycle] - starts[cycle]), 0.0, 1.0)
        return minimum + (peak - minimum) * jnp.square(jnp.sin(0.5 * jnp.pi * left))

    return _with_warmup(peak, warmup_steps, after)


SCHEDULES = (
    "cosine", "cosine_inclusive", "cosine_twice", "cosine_restarts", "unshifted_cosine", "linear", "constant", "rsqrt", "step", "unfreeze",
    "delayed",
)


def make_schedule(
    name: str,
    *,
    peak: float,
    total_steps: float,
    warmup_steps: float = 0.0,
    minimum: float = 0.0,
    timescale: float = 10_000.0,
    milestones: Sequence[float] = (),
    factor: float = 0.1,
    period: float = 0.0,
    growth: float = 2.0,
) -> Schedule:
    """The schedule called `name`, one of `SCHEDULES`; all lengths are in steps and may be fractional.

    Raises:
      UserError: unknown name, a negative length, or a warm-up longer than the run.
    """
    if name not in SCHEDULES:
        raise UserError(f"unknown schedule {name!r}{nearest(name, SCHEDULES)}; known: {', '.join(SCHEDULES)}")
    if warmup_steps < 0 or total_steps <= 0:
        raise UserError(f"a schedule needs warmup_steps >= 0 and total_steps > 0, not {warmup_steps:g} and {total_steps:g}")
    if warmup_steps > total_steps:
        raise UserError(f"the warm-up of {warmup_steps:g} steps is longer than the run of {total_steps:g} steps")
    if name == "cosine":
        return warmup_cosine(peak, minimum, warmup_steps, total_steps)
    if name == "cosine_restarts":
        return cosine_restarts(peak, minimum, warmup_steps, total_steps, period=period, growth=growth)
    if name == "unshifted_cosine":
        return unshifted_cosine(peak, minimum, warmup_steps, total_steps)
    if name == "cosine_inclusive":
        return warmup_cosine_inclusive(peak, minimum, warmup_steps, total_steps)
    if name == "cosine_twice":
        return warmup_cosine_twice(peak, minimum, warmup_steps, total_steps)
    if name == "linear":
        return warmup_linear(peak, minimum, warmup_steps, total_steps)
    if name == "rsqrt":
        return warmup_rsqrt(peak, minimum, warmup_steps, timescale)
    if name == "step":
        return warmup_step(peak, warmup_steps, milestones, factor)
    if name == "unfreeze":
        return unfreeze(peak, warmup_steps)
    if name == "delayed":
        return delayed(peak, warmup_steps)
    return warmup_constant(peak, warmup_steps)
