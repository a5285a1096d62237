"""Initial values that depend on a parameter's place alone, drawn anew over a finished tree."""

from __future__ import annotations

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp


def uniform_by_fan_in(params: Any, key: jax.Array, path: str = "") -> Any:
    """Every linear map drawn anew from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), kernel and bias: what papers get that set nothing in PyTorch.

    A linear map is a dict with a `kernel`: its last axis is the output, or all but its first one where the map goes into heads. Norms and
    tokens keep their values. Each array's draw depends on `key` and its path.

    Args:
        params: nested dict of float32 arrays.
    """
    if not isinstance(params, dict):
        return params
    if "kernel" not in params:
        return {name: uniform_by_fan_in(value, key, f"{path}/{name}") for name, value in params.items()}
    shape = params["kernel"].shape
    inputs = shape[:-1] if path.endswith("/out") else shape[:1]
    bound = 1 / math.sqrt(math.prod(inputs))

    def draw(name: str, leaf: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, zlib.crc32(f"{path}/{name}".encode()))
        return jax.random.uniform(own, leaf.shape, jnp.float32, -bound, bound)

    return {name: draw(name, leaf) for name, leaf in params.items()}
