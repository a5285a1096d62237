"""The transformer block and its parts: float32 parameters, compute in `dtype`, norms and softmax in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice
from maskae.kernels.attention import attention, check_cudnn, check_implementation
from maskae.kernels.attention_cpu import plain_attention
from maskae.kernels.operands import IMPLEMENTATIONS
from maskae.nn.patches import patchify
from maskae.nn.sharding import constrain, gather_parameters
from maskae.vectors import standardise

Initializer = Callable[..., jax.Array]
Dtype = Any

xavier: Initializer = nn.initializers.xavier_uniform()
ATTENTION_IMPLEMENTATIONS = IMPLEMENTATIONS
DTYPES = ("float32", "bfloat16", "float16")
QKV_BIASES = ("all", "query_value", "none")


def gelu(x: jax.Array) -> jax.Array:
    """The exact (erf) GELU; flax and jax default to the tanh approximation, which is off by up to 5e-4."""
    if x.dtype != jnp.float32:
        return jax.nn.gelu(x, approximate=False)  # by erfc: 1 + erf(x) would lose a 16-bit x far below 0
    # As PyTorch computes it. On CPUs erfc is three passes over x, which cost 5 times this one (forward and backward).
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def uniform_fan_in(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the default that frameworks with strided-convolution patch embeddings give their bias."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class LayerNorm(nn.Module):
    """Layer norm over the last axis with parameters `scale` and `bias` [D]; statistics and affine map in float32, output in `dtype`."""

    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return (standardise(x, self.epsilon) * scale + bias).astype(self.dtype)


class PatchEmbed(nn.Module):
    """Patches to tokens by one linear map, the strided convolution of the papers: `kernel` [p*p*C, D], `bias` [D].

    The kernel is Xavier-uniform as a matrix; the bias keeps the convolution's default U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
    """

    patch_size: int
    width: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, N, D]."""
        patches = patchify(images.astype(self.dtype), self.patch_size)  # [B, N, p*p*C]
        fan_in = patches.shape[-1]
        kernel = self.param("kernel", xavier, (fan_in, self.width))
        bias = self.param("bias", uniform_fan_in(fan_in), (self.width,))
        kernel = gather_parameters({"kernel": kernel.astype(self.dtype)})["kernel"]
        return patches @ kernel + bias.astype(self.dtype)  # [B, N, D]


