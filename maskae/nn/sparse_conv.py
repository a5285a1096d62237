"""Convolutions that see visible positions only, emulated densely as in SparK (Tian et al., ICLR 2023, arXiv 2301.03580, section 3.2).

After every convolution and pooling the output is multiplied by the visibility map at its resolution, so that nothing leaks over the border
of a masked cell and masked positions stay exactly 0. There is no saving of operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.errors import UserError


def visible_at(visible: jax.Array, size: Sequence[int]) -> jax.Array:
    """The visibility map [B, h, w] (any dtype) with each cell repeated to [B, *size]. Raises UserError where `size` is no multiple."""
    rows, columns = visible.shape[1:]
    if size[0] % rows or size[1] % columns:
        raise UserError(f"a mask of {rows} x {columns} cells does not fit a map of {size[0]} x {size[1]}: not a multiple")
    return jnp.repeat(jnp.repeat(visible, size[0] // rows, 1), size[1] // columns, 2)


def masked(x: jax.Array, visible: jax.Array | None) -> jax.Array:
    """`x` [B, H, W, C] with 0 where `visible` bool [B, h, w] (its cells repeated) is False; `x` itself where `visible` is None.

    A selection and not a product: what is hidden has no influence even where it is not finite.
    """
    return x if visible is None else jnp.where(visible_at(visible, x.shape[1:3])[..., None], x, jnp.zeros((), x.dtype))


def max_pool(x: jax.Array, window: int = 3, stride: int = 2, padding: int = 1) -> jax.Array:
    """Max pooling [B, H, W, C] -> [B, H', W', C] with `padding` rows of -infinity on every side (torchvision's stem: 3, 2, 1)."""
    return nn.max_pool(x, (window, window), (stride, stride), ((padding, padding), (padding, padding)))
