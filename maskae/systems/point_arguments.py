"""The arguments that every system around a point-cloud transformer has, their checks, and what follows from them alone."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice, check_heads, check_share
from maskae.nn.augmentations import each
from maskae.nn.flops import block_flops, linear_flops
from maskae.nn.layers import ATTENTION_IMPLEMENTATIONS, DTYPES
from maskae.nn.point_augmentations import draw_scale_and_shift, random_rotation, scale_and_shift
from maskae.nn.point_transformer import POSITION_WIDTH, TOKEN_WIDTHS, PointTransformer, tokenizer_flops
from maskae.nn.points import Groups, group_points
from maskae.nn.stack import REMAT_POLICIES
from maskae.systems.contract import Batch
from maskae.vectors import at_least_float32


@dataclass(frozen=True)
class PointArguments:
    """Base of the systems on `batch["points"]`, float32 [B, N, 3] in the unit ball, with Point-MAE's values.

    Args:
        groups, group_size: centres by farthest point sampling, and the nearest points around each, itself included.
        drop_path: rate at the last block of every stack, rising linearly from 0 at the first.
        scale, shift: augmentation, a factor from U[scale] and a translation from U[-shift, shift] per cloud and axis.
        rotate: also turn each training cloud by a random angle about the vertical (y) axis.
        token_widths: of the hidden maps of the tokenizer, most of the computation where the transformer is small.
        dtype: of the computation; sampling, norms, softmax and loss are float32. "float64" is for comparisons with recorded references,
            under `jax.enable_x64`: rectifiers turn a rounding error next to 0 into a different gradient.
        scan, remat, attention: see `maskae.nn.stack.run_blocks` and `maskae.nn.layers.Attention`.

    Raises:
        UserError: where the sizes do not fit together or a name is unknown.
    """

    groups: int = 64
    group_size: int = 32
    width: int = 384
    depth: int = 12
    heads: int = 6
    _: KW_ONLY
    drop_path: float = 0.1
    scale: tuple[float, float] = (2 / 3, 3 / 2)
    shift: float = 0.2
    rotate: bool = False
    token_widths: tuple[int, int, int] = TOKEN_WIDTHS
    dtype: str = "float32"
    scan: bool = False
    remat: str = "none"
    attention: str = "xla"

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        check_choice("dtype", self.dtype, (*DTYPES, "float64"))
        check_choice("remat", self.remat, REMAT_POLICIES)
        check_choice("attention", self.attention, ATTENTION_IMPLEMENTATIONS)
        check_heads("width", self.width, self.heads)
        if min(self.groups, self.group_size) < 1:
            raise UserError(f"groups={self.groups} of group_size={self.group_size} points: both must be at least 1")
        if len(self.token_widths) != 3 or min(self.token_widths) < 1:
            raise UserError(f"token_widths={self.token_widths}: want three widths")
        check_share("drop_path", self.drop_path)
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] or self.shift < 0:
            raise UserError(f"scale={self.scale}, shift={self.shift}: want factors 0 < low <= high and a shift from 0 on")

    @property
    def compute(self) -> dict[str, Any]:
        """How stacks of blocks compute."""
        options = {"scan": self.scan, "remat": self.remat, "attention": self.attention, "drop_path": self.drop_path}
        return options | {"dtype": jnp.dtype(self.dtype)}

    def transformer(self, cls_tokens: int) -> PointTransformer:
        """The encoder with so many CLS tokens."""
        return PointTransformer(self.width, self.depth, self.heads, cls_tokens, self.token_widths, **self.compute)

    def points_of(self, batch: Batch) -> jax.Array:
        """`batch["points"]`. Raises UserError where there are none, or too few to group."""
        if "points" not in batch:
            raise UserError(f"the data has no 'points'; it has {', '.join(sorted(batch))}")
        points = batch["points"]
        if points.ndim != 3 or points.shape[2] != 3:
            raise UserError(f"points have shape {points.shape}; want [B, N, 3]")
        if points.shape[1] < max(self.groups, self.group_size):
            raise UserError(f"{points.shape[1]} points per cloud are too few for groups={self.groups} of group_size={self.group_size}")
        return points

    def group(self, points: jax.Array) -> Groups:
        """Local groups of [B, N, 3], in at least float32."""
        return group_points(at_least_float32(points), self.groups, self.group_size)

    def augment(self, points: jax.Array, example: jax.Array, key: jax.Array) -> jax.Array:
        """Training clouds [B, N, 3] turned (where `rotate`), scaled and shifted."""
        turn_key, scale_key = jax.random.split(key)
        points = random_rotation(points, example, turn_key) if self.rotate else points
        return scale_and_shift(points, *draw_scale_and_shift(scale_key, example, self.scale, self.shift))

    def drop_path_draws(self, example: jax.Array, key: jax.Array, depth: int) -> jax.Array | None:
        """Uniform float32 [depth, 2, B] of one stack; None without drop path."""
        if not self.drop_path:
            return None
        return each(lambda k: jax.random.uniform(k, (depth, 2)), example, key).transpose(1, 2, 0)

    def blank_groups(self) -> tuple[jax.Array, jax.Array]:
        """Offsets [1, G, M, 3] and centres [1, G, 3] of zeros, for initialisation."""
        return jnp.zeros((1, self.groups, self.group_size, 3)), jnp.zeros((1, self.groups, 3))

    def embedding_flops(self) -> float:
        """Tokens and positions of all groups."""
        return tokenizer_flops(self.groups * self.group_size, self.width, self.token_widths) + self.position_flops()

    def position_flops(self) -> float:
        """The position MLP on all centres."""
        return linear_flops(self.groups, 3, POSITION_WIDTH) + linear_flops(self.groups, POSITION_WIDTH, self.width)

    def stack_flops(self, tokens: int, depth: int) -> float:
        """Blocks on so many tokens."""
        return depth * block_flops(tokens, self.width)
