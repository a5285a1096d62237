"""The arguments that every system around a plain ViT has, their checks, and what follows from them alone."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from maskae.errors import check_choice, check_heads
from maskae.nn.flops import block_flops, linear_flops
from maskae.nn.layers import ATTENTION_IMPLEMENTATIONS, DTYPES
from maskae.nn.patches import patch_grid
from maskae.nn.stack import REMAT_POLICIES
from maskae.nn.vit import ViTEncoder

POOLS = ("mean", "cls")


@dataclass(frozen=True)
class ViTArguments:
    """Base of the systems around one plain ViT, with ViT-B/16's values; a system adds its own fields and extends `__post_init__`.

    Args:
        image_size: pixels, one number or (height, width).
        pool: what `features` calls pooled, "mean" of the patch tokens or "cls".
        dtype: of the computation; parameters, norms, softmax and loss are float32.
        scan, remat, attention: see `maskae.nn.stack.run_blocks` and `maskae.nn.layers.Attention`.

    Raises:
        UserError: where the sizes do not fit together or a name is unknown.
    """

    image_size: int | tuple[int, int] = 224
    channels: int = 3
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    _: KW_ONLY
    pool: str = "mean"
    dtype: str = "float32"
    scan: bool = False
    remat: str = "none"
    attention: str = "xla"

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        check_choice("pool", self.pool, POOLS)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("remat", self.remat, REMAT_POLICIES)
        check_choice("attention", self.attention, ATTENTION_IMPLEMENTATIONS)
        check_heads("width", self.width, self.heads)
        patch_grid(*self._pixels, self.patch_size)

    @property
    def _pixels(self) -> tuple[int, int]:
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        return patch_grid(*self._pixels, self.patch_size)

    def grid_of(self, images: Any) -> tuple[int, int]:
        """Rows and columns of patches of `images` [B, H, W, C] of any size. Raises UserError where patches do not tile them."""
        return patch_grid(images.shape[1], images.shape[2], self.patch_size)

    @property
    def patch_values(self) -> int:
        """Numbers in one patch."""
        return self.patch_size**2 * self.channels

    @property
    def compute(self) -> dict[str, Any]:
        """How stacks of blocks compute."""
        return {"dtype": jnp.dtype(self.dtype), "scan": self.scan, "remat": self.remat, "attention": self.attention}

    def blank_images(self) -> jax.Array:
        """One image of zeros [1, H, W, C], for initialisation."""
        return jnp.zeros((1, *self._pixels, self.channels))

    def vit(self, **options: Any) -> ViTEncoder:
        """The encoder; `options` are fields of `ViTEncoder` beyond the sizes."""
        return ViTEncoder(self.patch_size, self.width, self.depth, self.heads, self.grid, self.mlp_ratio, **self.compute, **options)

    def vit_flops(self, grid: tuple[int, int], patches: int | None = None) -> float:
        """Patch projection of all patches of the grid, and the blocks on CLS and `patches` of them, by default all."""
        length = grid[0] * grid[1]
        blocks = self.depth * block_flops(1 + (length if patches is None else patches), self.width, self.mlp_ratio)
        return linear_flops(length, self.patch_values, self.width) + blocks

    def named_features(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """Tokens [B, 1+N, D] -> `cls` [B, D], `tokens` [B, N, D] and `pooled` [B, D] as `pool` says, float32."""
        tokens = tokens.astype(jnp.float32)
        cls, patches = tokens[:, 0], tokens[:, 1:]
        return {"pooled": patches.mean(1) if self.pool == "mean" else cls, "cls": cls, "tokens": patches}
