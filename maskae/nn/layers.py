"""The transformer block and its parts: float32 parameters, compute in `dtype`, norms and softmax in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.errors import UserError, nearest
from maskae.nn.patches import patchify
from maskae.nn.sharding import constrain, gather_parameters

Initializer = Callable[..., jax.Array]
Dtype = Any

xavier: Initializer = nn.initializers.xavier_uniform()
ATTENTION_IMPLEMENTATIONS = ("xla", "cudnn")
DTYPES = ("float32", "bfloat16", "float16")
QKV_BIASES = ("all", "query_value", "none")


def gelu(x: jax.Array) -> jax.Array:
    """The exact (erf) GELU; flax and jax default to the tanh approximation, which is off by up to 5e-4."""
    return jax.nn.gelu(x, approximate=False)


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
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        # The two-pass variance: E[x^2] - E[x]^2 loses the digits that parity needs.
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(self.dtype)


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
        if self.bias_of not in QKV_BIASES:
            raise UserError(f"unknown qkv bias '{self.bias_of}'{nearest(self.bias_of, QKV_BIASES)}; there are {', '.join(QKV_BIASES)}")
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


def check_cudnn(dtype: Dtype) -> None:
    """Raises UserError where cuDNN's fused attention cannot run; jax itself says so late, and with a traceback."""
    if jax.default_backend() != "gpu":
        raise UserError(f"attention 'cudnn' needs an NVIDIA GPU, and this process runs on {jax.default_backend()}; use attention 'xla'")
    if jnp.dtype(dtype).itemsize != 2:
        raise UserError(f"attention 'cudnn' computes in 16 bits, and dtype is {jnp.dtype(dtype)}; use dtype 'bfloat16' or attention 'xla'")


class Attention(nn.Module):
    """Multi-head self-attention, scale head_dim^-0.5, softmax in float32. `implementation` "cudnn" needs a GPU and a 16-bit `dtype`."""

    heads: int
    qkv_bias: str = "all"
    implementation: Any = "xla"
    kernel_init: Initializer = xavier
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, attention_bias: jax.Array | None = None) -> jax.Array:
        """[B, N, D] -> [B, N, D]; `attention_bias` is added to the scaled scores, broadcastable to [B, heads, N, N]."""
        if self.implementation not in ATTENTION_IMPLEMENTATIONS:
            hint = nearest(self.implementation, ATTENTION_IMPLEMENTATIONS)
            raise UserError(f"unknown attention '{self.implementation}'{hint}; there are {', '.join(ATTENTION_IMPLEMENTATIONS)}")
        if self.implementation == "cudnn":
            check_cudnn(self.dtype)
        query, key, value = QkvProjection(self.heads, self.qkv_bias, self.kernel_init, self.dtype, name="qkv")(x)
        mixed = jax.nn.dot_product_attention(query, key, value, bias=attention_bias, implementation=self.implementation)
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

    @nn.compact
    def __call__(self, x: jax.Array, attention_bias: jax.Array | None = None, drop: DropPath | None = None) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        x = constrain(x, "batch")
        branch = LayerNorm(self.epsilon, self.dtype, name="norm1")(x)
        attention = Attention(self.heads, self.qkv_bias, self.attention, self.kernel_init, self.dtype, name="attention")
        branch = attention(branch, attention_bias)
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