class QkvProjection(nn.Module):
    """Queries, keys and values by ONE map: `kernel` [D, 3, heads, head_dim], `bias` [3, heads, head_dim].

    Being initialised as one (D x 3D) matrix its Xavier bound is sqrt(6 / 4D), sqrt(2) below that of three separate maps.
    `bias_of` is "all", "none", or "query_value" (no bias on keys, where it would not change the output: `bias` is [2, heads, head_dim]).
    """

    heads: int
    bias_of: str = "all"
    kernel_init: Initializer = xavier
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, N, D] -> three of [B, N, heads, head_dim]. Raises UserError where `heads` does not divide D."""
        width = x.shape[-1]
        if width % self.heads:
            raise UserError(f"{self.heads} heads do not divide a width of {width}")
        check_choice("qkv bias", self.bias_of, QKV_BIASES)
        shape = (self.heads, width // self.heads)
        kernel = self.param("kernel", lambda key: self.kernel_init(key, (width, 3 * width), jnp.float32).reshape(width, 3, *shape))
        qkv = jnp.einsum("bnd,dchk->cbnhk", x, kernel.astype(self.dtype))  # [3, B, N, heads, head_dim]
        if self.bias_of != "none":
            bias = self.param("bias", nn.initializers.zeros, (3 if self.bias_of == "all" else 2, *shape)).astype(self.dtype)
            if self.bias_of == "query_value":
                bias = jnp.stack([bias[0], jnp.zeros_like(bias[0]), bias[1]])
            qkv = qkv + bias[:, None, None]
        query, key, value = (constrain(part, "batch", None, "tensor") for part in qkv)
        return query, key, value


class OutProjection(nn.Module):
    """The heads' outputs back to the width: `kernel` [heads, head_dim, D], `bias` [D]."""

    kernel_init: Initializer = xavier
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, heads, head_dim] -> [B, N, heads*head_dim]."""
        heads, head_dim = x.shape[-2:]
        width = heads * head_dim
        kernel = self.param("kernel", lambda key: self.kernel_init(key, (width, width), jnp.float32).reshape(heads, head_dim, width))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        return jnp.einsum("bnhk,hkd->bnd", x, kernel.astype(self.dtype)) + bias.astype(self.dtype)


class AttentionContext(NamedTuple):
    """What attention knows of its tokens besides their vectors; None where something is not used. See `maskae.kernels.attention`.

    Attributes:
        key_mask: bool [B, M], True where a key may be attended to.
        segments: int32 [B, N]; tokens attend to those of their own segment (several samples packed into one row).
        positions: float32 [B, N, C], with `slopes` float32 [heads] for a bias of minus slope times distance.
        key_segments, key_positions: those of the keys, [B, M] and [B, M, C], where these are other tokens than the queries.
    """

    key_mask: jax.Array | None = None
    segments: jax.Array | None = None
    positions: jax.Array | None = None
    slopes: jax.Array | None = None
    key_segments: jax.Array | None = None
    key_positions: jax.Array | None = None


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    context: AttentionContext | None = None,
    soft_cap: float | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """Attention of [B, N, heads, d] over [B, M, heads, d], scale d^-0.5, softmax in float32; with a given bias, or by `context` alone.

    Raises UserError for an unknown implementation, one that cannot do this, and for a bias together with what only `context` can say.
    """
    check_implementation(implementation)
    if bias is None:
        seen = context or AttentionContext()
        return attention(
            query,
            key,
            value,
            key_mask=seen.key_mask,
            query_segments=seen.segments,
            key_segments=seen.segments if seen.key_segments is None else seen.key_segments,
            query_positions=seen.positions,
            key_positions=seen.positions if seen.key_positions is None else seen.key_positions,
            slopes=seen.slopes,
            soft_cap=soft_cap,
            implementation=implementation,
        )
    if context is not None or soft_cap is not None or implementation not in ("auto", "xla", "cudnn"):
        raise UserError("an attention_bias goes with attention 'xla', 'cudnn' or 'auto' alone; positions and slopes go with all")
    if implementation == "cudnn":
        check_cudnn(query.dtype)
        return jax.nn.dot_product_attention(query, key, value, bias=bias, implementation="cudnn")
    return plain_attention(query, key, value, bias=bias, scale=query.shape[-1] ** -0.5)


class Attention(nn.Module):
    """Multi-head self-attention, scale head_dim^-0.5, softmax in float32.

    `implementation` is one of `maskae.kernels.operands.IMPLEMENTATIONS`; "cudnn" needs a GPU and a 16-bit `dtype`. Scores are bounded by
    `soft_cap` where it is given.
    """

    heads: int
    qkv_bias: str = "all"
    implementation: str = "xla"
    kernel_init: Initializer = xavier
    dtype: Dtype = jnp.float32
    soft_cap: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array, attention_bias: jax.Array | None = None, context: AttentionContext | None = None) -> jax.Array:
        """[B, N, D] -> [B, N, D]; `attention_bias` is added to the scaled scores, broadcastable to [B, heads, N, N]."""
        check_implementation(self.implementation)
        if self.implementation == "cudnn":
            check_cudnn(self.dtype)
        query, key, value = QkvProjection(self.heads, self.qkv_bias, self.kernel_init, self.dtype, name="qkv")(x)
        options: dict[str, Any] = {"soft_cap": self.soft_cap, "implementation": self.implementation}
        mixed = attend(query, key, value, bias=attention_bias, context=context, **options)
        return OutProjection(self.kernel_init, self.dtype, name="out")(mixed)


class HeadsProjection(nn.Module):
    """One linear map into heads: `kernel` [D, heads, head_dim] and, where `use_bias`, `bias` [heads, head_dim]."""

    heads: int
    head_dim: int
    use_bias: bool = True
    kernel_init: Initializer = xavier
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, heads, head_dim]."""
        width, shape = x.shape[-1], (self.heads, self.head_dim)
        kernel = self.param("kernel", lambda key: self.kernel_init(key, (width, math.prod(shape)), jnp.float32).reshape(width, *shape))
        projected = jnp.einsum("bnd,dhk->bnhk", x, kernel.astype(self.dtype))  # [B, N, heads, head_dim]
        if self.use_bias:
            projected = projected + self.param("bias", nn.initializers.zeros, shape).astype(self.dtype)
        return constrain(projected, "batch", None, "tensor")


