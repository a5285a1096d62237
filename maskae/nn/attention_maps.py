"""The softmax weights of one block, which fused attention does not return: computed once more from its input, and drawn."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from maskae.nn.layers import LayerNorm, QkvProjection
from maskae.nn.patches import patch_grid, patchify, unpatchify


def attention_weights(
    params: dict[str, Any], x: jax.Array, heads: int, *, rows: int | None = None, epsilon: float = 1e-6, qkv_bias: str = "all"
) -> jax.Array:
    """How much the first `rows` tokens (None: all) look at every token in a pre-LN block, float32 [B, heads, rows, N].

    Args:
        params: of the block (`norm1`, `attention/qkv`).
        x: the block's input [B, N, D]; its dtype is that of the computation, with scores and softmax in float32.
        heads: of the block.
        rows: 1 is the CLS token's row alone.
        epsilon, qkv_bias: as of the block.
    """
    norm: Any = LayerNorm(epsilon, x.dtype).apply
    return look_weights(params["attention"]["qkv"], norm({"params": params["norm1"]}, x), heads, rows=rows, qkv_bias=qkv_bias)


def look_weights(
    qkv: dict[str, Any], x: jax.Array, heads: int, *, rows: int | None = None, qkv_bias: str = "all"
) -> jax.Array:
    """The same of what an attention itself gets, [B, N, D]: normalised already. `qkv` are the parameters of its projection."""
    # Without a parent: a module's method may call this, and must not become the owner.
    project: Any = QkvProjection(heads, qkv_bias, dtype=x.dtype, parent=None).apply
    query, key, _ = project({"params": qkv}, x)
    scores = jnp.einsum("bnhd,bmhd->bhnm", query[:, :rows], key, preferred_element_type=jnp.float32)  # [B, heads, rows, N]
    return jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1)


def shade_patches(images: jax.Array, weights: jax.Array, patch_size: int) -> jax.Array:
    """Normalised images [B, H, W, C], each patch times its weight of [B, L] over the image's largest: what has none turns the mean grey."""
    share = weights / jnp.maximum(weights.max(1, keepdims=True), 1e-12)  # [B, L]
    grid = patch_grid(images.shape[1], images.shape[2], patch_size)
    return unpatchify(patchify(images, patch_size) * share[:, :, None], grid, patch_size)
