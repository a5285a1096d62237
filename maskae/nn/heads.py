"""Projection and prediction heads on a pooled feature."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.nn.batch_norm import STATISTICS, BatchNorm
from maskae.nn.flops import linear_flops
from maskae.nn.layers import uniform_fan_in

# PyTorch's default of a linear layer: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
linear_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class ProjectionHead(nn.Module):
    """A linear map, or `fc1` -> batch norm (optional) -> ReLU -> `fc2`.

    Args:
        outputs: channels of the result.
        hidden: channels between; None is one linear map, called `fc2`.
        norm: batch norm after `fc1`.
        hidden_bias: a bias in `fc1`.
    """

    outputs: int
    hidden: int | None = None
    norm: bool = False
    hidden_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """[B, D] -> [B, outputs]."""

        def linear(x: jax.Array, width: int, bias: bool, name: str) -> jax.Array:
            bias_init = uniform_fan_in(x.shape[-1])
            return nn.Dense(width, use_bias=bias, kernel_init=linear_init, bias_init=bias_init, dtype=self.dtype, name=name)(x)

        if self.hidden is not None:
            x = linear(x, self.hidden, self.hidden_bias, "fc1")  # [B, hidden]
            if self.norm:
                x = BatchNorm(dtype=self.dtype, name="norm")(x, train=train)
            x = jax.nn.relu(x)
        return linear(x, self.outputs, True, "fc2")  # [B, outputs]

    def start(self, key: jax.Array, inputs: int) -> tuple[Any, Any]:
        """Fresh parameters and batch statistics for features of `inputs` channels."""
        made = self.init(key, jnp.zeros((1, inputs)), train=False)
        return made["params"], made.get(STATISTICS, {})

    def run(self, params: Any, statistics: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        """In training: [B, D] -> [B, outputs], and the moved statistics."""
        apply: Any = self.apply
        y, moved = apply({"params": params, STATISTICS: statistics}, x, train=True, mutable=[STATISTICS])
        return y, moved.get(STATISTICS, statistics)

    def flops(self, inputs: int) -> float:
        """Matmul FLOPs for one feature of `inputs` channels."""
        if self.hidden is None:
            return linear_flops(1, inputs, self.outputs)
        return linear_flops(1, inputs, self.hidden) + linear_flops(1, self.hidden, self.outputs)


def cosine_momentum(step: jax.Array, initial: float, total_steps: float) -> jax.Array:
    """Momentum of a moving average that rises from `initial` to 1 by half a cosine over the run (BYOL, Grill et al. 2020, section 3.2)."""
    share = jnp.clip(step / total_steps, 0.0, 1.0)
    return 1 - (1 - initial) * (jnp.cos(math.pi * share) + 1) / 2
