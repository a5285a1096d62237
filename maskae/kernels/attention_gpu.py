"""Attention on NVIDIA GPUs: one forward and two backward kernels in Pallas (Triton), online softmax, nothing of size N x M in memory.

Each program of the forward kernel holds one block of queries of one head and walks over the keys (Dao 2023, FlashAttention-2, algorithm 1).
The backward pass recomputes the probabilities from the log-sum-exp: one kernel walks over the keys for the gradients of queries and
slopes, one over the queries for those of keys and values (algorithm 2, without its atomic additions). Head sizes are padded to a power of
two and lengths to whole blocks by masked loads inside the kernels: no operand is padded or copied in memory.

float32 operands are multiplied as jax.default_matmul_precision says, which by default is TF32, as in XLA's own products on these cards.

Verified without a GPU, on jax 0.10.2 and 0.12: values and gradients in interpreter mode against float64, and that Triton's lowering rules
take every kernel for CUDA (both tests/kernels/test_attention_gpu.py). By hand, the lowered kernels were compiled by Triton 3.9 for compute
capabilities 8.0, 8.6, 9.0 and 10.0: at most 81 KiB of shared memory, tensor cores in use, registers spilled only on 8.6 (at most 104 bytes,
with every option at once). Not verified: numbers and times on a GPU. `auto` takes these kernels only where tools/bench_kernels.py found
that they win. jax 0.12 announces that it will drop Triton; on a jax without it these functions say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from maskae.errors import UserError
from maskae.kernels.operands import Operands, Options

try:
    from jax.experimental.pallas import triton
except ImportError:  # jax 0.12 announces that a later version goes without
    triton = None  # type: ignore[assignment]

LOG2_E = math.log2(math.e)
# Stands for minus infinity before the softmax: finite, so that the difference of two of them is 0 and not NaN.
LOWEST = -1e30


class Blocks(NamedTuple):
    """Tiles of one kernel: rows that a program holds, rows that it walks over at a time, head size, that as a power of two, warps."""

    held: int
    walked: int
    head_size: int
    width: int
    warps: int


class Side(NamedTuple):
    """What decides about a block of tokens beside its vectors: who exists, segments int32 [block], each coordinate float32 [block]."""

    exists: jax.Array
    segments: jax.Array | None
    positions: tuple[jax.Array, ...]


class Pair(NamedTuple):
    """Scores of two blocks, float32 [rows, columns]; `ratio` is score/cap of a capped one, `distance` that of the tokens."""

    scores: jax.Array
    allowed: jax.Array
    ratio: jax.Array | None
    distance: jax.Array | None


def power_of_two(number: int, least: int, most: int) -> int:
    """The smallest power of two that is at least `number`, between `least` and `most`."""
    return max(least, min(most, pl.next_power_of_2(number)))


def choose_blocks(held_length: int, walked_length: int, head_size: int, itemsize: int) -> Blocks:
    """Tiles with which no kernel spills registers beyond a few bytes or needs more shared memory than each card since Ampere has.

    Found with Triton's compiler, not by timing (see above). Tensor cores need at least 16 in each direction.
    """
    width = power_of_two(head_size, 16, 1024)
    most_held, most_walked = (64 if width * itemsize <= 256 else 32), (64 if width * itemsize <= 128 else 32)
    held = power_of_two(held_length, 16, most_held)
    return Blocks(held, power_of_two(walked_length, 16, most_walked), head_size, width, 8 if held * width >= 8192 else 4)


def inside(length: int, start: Any, blocks: Blocks, count: int) -> jax.Array:
    """Which elements of the tile [count, width] lie in the array. Not every version of jax masks loads and stores by itself."""
    allowed = jnp.broadcast_to((start + jnp.arange(count) < length)[:, None], (count, blocks.width))
    return allowed if blocks.head_size == blocks.width else allowed & (jnp.arange(blocks.width) < blocks.head_size)[None, :]


def load_rows(ref: Any, start: Any, blocks: Blocks, count: int) -> jax.Array:
    """Rows start.. of [length, D] as [count, width], zeros outside."""
    return triton.load(ref.at[pl.ds(start, count), :], mask=inside(ref.shape[0], start, blocks, count), other=0.0)


def store_rows(ref: Any, start: Any, blocks: Blocks, values: jax.Array) -> None:
    """Writes [count, width] to rows start.. of [length, D], leaving out what lies outside."""
    count = values.shape[0]
    triton.store(ref.at[pl.ds(start, count), :], values.astype(ref.dtype), mask=inside(ref.shape[0], start, blocks, count))


def load_vector(ref: Any, start: Any, count: int) -> jax.Array:
    """Elements start.. of [length] as [count], zeros outside."""
    allowed = start + jnp.arange(count) < ref.shape[0]
    return triton.load(ref.at[pl.ds(start, count)], mask=allowed, other=jnp.zeros((), ref.dtype))


def store_vector(ref: Any, start: Any, values: jax.Array) -> None:
    """Writes [count] to elements start.. of [length], leaving out what lies outside."""
    count = values.shape[0]
    triton.store(ref.at[pl.ds(start, count)], values, mask=start + jnp.arange(count) < ref.shape[0])


def load_side(length: int, mask: Any, segments: Any, positions: Any, start: Any, count: int) -> Side:
    """The block start.. of the queries' or the keys' small operands; None where there are none."""
    exists = start + jnp.arange(count) < length
    if mask is not None:
        exists &= load_vector(mask, start, count) != 0
    coordinates: tuple[jax.Array, ...] = ()
    if positions is not None:
        row = start + jnp.arange(count) < length
        coordinates = tuple(
            triton.load(positions.at[pl.ds(start, count), np.int32(axis)], mask=row, other=0.0) for axis in range(positions.shape[1])
        )
    return Side(exists, None if segments is None else load_vector(segments, start, count), coordinates)


def query_side(refs: Operands, start: Any, count: int) -> Side:
    """`load_side` of the queries."""
    return load_side(refs.query.shape[0], None, refs.query_segments, refs.query_positions, start, count)


def key_side(refs: Operands, start: Any, count: int) -> Side:
    """`load_side` of the keys."""
    return load_side(refs.key.shape[0], refs.key_mask, refs.key_segments, refs.key_positions, start, count)


def pair_up(options: Options, slope: jax.Array | None, rows: jax.Array, columns: jax.Array, row: Side, column: Side) -> Pair:
    """Scores of two blocks [rows, width] and [columns, width]: scaled, biased, capped. Queries and keys may be on either side."""
    scores = triton.dot(rows, columns, trans_b=True) * options.scale  # [rows, columns]
    distance = ratio = None
    if slope is not None:
        squares = [(a[:, None] - b[None, :]) ** 2 for a, b in zip(row.positions, column.positions, strict=True)]
        distance = jnp.sqrt(sum(squares[1:], squares[0]))
        scores = scores - slope * distance
    if options.soft_cap is not None:
        ratio = jnp.tanh(scores * (1.0 / options.soft_cap))
        scores = ratio * options.soft_cap
    allowed = row.exists[:, None] & column.exists[None, :]
    if row.segments is not None and column.segments is not None:
        allowed &= row.segments[:, None] == column.segments[None, :]
    return Pair(scores, allowed, ratio, distance)


def held_start(length: int, block: int) -> jax.Array:
    """The first row of the block that this program holds."""
    return lax.rem(pl.program_id(0), pl.cdiv(length, block)) * block


def forward_kernel(refs: Operands, out: Any, log_sum_exp: Any, *, options: Options, blocks: Blocks) -> None:
    """Writes `held` rows of the output [N, D] and of its log-sum-exp [N]."""
    start = held_start(refs.query.shape[0], blocks.held)
    query, side = load_rows(refs.query, start, blocks, blocks.held), query_side(refs, start, blocks.held)
    slope = None if refs.slopes is None else refs.slopes[...]

    def walk(turn: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total, highest, norm = carry
        first = turn * blocks.walked
        key, value = (load_rows(ref, first, blocks, blocks.walked) for ref in (refs.key, refs.value))
        pair = pair_up(options, slope, query, key, side, key_side(refs, first, blocks.walked))
        scores = jnp.where(pair.allowed, pair.scores * LOG2_E, LOWEST)
        higher = jnp.maximum(highest, scores.max(axis=1))
        # Again by the mask: in a row that nothing allows so far the scores are as high as the highest, and the power would be 1.
        weights = jnp.where(pair.allowed, jnp.exp2(scores - higher[:, None]), 0.0)
        fade = jnp.exp2(highest - higher)
        total = total * fade[:, None] + triton.dot(weights.astype(value.dtype), value)
        return total, higher, norm * fade + weights.sum(axis=1)

    zeros = jnp.zeros((blocks.held,), jnp.float32)
    carry = (jnp.zeros((blocks.held, blocks.width), jnp.float32), zeros + LOWEST, zeros)
    total, highest, norm = lax.fori_loop(0, pl.cdiv(refs.key.shape[0], blocks.walked), walk, carry)
    some = norm > 0
    divisor = jnp.where(some, norm, 1.0)
    store_rows(out, start, blocks, total / divisor[:, None])
    store_vector(log_sum_exp, start, jnp.where(some, (highest + jnp.log2(divisor)) * (1 / LOG2_E), -jnp.inf))


def score_gradients(pair: Pair, log_sum_exp: jax.Array, delta: jax.Array, d_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(probabilities, gradients of the scores before the cap), float32 [rows, columns].

    `log_sum_exp` and `delta` have the queries on the axis where `pair` has them; `delta` is the sum of out times d_out less d_lse.
    """
    weights = jnp.where(pair.allowed, jnp.exp2((pair.scores - log_sum_exp) * LOG2_E), 0.0)
    gradients = weights * (d_weights - delta)
    if pair.ratio is not None:
        gradients = gradients * (1.0 - pair.ratio * pair.ratio)
    return weights, gradients


