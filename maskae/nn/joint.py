"""The joint encoder of two sets of tokens: one set is encoded while it looks at the other (CROMA, Fuller et al. 2023, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.nn.layers import Attention, AttentionContext, CrossAttention, Dtype, LayerNorm, Mlp
from maskae.nn.sharding import constrain
from maskae.nn.stack import run_blocks
from maskae.nn.vit import Encoded


class Beside(NamedTuple):
    """What every joint block sees besides its tokens [B, n, D].

    Attributes:
        tokens: the other set's encodings [B, m, D].
        own: positions for the attention among the block's tokens.
        cross: positions for the attention of the block's tokens over the others.
    """

    tokens: jax.Array
    own: AttentionContext
    cross: AttentionContext


class JointBlock(nn.Module):
    """x + attention(norm1(x)), then x + cross_attention(norm2(x), norm2(other tokens)) with ONE norm for both, then x + mlp(norm3(x))."""

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
        x = x + Attention(self.heads, "none", self.attention, dtype=self.dtype, name="attention")(branch, context=beside.own)
        norm = LayerNorm(self.epsilon, self.dtype, name="norm2")
        look = CrossAttention(self.heads, False, self.attention, dtype=self.dtype, name="cross_attention")
        x = x + look(norm(x), norm(beside.tokens), context=beside.cross)
        branch = LayerNorm(self.epsilon, self.dtype, name="norm3")(x)
        return x + Mlp(int(x.shape[-1] * self.mlp_ratio), dtype=self.dtype, name="mlp")(branch)


class JointEncoder(nn.Module):
    """`JointBlock`s that look at the same other tokens, and a final norm."""

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
        x, blocks = run_blocks(self, self.blocks, tokens, beside=beside, scan=self.scan, remat=self.remat, collect=collect)
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
