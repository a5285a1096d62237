"""The two criteria of regularised autoencoders, for any map r: [..., d] -> [..., d] (Alain and Bengio, JMLR 15, 2014).

Both sum squares over dimensions. Both have, on enough data, an optimum with r(x) - x = sigma^2 grad log p(x) + o(sigma^2).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Map = Callable[[jax.Array], jax.Array]


def standard_noise(rng: jax.Array, example: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 [B, *shape]; row i depends on `rng` and `example[i]` (int32 [B]) alone."""
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(rng, i), shape))(example)


def annealed_noise(step: jax.Array, start: float, end: float, steps: int) -> jax.Array:
    """A standard deviation that falls geometrically from `start` to `end` over `steps` steps and stays there; float32 scalar.

    At a small one from the start training stalls: beside the identity, what says something of the score is of order sigma^2.
    """
    share = jnp.clip(step / max(steps, 1), 0.0, 1.0) if steps else 1.0
    return jnp.asarray(start * (end / start) ** share, jnp.float32)


def denoising_error(reconstruct: Map, x: jax.Array, noise: jax.Array) -> jax.Array:
    """|r(x + noise) - x|^2 of each row, [B]; the target is the clean point. x, noise: [B, d]."""
    return jnp.square(reconstruct(x + noise) - x).sum(-1)


def contractive_error(reconstruct: Map, x: jax.Array, weight: jax.Array | float, probes: jax.Array | None = None) -> jax.Array:
    """|r(x) - x|^2 + weight |dr/dx|_F^2 of each row, [B]: the Jacobian of the whole map, not of an encoder.

    Args:
        reconstruct: r.
        x: [B, d].
        weight: lambda, which is sigma^2 in the theorems.
        probes: [P, B, d] for an estimate of the Jacobian's norm; None computes it exactly, which costs d forward passes.
    """
    norm = jacobian_norm(reconstruct, x) if probes is None else estimated_jacobian_norm(reconstruct, x, probes)
    return jnp.square(reconstruct(x) - x).sum(-1) + weight * norm


def jacobian(reconstruct: Map, x: jax.Array) -> jax.Array:
    """dr_i/dx_j at every row of x [B, d], [B, d, d]."""
    return jax.vmap(jax.jacfwd(reconstruct))(x)


def jacobian_norm(reconstruct: Map, x: jax.Array) -> jax.Array:
    """|dr/dx|_F^2 at every row of x [B, d], [B]."""
    return jnp.square(jacobian(reconstruct, x)).sum((-2, -1))


def estimated_jacobian_norm(reconstruct: Map, x: jax.Array, probes: jax.Array) -> jax.Array:
    """Hutchinson's estimate of it, the mean of |J v|^2 over probes [P, B, d] with E v v^T = I; [B] of x [B, d]."""
    products = jax.vmap(lambda probe: jax.jvp(reconstruct, (x,), (probe,))[1])(probes)  # [P, B, d]
    return jnp.square(products).sum(-1).mean(0)


def asymmetry(matrices: jax.Array) -> jax.Array:
    """|J - J^T|_F / |J|_F of square matrices [..., d, d], [...]: 0 where r - x is the gradient of something."""
    difference = jnp.square(matrices - jnp.swapaxes(matrices, -1, -2)).sum((-2, -1))
    return jnp.sqrt(difference / jnp.maximum(jnp.square(matrices).sum((-2, -1)), 1e-12))
