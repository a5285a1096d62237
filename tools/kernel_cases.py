"""What tools/bench_kernels.py compares: each kernel's versions over sizes and options, with random inputs and a reference."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskae.kernels.attention import attention
from maskae.kernels.attention_reference import allowed_pairs, attend, distances
from maskae.kernels.operands import Operands, Options
from maskae.losses.blocked import Computation
from maskae.losses.chamfer import chamfer_distance
from maskae.losses.contrastive import info_nce
from maskae.masking import random_mask, restore_tokens, take_tokens
from maskae.nn.graphs import aggregate_neighbours, neighbour_tables

# Option sets by the names of the command line and by those of the table of choices (maskae.kernels.operands.feature_names).
OPTION_SETS = {"plain": "plain", "mask": "mask", "segments": "segments", "alibi": "positions", "soft_cap": "cap"}
SOFT_CAP = 30.0
CONTRASTIVE_SIZES = ((256, 256), (2048, 256))  # rows, width
CHAMFER_SIZES = ((256, 32), (4, 2048))  # sets, points: Point-MAE's groups, whole clouds
CORA = (2708, 5278)  # nodes, undirected edges
GRAPH_WIDTH = (4, 64)  # heads, width of each
MASK_RATIO = 0.75

# (learned arrays, other arrays) -> result; gradients are those of the learned ones.
Version = Callable[[tuple[Any, ...], Any], Any]


@dataclass(frozen=True)
class Sizes:
    """What the command line chose. `dtype` is that of tokens and embeddings; points, and weights of edges, are float32."""

    lengths: tuple[int, ...]
    batch: int
    dtype: str
    heads: int
    head_size: int
    options: tuple[str, ...]


@dataclass(frozen=True)
class Contest:
    """Versions of one computation on one set of inputs.

    Attributes:
        versions: by name; the first is the one that the others are compared with.
        make: random inputs, (learned, other).
        reference: is run on float32 inputs with products in full precision.
        absent: versions that cannot run here, and why.
        row: what a row of the table of choices says of this case beside its result; empty where no table chooses.
    """

    kernel: str
    case: str
    versions: dict[str, Version]
    make: Callable[[], tuple[tuple[Any, ...], Any]]
    reference: Version
    absent: dict[str, str] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)


def operands_of(learned: tuple[Any, ...], other: dict[str, Any]) -> Operands:
    """Queries, keys, values (and slopes) with their companions."""
    query, key, value, *slopes = learned
    return Operands(query, key, value, slopes=slopes[0] if slopes else None, **other)


def attention_inputs(sizes: Sizes, length: int, option: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random queries, keys, values [B, N, H, D] with what `option` needs."""
    random = np.random.default_rng(length)
    shape = (sizes.batch, length, sizes.heads, sizes.head_size)
    learned = tuple(jnp.asarray(random.normal(size=shape), sizes.dtype) for _ in range(3))
    other: dict[str, Any] = {}
    if option == "mask":
        count = random.integers(max(1, length // 2), length + 1, (sizes.batch, 1))
        other["key_mask"] = jnp.asarray(np.arange(length) < count)
    if option == "segments":
        segments = jnp.asarray(np.sort(random.integers(0, 4, (sizes.batch, length))), jnp.int32)
        other |= {"query_segments": segments, "key_segments": segments}
    if option == "alibi":
        positions = jnp.asarray(random.integers(0, 15, (sizes.batch, length, 2)), jnp.float32)
        other |= {"query_positions": positions, "key_positions": positions}
        learned += (jnp.asarray(2.0 ** -(np.arange(1, sizes.heads + 1) / 2), jnp.float32),)
    return learned, other


def run_attention(implementation: str, options: Options, learned: tuple[Any, ...], other: dict[str, Any]) -> Any:
    """maskae's attention by one implementation."""
    query, key, value, *slopes = learned
    given = {"slopes": slopes[0] if slopes else None, "soft_cap": options.soft_cap, "scale": options.scale, **other}
    return attention(query, key, value, implementation=implementation, **given)


def run_tokamax(options: Options, learned: tuple[Any, ...], other: dict[str, Any]) -> Any:
    """tokamax's own choice, with masks and biases as arrays in memory, which is what it takes."""
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["bench_kernels"], known_only=True)
    operands = operands_of(learned, other)
    allowed = allowed_pairs(operands)
    bias = None if operands.slopes is None else (-operands.slopes[:, None, None] * distances(operands)[:, None]).astype(learned[0].dtype)
    mask = None if allowed is None else allowed[:, None]
    return tokamax.dot_product_attention(*learned[:3], bias=bias, mask=mask, scale=options.scale, logits_soft_cap=options.soft_cap)


def attention_versions(sizes: Sizes, option: str) -> tuple[dict[str, Version], dict[str, str]]:
    """The implementations that can run here, and why the others cannot."""
    backend = jax.default_backend()
    options = Options(sizes.head_size**-0.5, SOFT_CAP if option == "soft_cap" else None)
    names = ["xla"]
    absent: dict[str, str] = {}
    for name, platform in (("pallas_gpu", "gpu"), ("pallas_tpu", "tpu"), ("cudnn", "gpu")):
        if backend != platform:
            absent[name] = f"not available on {backend}"
        elif name == "cudnn" and (option not in ("plain", "mask") or jnp.dtype(sizes.dtype).itemsize != 2):
            absent[name] = f"has no {option} in {sizes.dtype}"
        else:
            names.append(name)
    versions: dict[str, Version] = {name: partial(run_attention, name, options) for name in names}
    if importlib.util.find_spec("tokamax") is None:
        absent["tokamax"] = "not installed"
    else:
        versions["tokamax"] = partial(run_tokamax, options)
    return versions, absent


def attention_contests(sizes: Sizes) -> Iterator[Contest]:
    """Every option set at every length."""
    for option in sizes.options:
        options = Options(sizes.head_size**-0.5, SOFT_CAP if option == "soft_cap" else None)
        versions, absent = attention_versions(sizes, option)

        def reference(learned: tuple[Any, ...], other: Any, options: Options = options) -> Any:
            return attend(options, operands_of(learned, other))[0]

        for length in sizes.lengths:
            row = {"options": OPTION_SETS[option], "length": length, "dtype": sizes.dtype, "head_dim": sizes.head_size}
            make = partial(attention_inputs, sizes, length, option)
            yield Contest("attention", f"{option} {length}", versions, make, reference, absent, row)


def token_move_contests(sizes: Sizes) -> Iterator[Contest]:
    """Taking the visible tokens and putting them back, at every length that has some."""
    width = sizes.heads * sizes.head_size

    def take(implementation: str, learned: tuple[Any, ...], other: Any) -> Any:
        return take_tokens(learned[0], other, implementation)

    def restore(implementation: str, learned: tuple[Any, ...], other: Any) -> Any:
        return restore_tokens(learned[0], learned[1], other, implementation)

    def make(length: int, move: str) -> tuple[tuple[Any, ...], Any]:
        random = np.random.default_rng(length)
        keep = max(1, int(length * (1 - MASK_RATIO)))
        mask = random_mask(jnp.asarray(random.random((sizes.batch, length)), jnp.float32), keep)
        tokens = jnp.asarray(random.normal(size=(sizes.batch, length if move == "take" else keep, width)), sizes.dtype)
        if move == "take":
            return (tokens,), mask.keep_indices
        return (tokens, jnp.asarray(random.normal(size=(1, 1, width)), sizes.dtype)), mask.restore

    for move, function in (("take", take), ("restore", restore)):
        for length in sizes.lengths:
            versions: dict[str, Version] = {name: partial(function, name) for name in ("gather", "one_hot")}
            yield Contest("token_moves", f"{move} {length}x{width}", versions, partial(make, length, move), versions["gather"])


def contrastive_contests(sizes: Sizes) -> Iterator[Contest]:
    """Two-way InfoNCE with the matrix of all pairs and in blocks."""

    def loss(implementation: str, learned: tuple[Any, ...], other: Any) -> Any:
        return info_nce(*learned, computation=Computation(implementation))

    def make(rows: int, width: int) -> tuple[tuple[Any, ...], Any]:
        random = np.random.default_rng(rows)
        embeddings = random.normal(size=(2, rows, width))
        queries, keys = (embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)).astype(np.float32)
        return (jnp.asarray(queries, sizes.dtype), jnp.asarray(keys, sizes.dtype), jnp.float32(10.0)), None

    for rows, width in CONTRASTIVE_SIZES:
        versions: dict[str, Version] = {name: partial(loss, name) for name in ("plain", "blocked")}
        yield Contest("contrastive", f"info_nce {rows}x{width}", versions, partial(make, rows, width), versions["plain"])


