"""A layer norm whose scale and bias depend on a code per example (GM-DF, Lai et al., arXiv 2406.20078, equation 2)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.nn.layers import Dtype
from maskae.vectors import standardise

zeros = nn.initializers.zeros


class ConditionalLayerNorm(nn.Module):
    """Layer norm with the scale `scale` + code @ `scale_map` and the bias `bias` + code @ `bias_map`; statistics and map in float32.

    `scale` and `bias` [D] are those of a plain norm, so that a pretrained one fits; the maps [E, D] start at 0, and so as that plain norm.
    """

    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, code: jax.Array) -> jax.Array:
        """[B, N, D] with a code [B, E] for each example -> [B, N, D]."""
        width, inputs = x.shape[-1], code.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (width,))
        bias = self.param("bias", zeros, (width,))
        code = code.astype(jnp.float32)
        scale = scale + code @ self.param("scale_map", zeros, (inputs, width))  # [B, D]
        bias = bias + code @ self.param("bias_map", zeros, (inputs, width))  # [B, D]
        return (standardise(x, self.epsilon) * scale[:, None] + bias[:, None]).astype(self.dtype)
