"""The point-cloud transformer: mini-PointNet tokens of local groups, positions added before every block, and its decoder."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.masking import restore_tokens
from maskae.nn.batch_norm import BatchNorm
from maskae.nn.flops import linear_flops
from maskae.nn.layers import Block, DropPath, Dtype, Initializer, LayerNorm, gelu, uniform_fan_in, xavier
from maskae.nn.sharding import constrain
from maskae.nn.stack import drop_path_rates, run_blocks
from maskae.nn.vit import TOKEN_STD, Encoded
from maskae.vectors import maximum_over

# Layer norms here have the framework's default, not the 1e-6 of image transformers.
EPSILON = 1e-5
TOKEN_WIDTHS = (128, 256, 512)
POSITION_WIDTH = 128
normal: Initializer = nn.initializers.normal(TOKEN_STD)


def uniform_dense(inputs: int, outputs: int, dtype: Dtype, name: str | None = None) -> nn.Dense:
    """A linear map whose kernel and bias are U(-1/sqrt(in), 1/sqrt(in)), what the released code leaves uninitialised."""
    return nn.Dense(outputs, dtype=dtype, kernel_init=uniform_fan_in(inputs), bias_init=uniform_fan_in(inputs), name=name)


class PointTokenizer(nn.Module):
    """Mini PointNet, the same for every group and blind to the order of its points (Point-MAE, section 3.1; Qi et al. 2017).

    Two maps per point with batch norm between them; the group's maximum beside each point; two more maps, and the maximum again.
    `widths` are those of the first three maps.
    """

    width: int
    widths: tuple[int, int, int] = TOKEN_WIDTHS
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, offsets: jax.Array, train: bool = False) -> jax.Array:
        """Members relative to their centre [B, G, M, 3] -> tokens [B, G, D]; statistics over all B*G*M points."""

        def linear(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, dtype=self.dtype, kernel_init=normal, name=name)

        x = linear(self.widths[0], "local1")(offsets.astype(self.dtype))  # [B, G, M, widths[0]]
        x = nn.relu(BatchNorm(dtype=self.dtype, name="local_norm")(x, train=train))
        x = linear(self.widths[1], "local2")(x)  # [B, G, M, widths[1]]
        whole = jnp.broadcast_to(maximum_over(x, 2)[:, :, None], x.shape)
        x = linear(self.widths[2], "group1")(jnp.concatenate([whole, x], axis=-1))  # [B, G, M, widths[2]]
        x = nn.relu(BatchNorm(dtype=self.dtype, name="group_norm")(x, train=train))
        return maximum_over(linear(self.width, "group2")(x), 2)  # [B, G, D]


class PointPosition(nn.Module):
    """Centres [B, G, 3] -> positions [B, G, D] by a small MLP; `framework_default` leaves it at uniform initialisation."""

    width: int
    framework_default: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, centres: jax.Array) -> jax.Array:
        """[B, G, 3] -> [B, G, D]."""
        hidden = self._linear(3, POSITION_WIDTH, "fc1")(centres.astype(self.dtype))  # [B, G, 128]
        return self._linear(POSITION_WIDTH, self.width, "fc2")(gelu(hidden))  # [B, G, D]

    def _linear(self, inputs: int, outputs: int, name: str) -> nn.Dense:
        if self.framework_default:
            return uniform_dense(inputs, outputs, self.dtype, name)
        return nn.Dense(outputs, dtype=self.dtype, kernel_init=normal, name=name)


class PointTransformer(nn.Module):
    """Tokenizer, positions, pre-LN blocks without qkv bias, final norm; `cls_tokens` learned CLS tokens, each with its own position.

    Parameters: `tokenizer`, `position_embed`, `cls_token` and `cls_position` [cls_tokens, 1, D] where there are any, `block_{i}`, `norm`.
    """

    width: int
    depth: int
    heads: int
    cls_tokens: int = 0
    token_widths: tuple[int, int, int] = TOKEN_WIDTHS
    drop_path: float = 0.0
    attention: str = "xla"
    scan: bool = False
    remat: str = "none"
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declare the submodules under the names that stored weights have."""
        self.tokenizer = PointTokenizer(self.width, self.token_widths, self.dtype)
        self.position_embed = PointPosition(self.width, dtype=self.dtype)
        if self.cls_tokens:
            self.cls_token = self.param("cls_token", normal, (self.cls_tokens, 1, self.width))
            self.cls_position = self.param("cls_position", normal, (self.cls_tokens, 1, self.width))
        self.blocks = point_blocks(self, normal)
        self.norm = LayerNorm(EPSILON, self.dtype)

    def embed(self, offsets: jax.Array, train: bool = False) -> jax.Array:
        """Groups [B, G, M, 3] -> tokens [B, G, D], without positions."""
        return constrain(self.tokenizer(offsets, train), "batch")

    def positions(self, centres: jax.Array) -> jax.Array:
        """Centres [B, G, 3] -> [B, G, D]."""
        return self.position_embed(centres)

    def encode(
        self, tokens: jax.Array, positions: jax.Array, draws: jax.Array | None = None, view: int = 0, collect: bool = False
    ) -> Encoded:
        """Tokens and their positions [B, n, D], any subset -> [B, (1+)n, D], CLS first where there is one.

        Args:
            draws: uniform float32 [depth, 2, B] for drop path; None switches it off.
            view: which of the CLS tokens stands in front.
        """
        if self.cls_tokens:
            shape = (tokens.shape[0], 1, self.width)
            cls, cls_position = (jnp.broadcast_to(p[view].astype(self.dtype), shape) for p in (self.cls_token, self.cls_position))
            tokens = jnp.concatenate([cls, tokens], axis=1)  # [B, 1+n, D]
            positions = jnp.concatenate([cls_position, positions], axis=1)  # [B, 1+n, D]
        x, blocks = run_point_blocks(self, tokens, positions, draws, collect)
        return Encoded(self.norm(x), blocks)

    def __call__(self, offsets: jax.Array, centres: jax.Array, train: bool = False, draws: jax.Array | None = None) -> jax.Array:
        """All groups of a cloud: [B, G, M, 3] and [B, G, 3] -> [B, (1+)G, D]."""
        return self.encode(self.embed(offsets, train), self.positions(centres), draws).tokens