def plain_chamfer(learned: tuple[Any, ...], other: Any) -> Any:
    """Chamfer distance by the matrix of all pairs [S, P, T], differentiated by JAX."""
    prediction, target = learned
    squares = jnp.square(prediction[:, :, None] - target[:, None]).sum(-1)  # [S, P, T]
    return squares.min(2).mean() + squares.min(1).mean()


def chamfer_contests(sizes: Sizes) -> Iterator[Contest]:
    """The l2 form, with all pairs at once and in blocks."""

    def blocked(learned: tuple[Any, ...], other: Any) -> Any:
        return chamfer_distance(*learned)

    def make(sets: int, points: int) -> tuple[tuple[Any, ...], Any]:
        random = np.random.default_rng(points)
        return tuple(jnp.asarray(random.normal(size=(sets, points, 3)), jnp.float32) for _ in range(2)), None

    for sets, points in CHAMFER_SIZES:
        versions: dict[str, Version] = {"plain": plain_chamfer, "blocked": blocked}
        yield Contest("chamfer", f"{sets} sets of {points}", versions, partial(make, sets, points), plain_chamfer)


def random_graph(nodes: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Sources and destinations of a symmetric graph with loops and a few nodes of many edges, as in citation networks."""
    random = np.random.default_rng(nodes)
    chance = 1.0 / (np.arange(nodes) + 10.0)
    ends = random.choice(nodes, (2 * pairs, 2), p=chance / chance.sum())
    ends[:, 1] = random.integers(0, nodes, 2 * pairs)
    unique = np.unique(np.sort(ends[ends[:, 0] != ends[:, 1]], axis=1), axis=0)
    unique = unique[random.permutation(len(unique))[:pairs]]
    loops = np.arange(nodes)
    return np.concatenate([unique[:, 0], unique[:, 1], loops]), np.concatenate([unique[:, 1], unique[:, 0], loops])


def neighbour_contests(sizes: Sizes) -> Iterator[Contest]:
    """Weighted sums over the neighbours in a graph of Cora's size: scatter with autodiff, and gathers in both directions."""
    nodes = CORA[0]

    def plain(learned: tuple[Any, ...], other: Any) -> Any:
        values, weights = learned
        sources, destinations, _ = other
        return jax.ops.segment_sum(values[sources] * weights[:, :, None], destinations, nodes)

    def custom(learned: tuple[Any, ...], other: Any) -> Any:
        return aggregate_neighbours(*learned, other[2])

    def make() -> tuple[tuple[Any, ...], Any]:
        random = np.random.default_rng(0)
        heads, width = GRAPH_WIDTH
        sources, destinations = random_graph(*CORA)
        values = jnp.asarray(random.normal(size=(nodes, heads, width)), jnp.float32)
        weights = jnp.asarray(random.random((len(sources), heads)), jnp.float32)
        return (values, weights), (jnp.asarray(sources), jnp.asarray(destinations), neighbour_tables(sources, destinations, nodes))

    yield Contest("neighbours", f"{nodes} nodes x {GRAPH_WIDTH[0]}x{GRAPH_WIDTH[1]}", {"segment_sum": plain, "custom": custom}, make, plain)


KERNELS: dict[str, Callable[[Sizes], Iterator[Contest]]] = {
    "attention": attention_contests,
    "token_moves": token_move_contests,
    "contrastive": contrastive_contests,
    "chamfer": chamfer_contests,
    "neighbours": neighbour_contests,
}


def with_gradients(version: Version) -> Callable[[tuple[Any, ...], Any, Any], Any]:
    """(learned, other, cotangent) -> result and the gradients of the learned arrays."""

    def run(learned: tuple[Any, ...], other: Any, cotangent: Any) -> Any:
        result, pullback = jax.vjp(lambda *arrays: version(arrays, other), *learned)
        return result, pullback(cotangent)

    return run


def forward_only(version: Version) -> Callable[[tuple[Any, ...], Any, Any], Any]:
    """The same arguments -> result."""
    return lambda learned, other, cotangent: version(learned, other)


def pick(names: Sequence[str], sizes: Sizes) -> Iterator[Contest]:
    """The contests of the kernels so named."""
    for name in names:
        yield from KERNELS[name](sizes)
