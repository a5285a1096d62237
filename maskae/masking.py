"""Maskers: a noise value per patch decides which patches are kept, so that every masker yields the same exact counts and index triple.

A masker is a function that draws the noise; `random_mask` turns noise into indices. Draws depend on the key and on each example's position
in the global batch alone, never on devices or hosts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice

MOVES = ("auto", "gather", "one_hot")
# The largest n * L for which the product with a one-hot matrix is estimated to be faster on TPU than the gather.
MOST_PAIRS = 2**21
Move = Callable[..., jax.Array]


class Mask(NamedTuple):
    """`keep_indices` int32 [B, n] in shuffled order; `mask` float32 [B, L], 1 = removed; `restore` int32 [B, L]: raster to shuffled."""

    keep_indices: jax.Array
    mask: jax.Array
    restore: jax.Array


def keep_count(length: int, mask_ratio: float) -> int:
    """Number of kept patches, int(L * (1 - ratio)) in Python floats as in the released code: 196 patches at 0.7 keep 58, not 59."""
    return int(length * (1 - mask_ratio))


def random_mask(noise: jax.Array, keep: int) -> Mask:
    """Keep the `keep` patches of smallest noise (He et al. 2022, section 3; released code).

    Args:
        noise: float32 [B, L].
        keep: 1..L, static.

    Raises:
        UserError: where `keep` is out of range.
    """
    if not 1 <= keep <= noise.shape[1]:
        raise UserError(f"cannot keep {keep} of {noise.shape[1]} patches")
    shuffle = jnp.argsort(noise, axis=1)  # [B, L]
    restore = jnp.argsort(shuffle, axis=1)  # [B, L]
    return Mask(shuffle[:, :keep], (restore >= keep).astype(jnp.float32), restore)


def removed_indices(mask: Mask) -> jax.Array:
    """int32 [B, L - n]: the removed patches in the order of their noise; of random noise the first k are k of them at random."""
    return jnp.argsort(mask.restore, axis=1)[:, mask.keep_indices.shape[1] :]


class Split(NamedTuple):
    """Rows of a sample's visible tokens int32 [B, n] and of its hidden ones [B, r], both rising."""

    seen: jax.Array
    hidden: jax.Array


def split_tokens(mask: jax.Array, visible: int) -> Split:
    """A mask [B, L], 1 = hidden, with `visible` zeros in every row, as rows."""
    order = jnp.argsort(mask, axis=1, stable=True)  # [B, L]
    return Split(order[:, :visible], order[:, visible:])


def take_tokens(tokens: jax.Array, indices: jax.Array, implementation: str = "auto") -> jax.Array:
    """Select tokens [B, L, D] by int32 [B, n] -> [B, n, D].

    "gather" and "one_hot", a product with the one-hot matrix [B, n, L] that selects, give the same values and gradients for finite tokens
    (a product spreads a NaN or an infinity over the sample's other tokens). "auto" takes on TPU the product where n * L is at most
    MOST_PAIRS, elsewhere the gather. The compiler's estimates, forward and backward, bfloat16, in microseconds:

        images, L, n, D           v5e: gather  one_hot    v6e: gather  one_hot
        64,  196,   49,  768  take        292      238            131      107
        64,  196,   49, 1024  take        388      318            175      143
        64,  196,   49,  512  restore     447      177            203       80
        16, 1568,  157,  768  take        664      356
         8, 4096, 1024,  768  take        808      865

    (0.005 against 1.9 GFLOP and 0.22 against 0.18 GB on the first line; the backward pass of a TPU's gather sorts the indices.)
    `python tools/plan_token_moves.py` compiles them again. On 2 CPU cores the gather was 1.2 to 13 times as fast in every shape tried
    (`--topology cpu` times it); on GPU nothing was measured.

    Raises:
        UserError: for an unknown implementation.
    """
    return _move(implementation, indices.shape[1] * tokens.shape[1], _gather, _multiply, tokens, indices)


def restore_tokens(kept: jax.Array, mask_token: jax.Array, restore: jax.Array, implementation: str = "auto") -> jax.Array:
    """Put kept tokens [B, n, D] back in their places among mask tokens [1, 1, D]: `restore` int32 [B, L] -> [B, L, D].

    Implementations, choice and errors as in `take_tokens`.
    """
    pairs = kept.shape[1] * restore.shape[1]
    return _move(implementation, pairs, _gather_among, _multiply_among, kept, mask_token, restore)