class CrossAttention(nn.Module):
    """Queries from one set of tokens, keys and values from another, by three maps `query`, `key`, `value`, and back by `out`.

    `qkv_bias` is that of all three maps, or of the queries' alone where `key_value_bias` is given; `key_bias` that of the keys alone.
    `key_value_init` draws the kernels of keys and values where it differs from `kernel_init`.
    """

    heads: int
    qkv_bias: bool = True
    implementation: str = "xla"
    kernel_init: Initializer = xavier
    dtype: Dtype = jnp.float32
    soft_cap: float | None = None
    key_value_bias: bool | None = None
    key_bias: bool | None = None
    key_value_init: Initializer | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, seen: jax.Array, attention_bias: jax.Array | None = None, context: AttentionContext | None = None
    ) -> jax.Array:
        """[B, N, D] and what it looks at [B, M, E] -> [B, N, D]; bias and context as for `Attention`, keys being those of `seen`.

        Raises UserError where `heads` does not divide D.
        """
        width = x.shape[-1]
        if width % self.heads:
            raise UserError(f"{self.heads} heads do not divide a width of {width}")
        parts = []
        beside = self.qkv_bias if self.key_value_bias is None else self.key_value_bias
        of_key = beside if self.key_bias is None else self.key_bias
        seen_init = self.key_value_init or self.kernel_init
        maps = (("query", x, self.qkv_bias, self.kernel_init), ("key", seen, of_key, seen_init), ("value", seen, beside, seen_init))
        for name, tokens, bias, kernel_init in maps:
            projection = HeadsProjection(self.heads, width // self.heads, bias, kernel_init, self.dtype, name=name)
            parts.append(projection(tokens))
        options: dict[str, Any] = {"soft_cap": self.soft_cap, "implementation": self.implementation}
        mixed = attend(*parts, bias=attention_bias, context=context, **options)
        return OutProjection(self.kernel_init, self.dtype, name="out")(mixed)


class Mlp(nn.Module):
    """Two linear maps `fc1`, `fc2` with an activation between them."""

    hidden: int
    activation: Callable[[jax.Array], jax.Array] = gelu
    kernel_init: Initializer = xavier
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        width = x.shape[-1]
        x = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=self.kernel_init, name="fc1")(x)  # [B, N, hidden]
        x = self.activation(constrain(x, "batch", None, "tensor"))
        return nn.Dense(width, dtype=self.dtype, kernel_init=self.kernel_init, name="fc2")(x)  # [B, N, D]


def drop_path(branch: jax.Array, rate: jax.Array | float, draw: jax.Array) -> jax.Array:
    """Stochastic depth (Huang et al. 2016) per example: a branch is kept where floor(1 - rate + draw) = 1 and divided by 1 - rate.

    Args:
        branch: [B, N, D].
        rate: scalar in [0, 1).
        draw: uniform float32 [B].
    """
    kept = jnp.floor(1 - rate + draw) / (1 - rate)
    return branch * kept.astype(branch.dtype)[:, None, None]


class DropPath(NamedTuple):
    """Stochastic depth of one block: `rate` scalar, `draws` uniform float32 [2, B] (attention branch, MLP branch)."""

    rate: jax.Array
    draws: jax.Array


class Block(nn.Module):
    """Pre-LN transformer block: x + attention(norm1(x)), then x + mlp(norm2(x)), each branch with optional layer scale and drop path.

    Parameters: norm1, attention/qkv, attention/out, norm2, mlp/fc1, mlp/fc2; with `layer_scale` (its initial value) also layer_scale1 and
    layer_scale2 [D].
    """

    heads: int
    mlp_ratio: float = 4.0
    qkv_bias: str = "all"
    layer_scale: float | None = None
    activation: Callable[[jax.Array], jax.Array] = gelu
    epsilon: float = 1e-6
    attention: str = "xla"
    kernel_init: Initializer = xavier
    dtype: Dtype = jnp.float32
    soft_cap: float | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        attention_bias: jax.Array | None = None,
        drop: DropPath | None = None,
        context: AttentionContext | None = None,
    ) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        x = constrain(x, "batch")
        branch = LayerNorm(self.epsilon, self.dtype, name="norm1")(x)
        mix = Attention(self.heads, self.qkv_bias, self.attention, self.kernel_init, self.dtype, self.soft_cap, name="attention")
        branch = mix(branch, attention_bias, context)
        x = x + self._finish(branch, "layer_scale1", drop, 0)
        branch = LayerNorm(self.epsilon, self.dtype, name="norm2")(x)
        hidden = int(x.shape[-1] * self.mlp_ratio)
        branch = Mlp(hidden, self.activation, self.kernel_init, self.dtype, name="mlp")(branch)
        return x + self._finish(branch, "layer_scale2", drop, 1)

    def _finish(self, branch: jax.Array, name: str, drop: DropPath | None, which: int) -> jax.Array:
        if self.layer_scale is not None:
            scale = self.param(name, nn.initializers.constant(self.layer_scale), (branch.shape[-1],))
            branch = branch * scale.astype(branch.dtype)
        return branch if drop is None else drop_path(branch, drop.rate, drop.draws[which])
