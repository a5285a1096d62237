"""Variables of a system in its own shapes, drawn by numpy: compiling an initialisation takes longer than most tests of what comes after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskae.paths import map_paths

ONES = ("scale", "variance")


def drawn(init: Callable[..., Any], *arguments: Any, seed: int = 0) -> Any:
    """What `init(*arguments)` returns, with other values: kernels, tokens and tables normal, biases and means 0, scales and variances 1.

    Leaves of two axes or more have a deviation of 1 / sqrt(all axes but the last). Integer leaves are 0.
    """
    generator = np.random.default_rng(seed)

    def leaf(path: str, shape: Any) -> jax.Array:
        last = path.rsplit("/", 1)[-1]
        if len(shape.shape) < 2 or last == "bias" or not jnp.issubdtype(shape.dtype, jnp.floating):
            return jnp.full(shape.shape, last in ONES, shape.dtype)
        values = generator.standard_normal(shape.shape) / np.sqrt(np.prod(shape.shape[:-1]))
        return jnp.asarray(values, shape.dtype)

    found = jax.eval_shape(init, *arguments)
    return type(found)(*(map_paths(leaf, part) for part in found))
