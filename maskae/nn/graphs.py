"""Message passing on graphs: softmax over the edges of a node, and weighted sums over neighbours that run without a scatter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskae.errors import UserError
from maskae.vectors import at_least_float32

# Slots added in one fused loop; each is written out in the program, so that more of them compile longer.
UNROLL = 16
# Inner products are taken in pieces of this width where it divides: on a CPU one of 512 took five times as long as four of 128.
PIECE = 128


class Neighbours(NamedTuple):
    """Incoming edges of every node in tables of equal degree, made by `neighbour_tables`; int32 arrays, a jit argument.

    A table has one column per node and one row per slot: tables of shape [K, R] hold nodes of at most K incoming edges.
    """

    edges: tuple[jax.Array, ...]  # [K, R] each: edge in the slot, E where the slot is empty
    sources: tuple[jax.Array, ...]  # [K, R] each: source node of that edge, 0 where empty
    nodes: tuple[jax.Array, ...]  # [R] each: node of the column, 0 where the column is spare
    columns: jax.Array  # [N]: column of each node in the tables side by side; past the end for nodes without edges
    slots: jax.Array  # [E]: slot of each edge in the tables, flattened one after the other; past the end for padding
    reverse: jax.Array  # [E]: the edge in the other direction; itself for self-loops and padding


def segment_softmax(
    logits: jax.Array, segments: jax.Array, count: int, valid: jax.Array | None = None, *, indices_are_sorted: bool = False
) -> jax.Array:
    """Softmax over the entries of each segment, such as a node's incoming edges (Velickovic et al. 2018, equation 3).

    Args:
        logits: [E, ...] floats; each trailing position (head) is its own softmax.
        segments: int32 [E], 0..count-1 where valid.
        count: number of segments, static; empty ones are allowed.
        valid: bool [E], False at padding, whose weight and gradient are 0.
        indices_are_sorted: promise that `segments` ascends; only without `valid`.

    Returns:
        [E, ...] of the dtype of `logits`, computed in at least float32; sums to 1 over every segment with a valid entry.

    Raises:
        UserError: where shapes do not fit.
    """
    if segments.shape != logits.shape[:1] or (valid is not None and valid.shape != segments.shape):
        raise UserError(f"segments of shape {segments.shape}, and valid if given, must have the first axis of logits {logits.shape}")
    if valid is not None and indices_are_sorted:
        raise UserError("segment_softmax takes valid or indices_are_sorted, not both: padding is counted to segment 0")
    wide = at_least_float32(logits)
    if valid is not None:
        segments = jnp.where(valid, segments, 0)
        wide = jnp.where(valid.reshape(-1, *[1] * (logits.ndim - 1)), wide, -jnp.inf)
    largest = jax.ops.segment_max(jax.lax.stop_gradient(wide), segments, count, indices_are_sorted=indices_are_sorted)
    # A segment of padding alone has no largest entry; 0 keeps its exponents at exp(-inf) = 0.
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    exponents = jnp.exp(wide - largest[segments])
    total = jax.ops.segment_sum(exponents, segments, count, indices_are_sorted=indices_are_sorted)
    return (exponents / jnp.where(total > 0, total, 1)[segments]).astype(logits.dtype)


def neighbour_tables(
    sources: np.ndarray,
    destinations: np.ndarray,
    node_count: int,
    valid: np.ndarray | None = None,
    *,
    columns: Mapping[int, int] | None = None,
) -> Neighbours:
    """Sort the edges of a symmetric graph into tables by degree; on the host, once per graph.

    Args:
        sources: int [E]; edges in any order, self-loops and repeated edges allowed.
        destinations: int [E].
        node_count: number of nodes N, padding included.
        valid: bool [E], False at padding edges, which belong to no node.
        columns: table height -> number of nodes it has room for, so that graphs of equal N and E share one compiled program. By default
            powers of two with exactly the room this graph needs. A node goes to the lowest table that holds its edges.

    Raises:
        UserError: where a node index is out of range, an edge has none in the other direction, or `columns` has no room.
    """
    source, destination = np.asarray(sources, np.int64), np.asarray(destinations, np.int64)
    real = np.ones(source.shape, bool) if valid is None else np.asarray(valid, bool)
    if source.ndim != 1 or not source.shape == destination.shape == real.shape:
        raise UserError(f"sources {source.shape}, destinations {destination.shape} and valid {real.shape} must be vectors of one length")
    chosen = np.nonzero(real)[0]
    ends = np.concatenate([source[chosen], destination[chosen]])
    if ends.size and not 0 <= ends.min() <= ends.max() < node_count:
        raise UserError(f"edges name nodes {ends.min()}..{ends.max()}, but the graph has {node_count} nodes")
    reverse = np.arange(source.size)
    reverse[chosen] = chosen[_reverse_edges(source[chosen], destination[chosen])]
    by_destination = chosen[np.argsort(destination[chosen], kind="stable")]
    degree = np.bincount(destination[chosen], minlength=node_count)
    edges, nodes = fill_tables(by_destination, degree, source.size, columns)

    place = np.full(node_count, sum(map(len, nodes)))
    slots = np.full(source.size, sum(table.size for table in edges))
    column, slot = 0, 0
    for table, members in zip(edges, nodes, strict=True):
        filled = table < source.size
        used = members[filled.any(axis=0)]
        place[used] = column + np.arange(used.size)
        slots[table[filled]] = slot + np.nonzero(filled.reshape(-1))[0]
        column, slot = column + members.size, slot + table.size
    padded = np.append(source, 0)
    return Neighbours(
        edges=tuple(jnp.asarray(table, jnp.int32) for table in edges),
        sources=tuple(jnp.asarray(padded[table], jnp.int32) for table in edges),
        nodes=tuple(jnp.asarray(members, jnp.int32) for members in nodes),
        columns=jnp.asarray(place, jnp.int32),
        slots=jnp.asarray(slots, jnp.int32),
        reverse=jnp.asarray(reverse, jnp.int32),
    )


@jax.custom_vjp
def aggregate_neighbours(values: jax.Array, weights: jax.Array, neighbours: Neighbours) -> jax.Array:
    """Weighted sum over incoming edges, sum_j a_ij z_j (Velickovic et al. 2018, equation 4), by gathers alone in both directions.

    As the graph is symmetric, the gradient of `values` is the same sum over the same neighbours with the weights of the reversed edges;
    autodiff would transpose the gather to a scatter, which is slow on a CPU.

    Args:
        values: [N, H, D] floats.
        weights: [E, H] floats, in the order of the edges given to `neighbour_tables`; those of padding edges do not count.
        neighbours: the graph.

    Returns:
        [N, H, D] of the dtype of `values`, summed in at least float32; 0 at nodes without edges.

    Raises:
        UserError: where shapes do not fit the graph.
    """
    _check(values, weights, neighbours)
    values, weights = jnp.asarray(values), jnp.asarray(weights)
    wide = jnp.promote_types(values.dtype, jnp.float32)
    sums = []
    for edges, sources in zip(neighbours.edges, neighbours.sources, strict=True):
        slot_weights = weights.astype(wide).at[edges].get(mode="fill", fill_value=0)  # [K, R, H]
        sums.append(sum_slots(values.astype(wide), slot_weights, sources))  # [R, H, D]
    if not sums:
        return jnp.zeros_like(values)
    return side_by_side(sums).at[neighbours.columns].get(mode="fill", fill_value=0).astype(values.dtype)  # [N, H, D]


def _forward(values: jax.Array, weights: jax.Array, neighbours: Neighbours) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Neighbours]]:
    return aggregate_neighbours(values, weights, neighbours), (values, weights, neighbours)


def _backward(saved: tuple[jax.Array, jax.Array, Neighbours], cotangent: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    values, weights, neighbours = saved
    values_gradient = aggregate_neighbours(cotangent, weights[neighbours.reverse], neighbours)
    wide = jnp.promote_types(values.dtype, jnp.float32)
    if not neighbours.sources:
        return values_gradient, jnp.zeros_like(weights), None
    nodes, heads, width = values.shape
    pieces = width // PIECE if width % PIECE == 0 else 1
    split_values = values.astype(wide).reshape(nodes, heads * pieces, -1)
    split_cotangent = cotangent.astype(wide).reshape(split_values.shape)
    products = [
        _slot_products(split_values, split_cotangent[members], sources).reshape(-1, heads, pieces)  # [K * R, H, pieces]
        for members, sources in zip(neighbours.nodes, neighbours.sources, strict=True)
    ]
    weights_gradient = side_by_side(products).sum(-1).at[neighbours.slots].get(mode="fill", fill_value=0)  # [E, H]
    return values_gradient, weights_gradient.astype(weights.dtype), None


aggregate_neighbours.defvjp(_forward, _backward)


def side_by_side(parts: list[jax.Array]) -> jax.Array:
    """Concatenation along axis 0, written part by part.

    On a CPU `jnp.concatenate` made the sums before it eight times slower with one head (2,708 nodes of width 512).
    """
    total = jnp.zeros((sum(len(part) for part in parts), *parts[0].shape[1:]), parts[0].dtype)
    start = 0
    for part in parts:
        total = jax.lax.dynamic_update_slice_in_dim(total, part, start, 0)
        start += len(part)
    return total


def sum_slots(values: jax.Array, weights: jax.Array, sources: jax.Array) -> jax.Array:
    """Sum over slots of weights [K, R, H] times values [N, H, D] at sources [K, R] -> [R, H, D].

    Written out slot by slot: a reduction over K took six times as long on a CPU, a batched product three times.
    """

    def add(total: jax.Array, weights: jax.Array, sources: jax.Array) -> jax.Array:
        for slot in range(sources.shape[0]):
            total = total + weights[slot, :, :, None] * values[sources[slot]]
        return total

    zero = jnp.zeros((sources.shape[1], *values.shape[1:]), values.dtype)
    if sources.shape[0] <= UNROLL:
        return add(zero, weights, sources)
    chunks = weights.reshape(-1, UNROLL, *weights.shape[1:]), sources.reshape(-1, UNROLL, sources.shape[1])
    return jax.lax.scan(lambda total, chunk: (add(total, *chunk), None), zero, chunks)[0]


def _slot_products(values: jax.Array, cotangent: jax.Array, sources: jax.Array) -> jax.Array:
    """Inner product of each column's cotangent [R, H, D] with values [N, H, D] at sources [K, R] -> [K, R, H].

    Slot after slot in a loop: the same products written out took five times as long on a CPU.
    """
    return jax.lax.map(lambda slot: (cotangent * values[slot]).sum(-1), sources)


def _check(values: jax.Array, weights: jax.Array, neighbours: Neighbours) -> None:
    nodes, edges = neighbours.columns.shape[0], neighbours.reverse.shape[0]
    if values.ndim != 3 or values.shape[0] != nodes:
        raise UserError(f"values have shape {values.shape}; the graph needs [{nodes}, heads, width]")
    if weights.shape != (edges, values.shape[1]):
        raise UserError(f"weights have shape {weights.shape}; the graph and values need {(edges, values.shape[1])}")


def _reverse_edges(source: np.ndarray, destination: np.ndarray) -> np.ndarray:
    """For each edge the position of the one in the other direction; the k-th of repeated edges is paired with the k-th."""
    forward = np.lexsort((source, destination))
    backward = np.lexsort((destination, source))
    lonely = np.nonzero((source[forward] != destination[backward]) | (destination[forward] != source[backward]))[0]
    if lonely.size:
        suspects = [f"{source[edge]} -> {destination[edge]}" for edge in (forward[lonely[0]], backward[lonely[0]])]
        raise UserError(f"the graph is not symmetric: edge {' or '.join(suspects)} lacks its reverse")
    reverse = np.empty_like(forward)
    reverse[forward] = backward
    return reverse


def fill_tables(
    by_destination: np.ndarray, degree: np.ndarray, empty: int, columns: Mapping[int, int] | None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tables [K, R] of the edges sorted by destination, and the node of each column [R]; `empty` marks slots without an edge."""
    if columns is None:
        heights = 2 ** np.ceil(np.log2(np.maximum(degree, 1))).astype(int)
        room = {int(height): int(((heights == height) & (degree > 0)).sum()) for height in np.unique(heights[degree > 0])}
    else:
        room = dict(sorted(columns.items()))
    first = np.cumsum(degree) - degree
    edges, nodes = [], []
    below = 0
    for height, capacity in room.items():
        members = np.nonzero((degree > below) & (degree <= height))[0]
        if members.size > capacity:
            raise UserError(f"{members.size} nodes have {below + 1} to {height} edges, but their table has room for {capacity}")
        slots = height if height <= UNROLL else -(-height // UNROLL) * UNROLL
        table = np.full((slots, capacity), empty)
        slot = np.arange(slots)[:, None]  # [K, 1]
        filled = slot < degree[members]  # [K, R]
        table[:, : members.size][filled] = by_destination[(first[members] + slot)[filled]]
        edges.append(table)
        nodes.append(np.pad(members, (0, capacity - members.size)))
        below = height
    if degree.size and degree.max() > below:
        raise UserError(f"a node has {degree.max()} edges, but the highest table has {below} slots")
    return edges, nodes
