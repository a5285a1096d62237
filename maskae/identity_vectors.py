"""Vectors of people who do not exist, and variations of them (Vec2Face, arXiv 2409.02979, section 3.3 and the released code)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maskae.errors import UserError


def vary(vectors: jax.Array, noise: jax.Array) -> jax.Array:
    """Vectors [B, D] plus `noise` [B, D], of the vectors' own lengths.

    For elements of unit variance and noise of deviation s the mean cosine to the vector is 1 / sqrt(1 + s^2).
    """
    moved = vectors + noise
    lengths = [jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (vectors, moved)]
    return moved * (lengths[0] / lengths[1])


def descend(loss: Callable[[jax.Array], jax.Array], vectors: jax.Array, steps: int, rate: float = 0.1) -> jax.Array:
    """Vectors [B, D] after `steps` steps of Adam down `loss`, a function of them with a scalar value."""
    rule = optax.adam(rate)

    def step(carry: tuple[jax.Array, optax.OptState], _: None) -> tuple[tuple[jax.Array, optax.OptState], None]:
        moved, moments = carry
        change, moments = rule.update(jax.grad(loss)(moved), moments)
        return (moved + jnp.asarray(change), moments), None

    (moved, _), _ = jax.lax.scan(step, (vectors, rule.init(vectors)), None, length=steps)
    return moved


def sample_identities(
    means: np.ndarray, count: int, *, components: int, largest_cosine: float = 0.3, seed: int = 0, attempts: int = 20
) -> np.ndarray:
    """New identity vectors: normal draws in the principal components of real identities, those too near to an accepted one dropped.

    Args:
        means: float [identities, D], the mean feature of each.
        count: how many are wanted.
        components: at most min(identities, D).
        largest_cosine: between any two that are accepted.
        seed: of the draws.
        attempts: rounds of `count` candidates.

    Returns:
        float32 [count, D]. Raises UserError where too few candidates are far enough from one another.
    """
    centre = means.mean(0)
    _, spread, axes = np.linalg.svd(means - centre, full_matrices=False)
    components = min(components, len(spread))
    deviation = spread[:components] / np.sqrt(max(len(means) - 1, 1))
    generator = np.random.default_rng(seed)
    accepted: list[np.ndarray] = []
    units: list[np.ndarray] = []
    for _ in range(attempts):
        for candidate in centre + (generator.standard_normal((count, components)) * deviation) @ axes[:components]:
            unit = candidate / max(np.linalg.norm(candidate), 1e-12)
            if not units or (np.stack(units) @ unit).max() <= largest_cosine:
                accepted.append(candidate)
                units.append(unit)
            if len(accepted) == count:
                return np.stack(accepted).astype(np.float32)
    raise UserError(f"only {len(accepted)} of {count} identities have cosines of at most {largest_cosine} to another; allow larger ones")