def query_kernel(
    refs: Operands, lse: Any, delta: Any, d_out: Any, d_query: Any, d_slopes: Any, *, options: Options, blocks: Blocks
) -> None:
    """Writes `held` rows of the queries' gradient [N, D] and of what each of them adds to the slope's [N] (None without slopes)."""
    start = held_start(refs.query.shape[0], blocks.held)
    query, gradient = (load_rows(ref, start, blocks, blocks.held) for ref in (refs.query, d_out))
    side = query_side(refs, start, blocks.held)
    row_lse, row_delta = (load_vector(ref, start, blocks.held)[:, None] for ref in (lse, delta))
    slope = None if refs.slopes is None else refs.slopes[...]

    def walk(turn: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total, slope_total = carry
        first = turn * blocks.walked
        key, value = (load_rows(ref, first, blocks, blocks.walked) for ref in (refs.key, refs.value))
        pair = pair_up(options, slope, query, key, side, key_side(refs, first, blocks.walked))
        _, d_scores = score_gradients(pair, row_lse, row_delta, triton.dot(gradient, value, trans_b=True))
        if pair.distance is not None:
            slope_total = slope_total - (d_scores * pair.distance).sum(axis=1)
        return total + triton.dot(d_scores.astype(key.dtype), key), slope_total

    carry = (jnp.zeros((blocks.held, blocks.width), jnp.float32), jnp.zeros((blocks.held,), jnp.float32))
    total, slope_total = lax.fori_loop(0, pl.cdiv(refs.key.shape[0], blocks.walked), walk, carry)
    store_rows(d_query, start, blocks, total * options.scale)
    if d_slopes is not None:
        store_vector(d_slopes, start, slope_total)


def key_value_kernel(
    refs: Operands, lse: Any, delta: Any, d_out: Any, d_key: Any, d_value: Any, *, options: Options, blocks: Blocks
) -> None:
    """Writes `held` rows of the gradients [M, D] of keys and values. Its tiles have the keys as rows: no probability is transposed."""
    start = held_start(refs.key.shape[0], blocks.held)
    key, value = (load_rows(ref, start, blocks, blocks.held) for ref in (refs.key, refs.value))
    side = key_side(refs, start, blocks.held)
    slope = None if refs.slopes is None else refs.slopes[...]

    def walk(turn: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        key_total, value_total = carry
        first = turn * blocks.walked
        query, gradient = (load_rows(ref, first, blocks, blocks.walked) for ref in (refs.query, d_out))
        pair = pair_up(options, slope, key, query, side, query_side(refs, first, blocks.walked))
        column_lse, column_delta = (load_vector(ref, first, blocks.walked)[None, :] for ref in (lse, delta))
        weights, d_scores = score_gradients(pair, column_lse, column_delta, triton.dot(value, gradient, trans_b=True))
        value_total = value_total + triton.dot(weights.astype(gradient.dtype), gradient)
        return key_total + triton.dot(d_scores.astype(query.dtype), query), value_total

    zeros = jnp.zeros((blocks.held, blocks.width), jnp.float32)
    key_total, value_total = lax.fori_loop(0, pl.cdiv(refs.query.shape[0], blocks.walked), walk, (zeros, zeros))
    store_rows(d_key, start, blocks, key_total * options.scale)
    store_rows(d_value, start, blocks, value_total)


def launch(
    kernel: Callable[..., None], name: str, blocks: Blocks, heads: int, held_length: int, interpret: bool
) -> Callable[[Any, Any], tuple[jax.Array | None, ...]]:
    """`call(inputs, outputs)`: runs `kernel` once per sample, head and block of held rows, each with its part of every array.

    `inputs` are an `Operands` and further arrays, `outputs` shapes or None. Arrays of four axes are [B, length, H, D], of three [B, H, N]
    beside the operands. The grid has one axis, whose limit is 2**31: those of the others (65,535) are within reach of a batch.
    """
    if triton is None:
        raise UserError(f"jax {jax.__version__} has no Triton in Pallas: choose implementation='xla' instead of 'pallas_gpu'")
    per_head = pl.cdiv(held_length, blocks.held)

    def sample(program: Any) -> Any:
        return lax.div(program, per_head * heads)

    def head(program: Any) -> Any:
        return lax.rem(lax.div(program, per_head), heads)

    def vectors(array: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, array.shape[1], None, blocks.width), lambda i: (sample(i), 0, head(i), 0))

    def rows(array: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, array.shape[2]), lambda i: (sample(i), head(i), 0))

    def tokens(array: Any) -> pl.BlockSpec | None:
        return None if array is None else pl.BlockSpec((None, *array.shape[1:]), lambda i: (sample(i), *(0,) * (array.ndim - 1)))

    def operands(given: Operands) -> Operands:
        slopes = None if given.slopes is None else pl.BlockSpec((None,), lambda i: (head(i),))
        small = {name: tokens(array) for name, array in given._asdict().items()}
        large = {name: vectors(getattr(given, name)) for name in ("query", "key", "value")}
        return Operands(**{**small, **large, "slopes": slopes})  # type: ignore[arg-type]

    def spec(array: Any) -> Any:
        return vectors(array) if array.ndim == 4 else rows(array)

    def call(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[jax.Array | None, ...]:
        first, *others = inputs
        wanted = [shape for shape in outputs if shape is not None]

        def filled(*refs: Any) -> None:
            given, made = refs[: len(inputs)], iter(refs[len(inputs) :])
            kernel(*given, *(None if shape is None else next(made) for shape in outputs))

        results = iter(
            pl.pallas_call(
                filled,
                grid=(first.query.shape[0] * heads * per_head,),
                in_specs=(operands(first), *map(spec, others)),
                out_specs=[spec(shape) for shape in wanted],
                out_shape=wanted,
                compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=2),
                interpret=interpret,
                name=name,
            )(*inputs)
        )
        return tuple(None if shape is None else next(results) for shape in outputs)

    return call


