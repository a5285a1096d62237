"""A soft mixture of small feed-forward networks: every expert sees every token, and a gate weighs what they give.

GM-DF, Lai et al., arXiv 2406.20078: the gate of the framework figure reads an embedding of the example's domain; that of equations 4 and 5
lets the experts' outputs look at each other.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.nn.flops import linear_flops
from maskae.nn.layers import Dtype, gelu, xavier
from maskae.nn.sharding import constrain

GATES = ("figure", "attention")


class Gate(nn.Module):
    """An embedding to weights over experts, in sum 1: `fc1`, GELU, `fc2`, softmax; float32."""

    experts: int
    hidden: int

    @nn.compact
    def __call__(self, embedding: jax.Array) -> jax.Array:
        """[B, E] -> [B, experts]."""
        x = gelu(nn.Dense(self.hidden, kernel_init=xavier, name="fc1")(embedding.astype(jnp.float32)))  # [B, hidden]
        return jax.nn.softmax(nn.Dense(self.experts, kernel_init=xavier, name="fc2")(x), axis=-1)


class ExpertLinear(nn.Module):
    """One linear map per expert: `kernel` [experts, D, outputs], `bias` [experts, outputs]."""

    experts: int
    outputs: int
    kernel_init: nn.initializers.Initializer
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, inputs: int) -> tuple[jax.Array, jax.Array]:
        """The kernel and the bias, in the compute dtype."""
        shape = (inputs, self.outputs)

        def draw(key: jax.Array) -> jax.Array:
            return jnp.stack([self.kernel_init(each, shape, jnp.float32) for each in jax.random.split(key, self.experts)])

        bias = self.param("bias", nn.initializers.zeros, (self.experts, self.outputs))
        return self.param("kernel", draw).astype(self.dtype), bias.astype(self.dtype)


class SoftExperts(nn.Module):
    """`experts` bottlenecks D -> width -> D with a GELU, weighed and summed. The last map starts at 0, so that the sum does.

    `gate` "figure" weighs by `Gate` of the domain's embedding. "attention" weighs, at every token, by how much the experts' outputs look at
    each other: with outputs e_n, the mean over m of softmax_n(e_m . e_n / sqrt(D)).
    """

    experts: int
    width: int
    gate: str = "figure"
    gate_hidden: int = 64
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        """[B, N, D] with an embedding [B, E] of each example's domain -> [B, N, D], to be added to what stands beside the experts."""
        channels = x.shape[-1]
        kernel, bias = ExpertLinear(self.experts, self.width, xavier, self.dtype, name="fc1")(channels)
        hidden = gelu(jnp.einsum("bnd,edw->benw", x, kernel) + bias[:, None])  # [B, experts, N, width]
        hidden = constrain(hidden, "batch")
        kernel, bias = ExpertLinear(self.experts, channels, nn.initializers.zeros, self.dtype, name="fc2")(self.width)
        if self.gate == "figure":
            weights = Gate(self.experts, self.gate_hidden, name="gate")(embedding).astype(self.dtype)  # [B, experts]
            mixed = jnp.einsum("benw,ewd->bnd", hidden * weights[:, :, None, None], kernel)
            return mixed + (weights @ bias)[:, None]  # [B, N, D]
        outputs = jnp.einsum("benw,ewd->bned", hidden, kernel) + bias  # [B, N, experts, D]
        scores = jnp.einsum("bnmd,bned->bnme", outputs, outputs, preferred_element_type=jnp.float32) / math.sqrt(channels)
        weights = jax.nn.softmax(scores, axis=-1).mean(2).astype(self.dtype)  # [B, N, experts]
        return jnp.einsum("bne,bned->bnd", weights, outputs)

    def flops(self, tokens: int, channels: int) -> float:
        """Matmul FLOPs over the tokens of one example; the gate's are left out."""
        return self.experts * (linear_flops(tokens, channels, self.width) + linear_flops(tokens, self.width, channels))
