"""What a score field is good for: differences of log density along lines, and samples by random walks that need no density."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

VectorField = Callable[[jax.Array], jax.Array]  # [..., d] -> [..., d]
LogRatio = Callable[[jax.Array, jax.Array], jax.Array]  # (from [..., d], to [..., d]) -> [...]


class Chain(NamedTuple):
    """Random walks: `states` [steps, chains, d] after every step, and whether its proposal was `accepted`, bool [steps, chains]."""

    states: jax.Array
    accepted: jax.Array


def line_integral(field: VectorField, start: jax.Array, end: jax.Array, points: int) -> jax.Array:
    """Of a vector field from `start` to `end` ([..., d] both) on a straight line, by the midpoint rule with so many points; [...].

    Of a score it is log p(end) - log p(start).
    """
    share = (jnp.arange(points, dtype=start.dtype) + 0.5) / points
    along = start + share.reshape(-1, *(1,) * start.ndim) * (end - start)  # [points, ..., d]
    return (field(along) * (end - start)).sum(-1).mean(0)


def path_ratio(field: VectorField, points: int) -> LogRatio:
    """log p(y) - log p(x) by a score's line integral, for `metropolis`; 8 to 20 points are usual."""
    return lambda x, y: line_integral(field, x, y, points)


def metropolis(log_ratio: LogRatio, start: jax.Array, normal: jax.Array, uniform: jax.Array, width: float) -> Chain:
    """Metropolis-Hastings with the symmetric proposal y = x + width * normal, taken where log(uniform) < log p(y) - log p(x).

    With the score of a denoiser trained at sigma the chain's target is p_sigma, not p: every mode is wider by sigma^2. Start on data; far
    from it the denoiser was never trained. Distant modes mix slowly.

    Args:
        log_ratio: log p(y) - log p(x) of pairs of points, exact or by `path_ratio`.
        start: [chains, d].
        normal: standard normal draws [steps, chains, d].
        uniform: draws in (0, 1), [steps, chains].
        width: of the proposal, tuned for an acceptance of 25 to 50 %.
    """

    def step(x: jax.Array, draws: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        y = x + width * draws[0]
        accepted = jnp.log(draws[1]) < log_ratio(x, y)  # [chains]
        x = jnp.where(accepted[:, None], y, x)
        return x, (x, accepted)

    return Chain(*jax.lax.scan(step, start, (normal, uniform))[1])


def langevin(field: VectorField, start: jax.Array, normal: jax.Array, step_size: float) -> jax.Array:
    """States [steps, chains, d] of x + step_size / 2 * score(x) + sqrt(step_size) * normal, without a Metropolis correction.

    Stable for step sizes well below the smallest variance of the target, which at noise sigma is at least sigma^2. start: [chains, d];
    normal: [steps, chains, d].
    """

    def step(x: jax.Array, draw: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x + 0.5 * step_size * field(x) + jnp.sqrt(step_size) * draw
        return x, x

    return jax.lax.scan(step, start, normal)[1]


def walk_draws(key: jax.Array, steps: int, chains: int, dimensions: int) -> tuple[jax.Array, jax.Array]:
    """The `normal` [steps, chains, d] and `uniform` [steps, chains] of a walk, float32."""
    proposal_key, acceptance_key = jax.random.split(key)
    # The smallest draw is above 0, whose logarithm would accept anything.
    uniform = jax.random.uniform(acceptance_key, (steps, chains), minval=jnp.finfo(jnp.float32).tiny)
    return jax.random.normal(proposal_key, (steps, chains, dimensions)), uniform