def _move(implementation: str, pairs: int, gather: Move, one_hot: Move, *arrays: jax.Array) -> jax.Array:
    check_choice("token move", implementation, MOVES)
    if implementation == "one_hot":
        return one_hot(*arrays)
    if implementation == "gather" or pairs > MOST_PAIRS:
        return gather(*arrays)
    # Chosen when the program is lowered, so that compiling for a TPU on a machine without one chooses as the TPU does.
    return jax.lax.platform_dependent(*arrays, tpu=one_hot, default=gather)


def _gather(tokens: jax.Array, indices: jax.Array) -> jax.Array:
    return jnp.take_along_axis(tokens, indices[:, :, None], axis=1)


def _multiply(tokens: jax.Array, indices: jax.Array) -> jax.Array:
    selection = jax.nn.one_hot(indices, tokens.shape[1], dtype=tokens.dtype)  # [B, n, L]
    # The default on TPU and in TF32 would round float32 tokens to a short mantissa.
    return jnp.einsum("bnl,bld->bnd", selection, tokens, precision=jax.lax.Precision.HIGHEST)


def _gather_among(kept: jax.Array, mask_token: jax.Array, restore: jax.Array) -> jax.Array:
    batch, count, width = kept.shape
    removed = jnp.broadcast_to(mask_token, (batch, restore.shape[1] - count, width))
    return _gather(jnp.concatenate([kept, removed], axis=1), restore)


def _multiply_among(kept: jax.Array, mask_token: jax.Array, restore: jax.Array) -> jax.Array:
    # Rows of removed places are all zero in the one-hot matrix.
    return jnp.where(restore[:, :, None] < kept.shape[1], _multiply(kept, restore), mask_token)


def draw_noise(key: jax.Array, example: jax.Array, length: int) -> jax.Array:
    """Uniform float32 [B, length], row i from `fold_in(key, example[i])`. `example` int32 [B]: the positions in the global batch."""
    return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (length,)))(example)


def draw_exponentials(key: jax.Array, example: jax.Array, length: int) -> jax.Array:
    """Exp(1) draws float32 [B, length], row i from `fold_in(key, example[i])`; see `weighted_noise`."""
    return jax.vmap(lambda i: jax.random.exponential(jax.random.fold_in(key, i), (length,)))(example)


def weighted_noise(exponentials: jax.Array, weights: jax.Array) -> jax.Array:
    """Noise [B, L] by which `random_mask` draws without replacement with probability proportional to `weights` >= 0 [B, L].

    Exp(1) / w is an exponential clock of rate w, and the order in which clocks ring is that of a multinomial draw without replacement, as
    is Gumbel top-k on log w. A weight of 0 comes last.
    """
    return exponentials / weights.astype(jnp.float32)


def grid_noise(example: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The regular mask of the MAE ablation: smallest noise at every second row and column, so that a quarter is kept in place. [B, L]."""
    rows, columns = grid
    row, column = jnp.divmod(jnp.arange(rows * columns), columns)
    noise = ((row % 2) + (column % 2) > 0).astype(jnp.float32)
    return jnp.broadcast_to(noise, (example.shape[0], rows * columns))


def block_noise(key: jax.Array, example: jax.Array, grid: tuple[int, int], blocks: int = 16, min_area: int = 16) -> jax.Array:
    """Block-wise masks (Bao et al. 2021, section 2.3; MAE's ablation) with an exact count and static shapes.

    Draws `blocks` rectangles, area uniform from `min_area` patches (at most a sixteenth of the grid) to 0.4 of the grid, log-uniform aspect
    in [0.3, 1/0.3]. Patches covered by earlier rectangles are removed first, those of one rectangle in random order, uncovered ones last.

    Returns:
        float32 [B, L]: larger = removed earlier.
    """
    rows, columns = grid
    length = rows * columns
    smallest = float(min(min_area, max(1, length // 16)))
    row, column = jnp.divmod(jnp.arange(length), columns)

    def draw(i: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.fold_in(key, i), 5)
        area = jax.random.uniform(keys[0], (blocks, 1), minval=smallest, maxval=max(smallest, 0.4 * length))
        aspect = jnp.exp(jax.random.uniform(keys[1], (blocks, 1), minval=math.log(0.3), maxval=-math.log(0.3)))
        height = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 1, rows)
        width = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 1, columns)
        top = jnp.floor(jax.random.uniform(keys[2], (blocks, 1)) * (rows - height + 1))
        left = jnp.floor(jax.random.uniform(keys[3], (blocks, 1)) * (columns - width + 1))
        covered = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)  # [blocks, L]
        first = jnp.where(covered.any(0), covered.argmax(0), blocks)
        return blocks - first + jax.random.uniform(keys[4], (length,))

    return jax.vmap(draw)(example)
