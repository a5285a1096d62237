"""Small maps from a student's features to the width of a teacher's."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.nn.flops import linear_flops
from maskae.nn.layers import Dtype, LayerNorm, gelu, xavier

ADAPTORS = ("linear", "norm_linear", "mlp", "mlp_norm")


class Adaptor(nn.Module):
    """`out` alone ("linear"); `norm`, `out`; `hidden`, GELU, `out` ("mlp"); or `hidden`, `norm`, `out` ("mlp_norm"); Xavier, bias 0."""

    outputs: int
    kind: str = "linear"
    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., outputs]."""
        if self.kind.startswith("mlp"):
            x = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=xavier, name="hidden")(x)
        if self.kind == "mlp":
            x = gelu(x)
        elif self.kind != "linear":
            x = LayerNorm(self.epsilon, self.dtype, name="norm")(x)
        return nn.Dense(self.outputs, dtype=self.dtype, kernel_init=xavier, name="out")(x)  # [..., outputs]

    def flops(self, tokens: int, inputs: int) -> float:
        """Matmul FLOPs for so many tokens of `inputs` channels."""
        hidden = linear_flops(tokens, inputs, inputs) if self.kind.startswith("mlp") else 0.0
        return hidden + linear_flops(tokens, inputs, self.outputs)
