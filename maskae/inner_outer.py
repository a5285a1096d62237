"""A gradient step inside a loss (MAML, Finn et al., ICML 2017; GM-DF, Lai et al., arXiv 2406.20078, equations 13 to 15)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Adapted(NamedTuple):
    """`params` after the step; `value` (scalar) and `rest` of the objective before it; `gradient_norm`, float32, of the step."""

    params: Any
    value: jax.Array
    rest: Any
    gradient_norm: jax.Array


def inner_step(
    objective: Callable[[Any], tuple[jax.Array, Any]], params: Any, rate: float, *, first_order: bool = False
) -> Adapted:
    """One step of gradient descent on `objective(params) -> (scalar, rest)` that an outer gradient looks through.

    The gradient is that of the global batch: inside one jitted program over a mesh the compiler sums it over devices before the step, so
    that all of them adapt alike.

    Args:
        objective: differentiable twice, unless `first_order`.
        params: float32 leaves that take the step.
        rate: of the step; 0 takes none and costs nothing.
        first_order: the outer gradient takes the inner one for a constant.
    """
    if not rate:
        value, rest = objective(params)
        return Adapted(params, value, rest, jnp.zeros(()))
    (value, rest), gradient = jax.value_and_grad(objective, has_aux=True)(params)
    if first_order:
        gradient = jax.lax.stop_gradient(gradient)
    squares = [jnp.square(leaf).sum() for leaf in jax.tree.leaves(jax.lax.stop_gradient(gradient))]
    adapted = jax.tree.map(lambda leaf, slope: leaf - rate * slope, params, gradient)
    return Adapted(adapted, value, rest, jnp.sqrt(jnp.stack(squares).sum()))
