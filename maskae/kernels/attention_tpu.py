"""Attention as Pallas kernels for TPUs (Mosaic): forward, gradient of the queries, gradient of keys and values.

Each program has one block of queries and one of keys, for several heads where the blocks are small, and walks along the other axis: the
running log-sum-exp of FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithms 1 and 2). Mosaic wants the last two dimensions of a block to
be multiples of (8, 128) or whole, so arrays are [B, H, N, D] here, and what belongs to a token is a column [N, 1] where tokens run down the
rows of a block of scores, and a row [1, N] where they run across. Blocks of scores lie with the queries down, and with the keys down in
the kernel of keys and values: no block of scores is ever transposed. The sizes of blocks are estimates: no TPU was at hand to tune them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maskae.errors import UserError
from maskae.kernels.operands import Operands, Options

# The id of keys that no query sees; masks, segments and padding are all told by ids, which must be equal.
NOWHERE = jnp.iinfo(jnp.int32).min
DTYPES = ("bfloat16", "float32")
# Rows of a bfloat16 tile; a whole length is padded to it.
SUBLANES = 16
WHOLE = 512
LENGTHS = (512, 384, 256, 128)
# Tokens times heads of one program: with head size 128 in float32, doubly buffered, six such arrays take 6 MiB of the 16 of a v5e.
TOKENS = 1024
MOST_HEADS = 16


class Blocks(NamedTuple):
    """How many queries, keys and heads one program has; lengths are padded to multiples, and `heads` divides the number of heads."""

    queries: int
    keys: int
    heads: int


def choose_blocks(queries: int, keys: int, heads: int) -> Blocks:
    """One block up to 512 tokens; above that the size that pads little and is not small. As many heads as fit into a program's memory."""
    lengths = _block_length(queries), _block_length(keys)
    most = min(MOST_HEADS, max(1, TOKENS // max(lengths)))
    return Blocks(*lengths, max(count for count in range(1, most + 1) if heads % count == 0))


def _block_length(length: int) -> int:
    if length <= WHOLE:
        return _round_up(length, SUBLANES)
    # The start of a block costs about as much as 32 tokens of it.
    return min(LENGTHS, key=lambda size: _round_up(length, size) + 32 * pl.cdiv(length, size))


def _round_up(length: int, multiple: int) -> int:
    return pl.cdiv(length, multiple) * multiple


def forward(
    options: Options, operands: Operands, *, interpret: bool = False, blocks: Blocks | None = None
) -> tuple[jax.Array, jax.Array]:
    """Output [B, N, H, D] and log-sum-exp float32 [B, H, N] of checked operands.

    Args:
        interpret: run without Mosaic, on any platform.
        blocks: in place of those of `choose_blocks`; lengths that are no multiple of 128 must hold all tokens.

    Raises:
        UserError: a dtype that TPUs do not compute in.
    """
    layout = _Layout(operands, blocks, interpret)
    steps = layout.steps("key")
    outputs = {"out": layout.like("query", operands.query.dtype), "log_sum_exp": layout.row_shape}
    scratch = {} if steps == 1 else {"highest": layout.column, "total": layout.column, "mixed": layout.sums("query")}
    kernel = functools.partial(_forward_kernel, options=options, steps=steps)
    result = layout.call(kernel, "query", {}, outputs, scratch)
    return layout.stripped(result["out"], "query"), result["log_sum_exp"][:, :, 0, : operands.query.shape[1]]


def backward(
    options: Options,
    operands: Operands,
    out: jax.Array,
    log_sum_exp: jax.Array,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array,
    *,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of query [B, N, H, D], key and value [B, M, H, D] in their dtype and of the slopes, float32 [H] or None.

    Args:
        out, log_sum_exp: what `forward` gave.
        d_out, d_log_sum_exp: their cotangents, of the same shapes.
        interpret, blocks: as for `forward`.
    """
    layout = _Layout(operands, blocks, interpret)
    # With P the probabilities, dS = P * (dP - delta): the softmax takes out . d_out off, the log-sum-exp adds its own cotangent.
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1).swapaxes(1, 2) - d_log_sum_exp  # [B, H, N]
    # Rows without keys, and padding: exp(score - inf) is 0, where exp(-inf - -inf) would be NaN.
    empty = jnp.isneginf(log_sum_exp)
    more = {
        "d_out": layout.tokens(d_out.astype(operands.query.dtype), "query"),
        "log_sum_exp": layout.row(jnp.where(empty, jnp.inf, log_sum_exp), jnp.inf),
        "delta": layout.row(jnp.where(empty, 0.0, delta), 0.0),
    }
    outputs, scratch = {"d_query": layout.like("query", operands.query.dtype)}, {"d_query": layout.sums("query")}
    if operands.slopes is not None:
        outputs["d_slopes"], scratch["d_slopes"] = layout.row_shape, layout.column
    kernel = functools.partial(_query_kernel, options=options, steps=layout.steps("key"))
    of_query = layout.call(kernel, "query", more, outputs, scratch)

    outputs = {name: layout.like("key", operands.key.dtype) for name in ("d_key", "d_value")}
    scratch = {name: layout.sums("key") for name in outputs}
    kernel = functools.partial(_key_value_kernel, options=options, steps=layout.steps("query"))
    of_key = layout.call(kernel, "key", more, outputs, scratch)
    d_slopes = of_query["d_slopes"].sum((0, 2, 3)) if operands.slopes is not None else None
    d_query = layout.stripped(of_query["d_query"], "query")
    return d_query, layout.stripped(of_key["d_key"], "key"), layout.stripped(of_key["d_value"], "key"), d_slopes


class _Layout:
    """The operands as the kernels take them, and the shapes and specs of everything beside them."""

    def __init__(self, operands: Operands, blocks: Blocks | None, interpret: bool) -> None:
        query, key = operands.query, operands.key
        if query.dtype.name not in DTYPES:
            raise UserError(f"attention 'pallas_tpu' computes in {' or '.join(DTYPES)}, and dtype is {query.dtype}; use attention 'xla'")
        self.batch, _, self.all_heads, self.width = query.shape
        self.interpret = interpret
        chosen = blocks or choose_blocks(query.shape[1], key.shape[1], self.all_heads)
        self.heads = chosen.heads
        self.block = {"query": chosen.queries, "key": chosen.keys}
        self.length = {"query": query.shape[1], "key": key.shape[1]}
        self.padded = {axis: _round_up(length, self.block[axis]) for axis, length in self.length.items()}
        self.arrays = {"query": self.tokens(query, "query"), "key": self.tokens(key, "key"), "value": self.tokens(operands.value, "key")}
        self.ids = self._ids(operands)
        self.positions: dict[str, jax.Array] = {}
        self.slopes = operands.slopes
        if operands.query_positions is not None and operands.key_positions is not None:
            self.positions = {"query": self._pad(operands.query_positions, "query"), "key": self._pad(operands.key_positions, "key")}

    def _ids(self, operands: Operands) -> dict[str, jax.Array]:
        """int32 [B, N] and [B, M] that must be equal where a query sees a key; without "query" all of that are 0, empty without need."""
        keys = operands.key_segments
        if keys is None:
            if operands.key_mask is None and self.padded["key"] == self.length["key"]:
                return {}
            keys = jnp.zeros((self.batch, self.length["key"]), jnp.int32)
        if operands.key_mask is not None:
            keys = jnp.where(operands.key_mask, keys, NOWHERE)
        ids = {"key": self._pad(keys, "key", NOWHERE)}
        if operands.query_segments is not None:
            ids["query"] = self._pad(operands.query_segments, "query")
        return ids

    def _pad(self, x: jax.Array, which: str, value: float = 0, axis: int = 1) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, self.padded[which] - self.length[which])
        return jnp.pad(x, widths, constant_values=value)

    def tokens(self, x: jax.Array, which: str) -> jax.Array:
        """[B, N, H, D] -> [B, H, padded N, D]."""
        return self._pad(x, which).swapaxes(1, 2)

    def stripped(self, x: jax.Array, which: str) -> jax.Array:
        """[B, H, padded N, D] -> [B, N, H, D]."""
        return x[:, :, : self.length[which]].swapaxes(1, 2)

    def row(self, x: jax.Array, value: float) -> jax.Array:
        """float32 [B, H, N] of queries -> [B, H, 1, padded N]."""
        return self._pad(x, "query", value, axis=2)[:, :, None]

    def steps(self, axis: str) -> int:
        """How many blocks `axis` has."""
        return self.padded[axis] // self.block[axis]

    def like(self, axis: str, dtype: Any) -> jax.ShapeDtypeStruct:
        """The shape of an output with one vector per token of `axis`."""
        return jax.ShapeDtypeStruct((self.batch, self.all_heads, self.padded[axis], self.width), dtype)

    @property
    def row_shape(self) -> jax.ShapeDtypeStruct:
        """The shape of an output with one number per query."""
        return jax.ShapeDtypeStruct((self.batch, self.all_heads, 1, self.padded["query"]), jnp.float32)

    def sums(self, axis: str) -> Any:
        """A program's running sums with one vector per token of `axis`."""
        return pltpu.VMEM((self.heads, self.block[axis], self.width), jnp.float32)

    @property
    def column(self) -> Any:
        """A program's running sums with one number per query, as a column."""
        return pltpu.VMEM((self.heads, self.block["query"], 1), jnp.float32)

    def call(
        self, kernel: functools.partial[None], down: str, more: dict[str, jax.Array], outputs: dict[str, Any], scratch: dict[str, Any]
    ) -> dict[str, jax.Array]:
        """Run `kernel` for every block of the axis `down` ("query" or "key"), walking innermost along the other one."""
        across = "key" if down == "query" else "query"

        def spec(name: str, array: Any) -> pl.BlockSpec:
            if name in ("log_sum_exp", "delta", "d_slopes"):
                place = (lambda b, h, i, j: (b, h, 0, i)) if down == "query" else (lambda b, h, i, j: (b, h, 0, j))
                return pl.BlockSpec((None, self.heads, 1, self.block["query"]), place)
            axis = "key" if name in ("key", "value", "d_key", "d_value") else "query"
            place = (lambda b, h, i, j: (b, h, i, 0)) if axis == down else (lambda b, h, i, j: (b, h, j, 0))
            return pl.BlockSpec((None, self.heads, self.block[axis], self.width), place)

        inputs = self.arrays | more
        specs = {name: spec(name, array) for name, array in inputs.items()}
        for name, of_axis in (("ids", self.ids), ("positions", self.positions)):
            for axis, values in of_axis.items():
                values = values.reshape(self.batch, self.padded[axis], -1)  # [B, N, C]
                if axis == down:
                    inputs[f"{name}_down"] = values
                    specs[f"{name}_down"] = pl.BlockSpec((None, self.block[axis], values.shape[2]), lambda b, h, i, j: (b, i, 0))
                else:
                    inputs[f"{name}_across"] = values.swapaxes(1, 2)  # [B, C, N]
                    specs[f"{name}_across"] = pl.BlockSpec((None, values.shape[2], self.block[axis]), lambda b, h, i, j: (b, 0, j))
        if self.slopes is not None:
            inputs["slopes"], specs["slopes"] = self.slopes, pl.BlockSpec(memory_space=pltpu.SMEM)
        return pl.pallas_call(
            kernel,
            grid=(self.batch, self.all_heads // self.heads, self.steps(down), self.steps(across)),
            in_specs=(specs,),
            out_specs={name: spec(name, shape) for name, shape in outputs.items()},
            out_shape=outputs,
            scratch_shapes=(scratch,),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
            interpret=self.interpret,
            name=kernel.func.__name__.strip("_"),
        )(inputs)


def _forward_kernel(inputs: Any, outputs: Any, scratch: Any, *, options: Options, steps: int) -> None:
    """A block of outputs; the running maximum, total and mixture of each row lie in scratch between the blocks of keys."""
    pairs = _pairs(inputs)
    for head in range(inputs["query"].shape[0]):
        scores = _hide(_scores(options, inputs["query"][head], inputs["key"][head], pairs, _slope(inputs, head)), pairs)
        value = inputs["value"][head]
        if steps == 1:
            _write(outputs, head, *_softmax_sums(scores, value, None))
            continue

        @pl.when(pl.program_id(3) == 0)
        def _start(head: int = head) -> None:
            scratch["highest"][head] = jnp.full_like(scratch["highest"][head], -jnp.inf)
            scratch["total"][head] = jnp.zeros_like(scratch["total"][head])
            scratch["mixed"][head] = jnp.zeros_like(scratch["mixed"][head])

        previous = scratch["highest"][head], scratch["total"][head], scratch["mixed"][head]
        scratch["highest"][head], scratch["total"][head], scratch["mixed"][head] = _softmax_sums(scores, value, previous)

        @pl.when(pl.program_id(3) == steps - 1)
        def _finish(head: int = head) -> None:
            _write(outputs, head, scratch["highest"][head], scratch["total"][head], scratch["mixed"][head])


def _softmax_sums(scores: jax.Array, value: jax.Array, previous: tuple[jax.Array, ...] | None) -> tuple[jax.Array, ...]:
    """Maximum [n, 1], total of exponentials [n, 1] and mixture of values [n, D] after one more block of scores [n, m]."""
    highest = scores.max(-1, keepdims=True)
    if previous is not None:
        highest = jnp.maximum(highest, previous[0])
    # A row that has seen no key yet: exp(-inf - 0), and not exp(-inf - -inf).
    base = jnp.where(highest == -jnp.inf, 0.0, highest)
    weights = jnp.exp(scores - base)
    total, mixed = weights.sum(-1, keepdims=True), _dot(weights.astype(value.dtype), value)
    if previous is not None:
        decay = jnp.exp(previous[0] - base)
        total, mixed = total + previous[1] * decay, mixed + previous[2] * decay
    return highest, total, mixed


def _write(outputs: Any, head: int, highest: jax.Array, total: jax.Array, mixed: jax.Array) -> None:
    safe = jnp.where(total == 0, 1.0, total)
    outputs["out"][head] = (mixed / safe).astype(outputs["out"].dtype)
    outputs["log_sum_exp"][head] = jnp.where(total == 0, -jnp.inf, highest + jnp.log(safe)).T


def _query_kernel(inputs: Any, outputs: Any, scratch: Any, *, options: Options, steps: int) -> None:
    """A block of the queries' gradient, and of each row's part of the slopes': blocks of scores have the queries down."""
    _zero_at_start(scratch)
    pairs = _pairs(inputs)
    for head in range(inputs["query"].shape[0]):
        key = inputs["key"][head]
        scores = _scores(options, inputs["query"][head], key, pairs, _slope(inputs, head))
        probabilities = jnp.exp(_hide(scores, pairs) - inputs["log_sum_exp"][head].T)
        d_probabilities = _dot_transposed(inputs["d_out"][head], inputs["value"][head])
        d_scores = _score_gradient(options, scores, probabilities, d_probabilities - inputs["delta"][head].T)
        scratch["d_query"][head] += _dot(d_scores.astype(key.dtype), key)
        if pairs.distance is not None:
            scratch["d_slopes"][head] -= (d_scores * pairs.distance).sum(-1, keepdims=True)

    @pl.when(pl.program_id(3) == steps - 1)
    def _finish() -> None:
        outputs["d_query"][...] = (scratch["d_query"][...] * options.scale).astype(outputs["d_query"].dtype)
        if pairs.distance is not None:
            for head in range(inputs["query"].shape[0]):
                outputs["d_slopes"][head] = scratch["d_slopes"][head].T


def _key_value_kernel(inputs: Any, outputs: Any, scratch: Any, *, options: Options, steps: int) -> None:
    """A block of the keys' and values' gradients: blocks of scores have the keys down."""
    _zero_at_start(scratch)
    pairs = _pairs(inputs)
    for head in range(inputs["query"].shape[0]):
        query, d_out = inputs["query"][head], inputs["d_out"][head]
        scores = _scores(options, inputs["key"][head], query, pairs, _slope(inputs, head))
        probabilities = jnp.exp(_hide(scores, pairs) - inputs["log_sum_exp"][head])
        d_probabilities = _dot_transposed(inputs["value"][head], d_out)
        d_scores = _score_gradient(options, scores, probabilities, d_probabilities - inputs["delta"][head])
        scratch["d_value"][head] += _dot(probabilities.astype(d_out.dtype), d_out)
        scratch["d_key"][head] += _dot(d_scores.astype(query.dtype), query)

    @pl.when(pl.program_id(3) == steps - 1)
    def _finish() -> None:
        outputs["d_key"][...] = (scratch["d_key"][...] * options.scale).astype(outputs["d_key"].dtype)
        outputs["d_value"][...] = scratch["d_value"][...].astype(outputs["d_value"].dtype)


class _PairFacts(NamedTuple):
    """Of each pair of tokens of a program, for all its heads: whether they see each other (bool) and how far they are apart; or None."""

    allowed: jax.Array | None
    distance: jax.Array | None


def _pairs(inputs: Any) -> _PairFacts:
    allowed: Any = None
    distance: Any = None
    if "ids_down" in inputs or "ids_across" in inputs:
        allowed = (inputs["ids_down"][...] if "ids_down" in inputs else 0) == (inputs["ids_across"][...] if "ids_across" in inputs else 0)
    if "positions_down" in inputs:
        down, across = inputs["positions_down"][...], inputs["positions_across"][...]
        squares = [jnp.square(down[:, c : c + 1] - across[c : c + 1]) for c in range(down.shape[1])]
        distance = jnp.sqrt(functools.reduce(jnp.add, squares))
    return _PairFacts(allowed, distance)


def _slope(inputs: Any, head: int) -> Any:
    return inputs["slopes"][pl.program_id(1) * inputs["query"].shape[0] + head] if "slopes" in inputs else None


def _scores(options: Options, down: jax.Array, across: jax.Array, pairs: _PairFacts, slope: Any) -> jax.Array:
    """Scores [n, m] of tokens [n, D] and [m, D] before any mask."""
    scores = _dot_transposed(down, across) * options.scale
    if pairs.distance is not None:
        scores = scores - slope * pairs.distance
    return scores if options.soft_cap is None else options.soft_cap * jnp.tanh(scores / options.soft_cap)


def _hide(scores: jax.Array, pairs: _PairFacts) -> jax.Array:
    return scores if pairs.allowed is None else jnp.where(pairs.allowed, scores, -jnp.inf)


def _score_gradient(options: Options, scores: jax.Array, probabilities: jax.Array, centred: jax.Array) -> jax.Array:
    """Gradient of the scaled and biased scores, before the cap, from `centred` = dP - delta."""
    gradient = probabilities * centred
    return gradient if options.soft_cap is None else gradient * (1 - jnp.square(scores / options.soft_cap))


def _zero_at_start(scratch: Any) -> None:
    @pl.when(pl.program_id(3) == 0)
    def _start() -> None:
        for sums in scratch.values():
            sums[...] = jnp.zeros_like(sums)


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.dot(left, right, preferred_element_type=jnp.float32)


def _dot_transposed(left: jax.Array, right: jax.Array) -> jax.Array:
    """[n, D], [m, D] -> [n, m]."""
    return jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
