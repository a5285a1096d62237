"""A decoder in which every removed patch looks at the encoder's tokens and at no other removed patch (CrossMAE).

"Rethinking Patch Dependence for Masked Autoencoders", Fu et al. 2024, arXiv 2401.14391, section 3.2; without its weighted features of all
encoder blocks (section 3.3). As the predictions do not depend on each other, any subset of the removed patches can be predicted.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.nn.layers import CrossAttention, Dtype, LayerNorm, Mlp, xavier
from maskae.nn.positions import sincos_2d
from maskae.nn.sharding import constrain
from maskae.nn.stack import run_blocks
from maskae.nn.vit import TOKEN_STD, Encoded


class CrossBlock(nn.Module):
    """x + attention(norm1(x), seen), then x + mlp(norm2(x)): parameters norm1, attention/{query,key,value,out}, norm2, mlp/{fc1,fc2}."""

    heads: int
    mlp_ratio: float = 4.0
    epsilon: float = 1e-6
    attention: str = "xla"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, seen: jax.Array, drop: None = None) -> jax.Array:
        """[B, R, d] that look at [B, S, d] -> [B, R, d]."""
        x = constrain(x, "batch")
        branch = LayerNorm(self.epsilon, self.dtype, name="norm1")(x)
        x = x + CrossAttention(self.heads, implementation=self.attention, dtype=self.dtype, name="attention")(branch, seen)
        branch = LayerNorm(self.epsilon, self.dtype, name="norm2")(x)
        return x + Mlp(int(x.shape[-1] * self.mlp_ratio), dtype=self.dtype, name="mlp")(branch)


class CrossDecoder(nn.Module):
    """Mask tokens with the positions of the patches to predict, cross-attention blocks, norm, one linear map to the patch's values."""

    width: int
    depth: int
    heads: int
    outputs: int
    mlp_ratio: float = 4.0
    epsilon: float = 1e-6
    attention: str = "xla"
    scan: bool = False
    remat: str = "none"
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declare the submodules under the names that stored weights have."""
        self.embed = nn.Dense(self.width, dtype=self.dtype, kernel_init=xavier)
        self.mask_token = self.param("mask_token", nn.initializers.normal(TOKEN_STD), (1, 1, self.width))
        sizes = (self.heads, self.mlp_ratio, self.epsilon, self.attention, self.dtype)
        self.blocks = [CrossBlock(*sizes, name=f"block_{i}") for i in range(self.depth)]
        self.norm = LayerNorm(self.epsilon, self.dtype)
        self.head = nn.Dense(self.outputs, dtype=self.dtype, kernel_init=xavier)

    def __call__(self, latent: jax.Array, indices: jax.Array, grid: tuple[int, int], collect: bool = False) -> Encoded:
        """Predictions of the patches `indices` int32 [B, R] of `grid` from encoder tokens [B, S, D] -> [B, R, p*p*C]."""
        # The positions of what is seen are those that the encoder put into it.
        seen = constrain(self.embed(latent), "batch")  # [B, S, d]
        positions = jnp.asarray(sincos_2d(self.width, grid, cls_token=False))[indices]  # [B, R, d]
        x = constrain((self.mask_token + positions).astype(self.dtype), "batch")
        x, outputs = run_blocks(self, self.blocks, x, beside=seen, scan=self.scan, remat=self.remat, collect=collect)
        return Encoded(self.head(self.norm(x)), outputs)  # [B, R, p*p*C]
