"""Vec2Face's generator: one vector, spread into the rows of a feature map, through a masked autoencoder of rows to an image."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.masking import take_tokens
from maskae.nn.conv_decoder import ConvDecoder
from maskae.nn.dropout_block import Dropout, DropoutBlock, dropped
from maskae.nn.flops import block_flops, linear_flops
from maskae.nn.layers import Dtype, LayerNorm, xavier
from maskae.nn.row_mask import RowMask

EPSILON = 1e-6
position_init = nn.initializers.normal(0.02)


class Painted(NamedTuple):
    """`image` float32 [B, H, W, C], `logits` [B, 1 + rows, e], `rows` [B, 1 + rows, e] before masking, and the parts by name."""

    image: jax.Array
    logits: jax.Array
    rows: jax.Array
    named: dict[str, jax.Array]


class VectorAutoencoder(nn.Module):
    """The generator. Names: `vector`, `rows`, `encoder_*`, `decoder_*`, `project`, `image/...`.

    Args:
        grid: rows and columns of the feature map.
        width: of a row, e.
        depth, heads: of the encoder; `decoder_depth`, `decoder_heads` of the decoder.
        map_channels: of the image decoder's input.
        image: the image decoder.
        remat: compute every block anew in the backward pass.
        dtype: of all but the image decoder; float64 in comparisons with recorded references.
    """

    grid: tuple[int, int]
    width: int
    depth: int
    heads: int
    decoder_depth: int
    decoder_heads: int
    mlp_ratio: float
    map_channels: int
    image: ConvDecoder
    remat: bool = False
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """The parts; the decoder is as wide as the encoder."""
        length = 1 + self.grid[0] * self.grid[1]
        block = nn.remat(DropoutBlock, prevent_cse=False) if self.remat else DropoutBlock
        self.vector = nn.Dense(self.width, dtype=self.dtype, kernel_init=xavier)
        self.rows = nn.Dense(length - 1, dtype=self.dtype, kernel_init=xavier)
        self.encoder_position = self.param("encoder_position", position_init, (length, self.width))
        self.encoder_embed_norm = LayerNorm(EPSILON, self.dtype)
        self.encoder_block = [block(self.heads, self.mlp_ratio, EPSILON, self.dtype) for _ in range(self.depth)]
        self.encoder_norm = LayerNorm(EPSILON, self.dtype)
        self.decoder_embed = nn.Dense(self.width, dtype=self.dtype, kernel_init=xavier)
        self.decoder_position = self.param("decoder_position", position_init, (1, length, self.width))
        self.decoder_block = [block(self.decoder_heads, self.mlp_ratio, EPSILON, self.dtype) for _ in range(self.decoder_depth)]
        self.decoder_norm = LayerNorm(EPSILON, self.dtype)
        self.project = nn.Dense(self.map_channels, dtype=self.dtype, kernel_init=xavier)

    def expand(self, vectors: jax.Array) -> jax.Array:
        """Vectors [B, D] -> [f, w_1 f + b_1, w_2 f + b_2, ...] [B, 1 + rows, e]: all rows are affine copies of one."""
        f = self.vector(vectors)  # [B, e]
        copies = self.rows(f[..., None]).swapaxes(1, 2)  # [B, rows, e]
        return jnp.concatenate([f[:, None], copies], axis=1)

    def __call__(self, vectors: jax.Array, mask: RowMask, dropout: Dropout | None = None) -> Painted:
        """Vectors [B, D] and a mask over the rows -> the image."""
        rows = self.expand(vectors)
        named: dict[str, jax.Array] = {}
        embedded = jnp.where(mask.filled[..., None], rows[:, :1], rows) + self.encoder_position
        embedded = dropped(self.encoder_embed_norm(embedded), dropout, "embed")
        named["embedded_tokens"] = embedded
        x = take_tokens(embedded, mask.keep)  # [B, 1 + kept, e]
        for number, block in enumerate(self.encoder_block):
            x = block(x, None if dropout is None else dropout.within(f"encoder_{number}"))
            named.setdefault("after_block0", x)
        x = named["latent"] = self.encoder_norm(x)
        x = self.decoder_embed(x)
        # Where row j lies among the kept ones; of the filled ones it is not used.
        place = jnp.cumsum(~mask.dropped, axis=1) - 1
        x = jnp.where(mask.filled[..., None], x[:, :1], take_tokens(x, place))  # [B, 1 + rows, e]
        x = named["decoder_input"] = x + self.decoder_position
        for number, block in enumerate(self.decoder_block):
            x = block(x, None if dropout is None else dropout.within(f"decoder_{number}"))
            named.setdefault("after_decoder_block0", x)
        logits = self.decoder_norm(x)
        projected = self.project(logits[:, 1:]).reshape(len(x), *self.grid, self.map_channels)  # [B, h, w, channels]
        image, maps = self.image(projected)
        return Painted(image, logits, rows, named | maps | {"projected": projected})

    def flops(self, features: int, dropped_rows: int) -> float:
        """Matmul FLOPs (2 per multiply-add) of one image."""
        length = 1 + self.grid[0] * self.grid[1]
        total = linear_flops(1, features, self.width) + linear_flops(length - 1, 1, self.width)
        total += self.depth * block_flops(length - dropped_rows, self.width, self.mlp_ratio)
        total += linear_flops(length - dropped_rows, self.width, self.width)
        total += self.decoder_depth * block_flops(length, self.width, self.mlp_ratio)
        total += linear_flops(length - 1, self.width, self.map_channels)
        return total + self.image.flops(self.grid[0], self.map_channels)


def init_generator(module: VectorAutoencoder, key: jax.Array, features: int) -> dict[str, Any]:
    """Fresh parameters for vectors of length `features`."""
    length = 1 + module.grid[0] * module.grid[1]
    nothing = jnp.zeros((1, length), bool)
    mask = RowMask(jnp.arange(length)[None], nothing, nothing)
    return dict(module.init(key, jnp.zeros((1, features)), mask)["params"])
