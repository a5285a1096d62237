"""A pre-norm transformer block with dropout in attention, projection and MLP, under the parameter names of `maskae.nn.layers.Block`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.kernels.attention import attention
from maskae.keys import purpose_key
from maskae.nn.layers import Dtype, LayerNorm, OutProjection, QkvProjection, gelu, xavier
from maskae.nn.sharding import constrain


@partial(jax.tree_util.register_dataclass, data_fields=["key", "example"], meta_fields=["rate"])
@dataclass(frozen=True)
class Dropout:
    """Draws by `key` and each example's position in the global batch, `example` int32 [B], at `rate`, which is static."""

    rate: float
    key: jax.Array
    example: jax.Array

    def within(self, name: str) -> Dropout:
        """The same for one part, with draws of its own."""
        return replace(self, key=purpose_key(self.key, name))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, ...] with elements set to 0 at `rate` and the others scaled up."""
        draw = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(self.key, i), 1 - self.rate, x.shape[1:]))
        return jnp.where(draw(self.example), x / (1 - self.rate), 0)


def dropped(x: jax.Array, dropout: Dropout | None, name: str) -> jax.Array:
    """`x` with the dropout of the part `name`; unchanged without one."""
    return x if dropout is None or not dropout.rate else dropout.within(name)(x)


class DropoutAttention(nn.Module):
    """Self-attention; with dropout its weights are written out, without it the shared kernel computes it."""

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        query, key, value = QkvProjection(self.heads, dtype=self.dtype, name="qkv")(x)
        if dropout is None or not dropout.rate:
            mixed = attention(query, key, value, implementation="xla")
        else:
            scores = jnp.einsum("bnhk,bmhk->bhnm", query, key) * query.shape[-1] ** -0.5
            mixed = jnp.einsum("bhnm,bmhk->bnhk", dropped(jax.nn.softmax(scores), dropout, "weights"), value)
        return dropped(OutProjection(dtype=self.dtype, name="out")(mixed), dropout, "out")


class DropoutMlp(nn.Module):
    """fc1, GELU, fc2, dropout after both."""

    hidden: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        inside = gelu(nn.Dense(self.hidden, dtype=self.dtype, kernel_init=xavier, name="fc1")(x))  # [B, N, hidden]
        mixed = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=xavier, name="fc2")(dropped(inside, dropout, "hidden"))
        return dropped(mixed, dropout, "output")


class DropoutBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); float32, or float64 where `dtype` is."""

    heads: int
    mlp_ratio: float = 4.0
    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        """[B, N, D] -> [B, N, D]; no dropout in evaluation."""
        within = [None, None] if dropout is None else [dropout.within(name) for name in ("attention", "mlp")]
        x = constrain(x, "batch")
        branch = LayerNorm(self.epsilon, self.dtype, name="norm1")(x)
        x = x + DropoutAttention(self.heads, self.dtype, name="attention")(branch, within[0])
        hidden = int(x.shape[-1] * self.mlp_ratio)
        branch = LayerNorm(self.epsilon, self.dtype, name="norm2")(x)
        return x + DropoutMlp(hidden, self.dtype, name="mlp")(branch, within[1])