def storable(operands: Operands) -> Operands:
    """The mask as int8, since kernels read no bits, and slopes as float32."""
    mask, slopes = operands.key_mask, operands.slopes
    return operands._replace(
        key_mask=None if mask is None else mask.astype(jnp.int8), slopes=None if slopes is None else slopes.astype(jnp.float32)
    )


def forward(options: Options, operands: Operands, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """(output [B, N, H, D] in the queries' type, log-sum-exp float32 [B, H, N], minus infinity in rows with nothing to attend to).

    Raises:
        UserError: where this jax has no Triton.
    """
    query = operands.query
    batch, length, heads, head_size = query.shape
    blocks = choose_blocks(length, operands.key.shape[1], head_size, query.dtype.itemsize)
    run = launch(partial(forward_kernel, options=options, blocks=blocks), "attention_forward", blocks, heads, length, interpret)
    shapes = (jax.ShapeDtypeStruct(query.shape, query.dtype), jax.ShapeDtypeStruct((batch, heads, length), jnp.float32))
    out, log_sum_exp = run((storable(operands),), shapes)
    assert out is not None and log_sum_exp is not None
    return out, log_sum_exp


def backward(
    options: Options,
    operands: Operands,
    out: jax.Array,
    log_sum_exp: jax.Array,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of query, key, value and slopes (float32 [H]; None without slopes), from what `forward` returned and its gradients.

    Raises:
        UserError: where this jax has no Triton.
    """
    query, key, value = operands.query, operands.key, operands.value
    batch, length, heads, head_size = query.shape
    some = jnp.isfinite(log_sum_exp)
    product = jnp.einsum("bnhd,bnhd->bhn", out.astype(jnp.float32), d_out.astype(jnp.float32), precision="highest")
    delta = jnp.where(some, product - d_log_sum_exp, 0.0)  # [B, H, N]
    inputs = (storable(operands), jnp.where(some, log_sum_exp, 0.0), delta, d_out.astype(query.dtype))

    def shape(array: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype)

    blocks = choose_blocks(length, key.shape[1], head_size, query.dtype.itemsize)
    run = launch(partial(query_kernel, options=options, blocks=blocks), "attention_query_gradient", blocks, heads, length, interpret)
    per_row = None if operands.slopes is None else jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    d_query, d_slopes = run(inputs, (shape(query), per_row))
    blocks = choose_blocks(key.shape[1], length, head_size, query.dtype.itemsize)
    kernel = partial(key_value_kernel, options=options, blocks=blocks)
    run = launch(kernel, "attention_key_value_gradient", blocks, heads, key.shape[1], interpret)
    d_key, d_value = run(inputs, (shape(key), shape(value)))
    assert d_query is not None and d_key is not None and d_value is not None
    return d_query, d_key, d_value, None if d_slopes is None else d_slopes.sum(axis=(0, 2))