class PointDecoder(nn.Module):
    """Mask tokens among the visible ones, own positions of all centres before every block, and a head that draws a group's points."""

    width: int
    depth: int
    heads: int
    group_size: int
    drop_path: float = 0.0
    attention: str = "xla"
    scan: bool = False
    remat: str = "none"
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declare the submodules under the names that stored weights have."""
        self.mask_token = self.param("mask_token", normal, (1, 1, self.width))
        self.position_embed = PointPosition(self.width, framework_default=True, dtype=self.dtype)
        self.blocks = point_blocks(self, xavier)
        self.norm = LayerNorm(EPSILON, self.dtype)
        self.head = uniform_dense(self.width, 3 * self.group_size, self.dtype)

    def decode(self, visible: jax.Array, restore: jax.Array, centres: jax.Array, draws: jax.Array | None = None) -> jax.Array:
        """Visible tokens [B, n, D], `restore` int32 [B, G], centres [B, G, 3] -> features of all groups [B, G, D] before the norm."""
        x = constrain(restore_tokens(visible, self.mask_token.astype(self.dtype), restore), "batch")  # [B, G, D]
        return run_point_blocks(self, x, self.position_embed(centres), draws)[0]

    def predict(self, features: jax.Array) -> jax.Array:
        """Features [B, m, D] -> the points of those groups relative to their centres [B, m, M, 3]."""
        return self.head(self.norm(features)).reshape(*features.shape[:2], self.group_size, 3)

    def __call__(self, visible: jax.Array, restore: jax.Array, centres: jax.Array) -> jax.Array:
        """Both steps, for every group: [B, n, D] -> [B, G, M, 3]."""
        return self.predict(self.decode(visible, restore, centres))


def point_blocks(module: PointTransformer | PointDecoder, kernel_init: Initializer) -> list[Block]:
    """The blocks of an encoder or a decoder."""
    options: dict[str, Any] = {"attention": module.attention, "kernel_init": kernel_init, "dtype": module.dtype}
    return [Block(module.heads, qkv_bias="none", epsilon=EPSILON, name=f"block_{i}", **options) for i in range(module.depth)]


def run_point_blocks(
    module: PointTransformer | PointDecoder, x: jax.Array, position: jax.Array, draws: jax.Array | None, collect: bool = False
) -> tuple[jax.Array, Any]:
    """`run_blocks` with the module's own blocks and options."""
    drop = None if draws is None or not module.drop_path else DropPath(drop_path_rates(module.drop_path, module.depth), draws)
    return run_blocks(module, module.blocks, x, position=position, drop=drop, scan=module.scan, remat=module.remat, collect=collect)


def tokenizer_flops(points: int, width: int, widths: tuple[int, int, int] = TOKEN_WIDTHS) -> float:
    """The mini PointNet on `points` points of all groups together; 1.01 G multiply-adds for 64 groups of 32 and width 384."""
    first, second, third = widths
    maps = ((3, first), (first, second), (2 * second, third), (third, width))
    return sum(linear_flops(points, inputs, outputs) for inputs, outputs in maps)
