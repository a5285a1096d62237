"""The joint encoder of two sets of tokens: one set is encoded while it looks at the other (CROMA, Fuller et al. 2023, section 3)."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.nn.layers import Attention, Dtype, LayerNorm, Mlp, OutProjection
from maskae.nn.sharding import constrain
from maskae.nn.stack import run_blocks
from maskae.nn.vit import Encoded


class Beside(NamedTuple):
    """What every joint block sees besides its tokens [B, n, D].

    Attributes:
        context: the other set's encodings [B, m, D].
        self_bias: of the scores among the tokens, broadcastable to [B, heads, n, n].
        cross_bias: of the scores of tokens and context, broadcastable to [B, heads, n, m].
    """

    context: jax.Array
    self_bias: Any
    cross_bias: Any


class HeadsProjection(nn.Module):
    """One linear map into heads, without bias: `kernel` [D, heads, head_dim]."""

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, n, D] -> [B, n, heads, head_dim]."""
        width = x.shape[-1]
        shape = (width, self.heads, width // self.heads)
        kernel = self.param("kernel", nn.initializers.xavier_uniform(in_axis=0, out_axis=(1, 2)), shape)
        return constrain(jnp.einsum("bnd,dhk->bnhk", x, kernel.astype(self.dtype)), "batch", None, "tensor")


class CrossAttention(nn.Module):
    """Queries from one set, keys and values from another, each by its own map without bias."""

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array, bias: Any) -> jax.Array:
        """[B, n, D] and [B, m, D] -> [B, n, D]."""
        query = HeadsProjection(self.heads, self.dtype, name="query")(x)
        key = HeadsProjection(self.heads, self.dtype, name="key")(context)
        value = HeadsProjection(self.heads, self.dtype, name="value")(context)
        mixed = jax.nn.dot_product_attention(query, key, value, bias=bias)
        return OutProjection(dtype=self.dtype, name="out")(mixed)


class JointBlock(nn.Module):
    """x + attention(norm1(x)), then x + cross_attention(norm2(x), norm2(context)) with ONE norm for both, then x + mlp(norm3(x))."""

    heads: int
    mlp_ratio: float = 4.0
    epsilon: float = 1e-6
    attention: str = "xla"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, beside: Beside, drop: None = None) -> jax.Array:
        """[B, n, D] -> [B, n, D]."""
        x = constrain(x, "batch")
        branch = LayerNorm(self.epsilon, self.dtype, name="norm1")(x)
        x = x + Attention(self.heads, "none", self.attention, dtype=self.dtype, name="attention")(branch, beside.self_bias)
        norm = LayerNorm(self.epsilon, self.dtype, name="norm2")
        x = x + CrossAttention(self.heads, self.dtype, name="cross_attention")(norm(x), norm(beside.context), beside.cross_bias)
        branch = LayerNorm(self.epsilon, self.dtype, name="norm3")(x)
        return x + Mlp(int(x.shape[-1] * self.mlp_ratio), dtype=self.dtype, name="mlp")(branch)


class JointEncoder(nn.Module):
    """`JointBlock`s over the same context, and a final norm."""

    depth: int
    heads: int
    mlp_ratio: float = 4.0
    epsilon: float = 1e-6
    attention: str = "xla"
    scan: bool = False
    remat: str = "none"
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declare the submodules under the names that stored weights have."""
        sizes = (self.heads, self.mlp_ratio, self.epsilon, self.attention, self.dtype)
        self.blocks = [JointBlock(*sizes, name=f"block_{i}") for i in range(self.depth)]
        self.norm = LayerNorm(self.epsilon, self.dtype)

    def __call__(self, tokens: jax.Array, beside: Beside, collect: bool = False) -> Encoded:
        """[B, n, D] -> [B, n, D]."""
        # The stack hands every block its second argument as it is.
        own: Any = self.blocks
        seen: Any = beside
        x, blocks = run_blocks(self, own, tokens, attention_bias=seen, scan=self.scan, remat=self.remat, collect=collect)
        return Encoded(self.norm(x), blocks)


class PooledFeedForward(nn.Module):
    """Mean over tokens, norm, two linear maps with a GELU between them: `norm`, `mlp/fc1`, `mlp/fc2`."""

    mlp_ratio: float = 4.0
    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, n, D] -> [B, D]."""
        pooled = LayerNorm(self.epsilon, self.dtype, name="norm")(tokens.mean(1))
        return Mlp(int(tokens.shape[-1] * self.mlp_ratio), dtype=self.dtype, name="mlp")(pooled)
