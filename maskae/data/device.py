"""What is done to a batch on the device: pure functions of arrays and keys.

The host sends uint8; normalisation happens here and nowhere else. A draw per example comes from `fold_in(key, example)` with the example's
position in the global batch, so it does not depend on devices, hosts or accumulation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from maskae.data.spec import DataSpec


def normalize(images: Array, spec: DataSpec) -> Array:
    """uint8 [B, H, W, C] -> float32 [B, H, W, C]: (x / max_value - mean) / std, per channel."""
    mean = jnp.asarray(spec.mean, jnp.float32)
    std = jnp.asarray(spec.std, jnp.float32)
    return (images.astype(jnp.float32) / spec.max_value - mean) / std


def denormalize(images: Array, spec: DataSpec) -> Array:
    """float32 [B, H, W, C] in normalised units -> float32 [B, H, W, C] in 0..1, clipped."""
    mean = jnp.asarray(spec.mean, jnp.float32)
    std = jnp.asarray(spec.std, jnp.float32)
    return jnp.clip(images * std + mean, 0.0, 1.0)


def flip(images: Array, example: Array, key: Array, probability: float = 0.5) -> Array:
    """Mirrors each image left to right with `probability`. images: [B, H, W, C], any dtype; example: int32 [B]."""
    chosen = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), probability))(example)  # [B]
    return jnp.where(chosen[:, None, None, None], images[:, :, ::-1], images)
