"""The plain vision transformer encoder and the masked autoencoder's decoder (He et al. 2022, section 3)."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.errors import UserError
from maskae.masking import restore_tokens, take_tokens
from maskae.nn.layers import AttentionContext, Block, DropPath, Dtype, LayerNorm, PatchEmbed, gelu, xavier
from maskae.nn.patches import patch_grid
from maskae.nn.positions import resize_positions, sincos_2d, sincos_at
from maskae.nn.sharding import constrain
from maskae.nn.stack import drop_path_rates, run_blocks

TOKEN_STD = 0.02


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}


class Encoded(NamedTuple):
    """`tokens` [B, (1+)n, D], CLS first; `blocks`: every block's output where it was asked for, else None."""

    tokens: jax.Array
    blocks: Any


class ViTEncoder(nn.Module):
    """Patch embedding, positions, CLS token, pre-LN blocks, final norm.

    The position table is the fixed sine-cosine one of whatever grid the images have, or with `trainable_position` a parameter `position`
    [1, 1+N, D] for `grid`, resized bicubically for images of another size. `with_cls` and `with_position` False leave out the CLS token
    and every position (an encoder whose attention bias says where tokens are). CLIP's has a norm `pre_norm` before the first block and
    another of the ACTIVATIONS.
    """

    patch_size: int
    width: int
    depth: int
    heads: int
    grid: tuple[int, int]
    mlp_ratio: float = 4.0
    trainable_position: bool = False
    with_cls: bool = True
    with_position: bool = True
    pre_norm: bool = False
    final_norm: bool = True
    activation: str = "gelu"
    qkv_bias: str = "all"
    layer_scale: float | None = None
    drop_path: float = 0.0
    epsilon: float = 1e-6
    attention: str = "xla"
    scan: bool = False
    remat: str = "none"
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declare the submodules under the names that stored weights have."""
        self.patch_embed = PatchEmbed(self.patch_size, self.width, self.dtype)
        if self.with_cls:
            self.cls_token = self.param("cls_token", nn.initializers.normal(TOKEN_STD), (1, 1, self.width))
        if self.trainable_position:
            self.position = self.param("position", lambda _: jnp.asarray(sincos_2d(self.width, self.grid))[None])
        self.blocks = [self.make_block(f"block_{i}") for i in range(self.depth)]
        if self.pre_norm:
            self.before_blocks = LayerNorm(self.epsilon, self.dtype, name="pre_norm")
        if self.final_norm:
            self.norm = LayerNorm(self.epsilon, self.dtype)

    def make_block(self, name: str) -> Block:
        """The block called `name`; encoders of other blocks have their own."""
        return Block(
            self.heads,
            self.mlp_ratio,
            self.qkv_bias,
            self.layer_scale,
            ACTIVATIONS[self.activation],
            epsilon=self.epsilon,
            attention=self.attention,
            dtype=self.dtype,
            name=name,
        )

    def position_table(self, grid: tuple[int, int]) -> jax.Array:
        """float32 [1, 1+N, D] for a grid of (rows, columns) patches; the first row is that of CLS."""
        if self.trainable_position:
            return resize_positions(self.position, self.grid, grid)
        return jnp.asarray(sincos_2d(self.width, grid))[None]

    def embed(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> patch tokens with their positions [B, N, D], in raster order, without CLS."""
        tokens = self.patch_embed(images)
        if self.with_position:
            grid = patch_grid(images.shape[1], images.shape[2], self.patch_size)
            tokens = tokens + self.position_table(grid)[:, 1:].astype(self.dtype)
        return constrain(tokens, "batch")  # [B, N, D]

    def encode(
        self,
        tokens: jax.Array,
        draws: jax.Array | None = None,
        attention_bias: jax.Array | None = None,
        collect: bool = False,
        context: AttentionContext | None = None,
    ) -> Encoded:
        """Patch tokens [B, n, D], any subset in any order -> CLS and patch tokens [B, 1+n, D]; without CLS [B, n, D].

        Args:
            tokens: what `embed` gave, masked or not.
            draws: uniform float32 [depth, 2, B] for drop path; None switches it off.
            attention_bias: broadcastable to [B, heads, 1+n, 1+n].
            collect: also return every block's output.
            context: masks, segments and positions of these tokens, CLS included.
        """
        x = self.first_input(tokens)  # [B, (1+)n, D]
        drop = None if draws is None or not self.drop_path else DropPath(drop_path_rates(self.drop_path, self.depth), draws)
        options: dict[str, Any] = {"scan": self.scan, "remat": self.remat, "collect": collect}
        x, blocks = run_blocks(self, self.blocks, x, beside=attention_bias, drop=drop, context=context, **options)
        return Encoded(self.norm(x) if self.final_norm else x, blocks)

    def first_input(self, tokens: jax.Array) -> jax.Array:
        """Patch tokens [B, n, D] -> what the first block gets [B, (1+)n, D]."""
        x = self.prepend_cls(tokens) if self.with_cls else tokens
        return self.before_blocks(x) if self.pre_norm else x

    def prepend_cls(self, tokens: jax.Array) -> jax.Array:
        """Patch tokens [B, n, D] -> CLS with its position, then they [B, 1+n, D]."""
        # The CLS position is looked up on the table's own grid: resizing leaves that row as it is.
        cls = self.cls_token + self.position_table(self.grid)[:, :1] if self.with_position else self.cls_token
        return jnp.concatenate([jnp.broadcast_to(cls.astype(self.dtype), (tokens.shape[0], 1, self.width)), tokens], axis=1)

    def embed_patches(self, patches: jax.Array, coordinates: jax.Array) -> jax.Array:
        """Patches [B, n, p*p*C] at (row, column) coordinates [B, n, 2] -> tokens with the fixed positions of these [B, n, D].

        For images of different sizes in one batch. Raises UserError where the positions are a parameter, which has one grid.
        """
        if self.trainable_position:
            raise UserError("patches at coordinates need the fixed positions: a trainable table belongs to one grid")
        batch, count, values = patches.shape
        size = self.patch_size
        single = patches.reshape(batch * count, size, size, values // size**2)  # every patch an image of its own
        tokens = self.patch_embed(single).reshape(batch, count, self.width)  # [B, n, D]
        if self.with_position:
            tokens = tokens + sincos_at(self.width, coordinates).astype(self.dtype)
        return constrain(tokens, "batch")

    def encode_packed(self, rows: jax.Array, segments: jax.Array, collect: bool = False) -> Encoded:
        """Samples packed by `maskae.nn.packing.pack`, each with its CLS from `prepend_cls` where there is one, [R, L, D] -> [R, L, D].

        `segments` int32 [R, L] keeps the samples apart. There is no drop path: its draws are one per row, not per sample.
        """
        options: dict[str, Any] = {"scan": self.scan, "remat": self.remat, "collect": collect}
        x, blocks = run_blocks(self, self.blocks, rows, context=AttentionContext(segments=segments), **options)
        return Encoded(self.norm(x) if self.final_norm else x, blocks)

    def __call__(self, images: jax.Array, keep_indices: jax.Array | None = None, draws: jax.Array | None = None) -> jax.Array:
        """[B, H, W, C] -> [B, 1+n, D], CLS first; `keep_indices` int32 [B, n] selects patches, None keeps all of them."""
        tokens = self.embed(images)
        if keep_indices is not None:
            tokens = take_tokens(tokens, keep_indices)
        return self.encode(tokens, draws).tokens


class MaeDecoder(nn.Module):
    """Mask tokens in the places of removed patches, fixed positions, pre-LN blocks, norm, one linear map to the patch's values.

    `with_cls` False: the encoder's output has no CLS token in front.
    """

    width: int
    depth: int
    heads: int
    outputs: int
    mlp_ratio: float = 4.0
    with_cls: bool = True
    qkv_bias: str = "all"
    epsilon: float = 1e-6
    attention: str = "xla"
    scan: bool = False
    remat: str = "none"
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declare the submodules under the names that stored weights have."""
        self.embed = nn.Dense(self.width, dtype=self.dtype, kernel_init=xavier)
        self.mask_token = self.param("mask_token", nn.initializers.normal(TOKEN_STD), (1, 1, self.width))
        self.blocks = [
            Block(
                self.heads,
                self.mlp_ratio,
                self.qkv_bias,
                epsilon=self.epsilon,
                attention=self.attention,
                dtype=self.dtype,
                name=f"block_{i}",
            )
            for i in range(self.depth)
        ]
        self.norm = LayerNorm(self.epsilon, self.dtype)
        self.head = nn.Dense(self.outputs, dtype=self.dtype, kernel_init=xavier)

    def restore(self, latent: jax.Array, restore: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Encoder output [B, (1+)n, D], CLS first, `restore` int32 [B, N] -> decoder input [B, (1+)N, d] with positions, raster order."""
        x = self.embed(latent)  # [B, (1+)n, d]
        patches = restore_tokens(x[:, self.prefix :], self.mask_token.astype(self.dtype), restore)  # [B, N, d]
        x = jnp.concatenate([x[:, : self.prefix], patches], axis=1)  # [B, (1+)N, d]
        return constrain(x + jnp.asarray(sincos_2d(self.width, grid, self.with_cls), self.dtype), "batch")

    @property
    def prefix(self) -> int:
        """Tokens before those of the patches."""
        return 1 if self.with_cls else 0

    def decode(self, x: jax.Array, collect: bool = False, indices: jax.Array | None = None) -> Encoded:
        """Decoder input [B, (1+)N, d] -> prediction of every patch [B, N, p*p*C], CLS dropped, or of `indices` int32 [B, R] alone."""
        x, blocks = run_blocks(self, self.blocks, x, scan=self.scan, remat=self.remat, collect=collect)
        x = x[:, self.prefix :]
        if indices is not None:
            x = constrain(take_tokens(x, indices), "batch")  # [B, R, d]
        return Encoded(self.head(self.norm(x)), blocks)  # [B, N or R, p*p*C]

    def __call__(self, latent: jax.Array, restore: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Both steps: [B, (1+)n, D] -> [B, N, p*p*C]."""
        return self.decode(self.restore(latent, restore, grid)).tokens
