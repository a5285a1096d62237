"""Batches of graphs as one disjoint graph: flattening, self-loops, and packing the real nodes and edges tightly.

Fields of a batch: `nodes` [B, N, D], `senders` and `receivers` int32 [B, E], `node_mask` bool [B, N], `edge_mask` bool [B, E] (False at
padding), without self-loops. A source of one large symmetric graph may add `table_*`, the `Neighbours` of its edges with one self-loop per
node appended, and `words_*`, the places of its features that are not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskae.nn.graph_layers import Graph
from maskae.nn.graphs import Neighbours, neighbour_tables
from maskae.nn.sparse_nodes import words_of
from maskae.vectors import maximum_over

TABLE = "table_"
POOLS = ("mean", "max", "sum")


class Nodes(NamedTuple):
    """What each of the N nodes of a `Graph` carries beside its place in it, in rows that are packed together."""

    features: jax.Array  # [N, D]
    draws: jax.Array  # uniform float32 [N, draws]


def table_fields(senders: np.ndarray, receivers: np.ndarray, node_count: int) -> dict[str, np.ndarray]:
    """`neighbour_tables` of a symmetric graph with self-loops appended, as fields of a record; UserError where it is not symmetric."""
    loops = np.arange(node_count)
    tables = neighbour_tables(np.concatenate([senders, loops]), np.concatenate([receivers, loops]), node_count)
    fields = {f"{TABLE}{name}": np.asarray(getattr(tables, name)) for name in ("columns", "slots", "reverse")}
    for number, parts in enumerate(zip(tables.edges, tables.sources, tables.nodes, strict=True)):
        names = (f"{TABLE}edges_{number}", f"{TABLE}sources_{number}", f"{TABLE}nodes_{number}")
        fields |= {name: np.asarray(part) for name, part in zip(names, parts, strict=True)}
    return fields


def neighbours_of(batch: Mapping[str, Any]) -> Neighbours | None:
    """The `Neighbours` in a batch of one graph; None where the batch has several or no tables."""
    if f"{TABLE}columns" not in batch or batch["node_mask"].shape[0] != 1:
        return None
    count = sum(name.startswith(f"{TABLE}edges_") for name in batch)
    kinds = ("edges", "sources", "nodes")
    edges, sources, nodes = (tuple(batch[f"{TABLE}{kind}_{number}"][0] for number in range(count)) for kind in kinds)
    columns, slots, reverse = (batch[f"{TABLE}{part}"][0] for part in ("columns", "slots", "reverse"))
    return Neighbours(edges, sources, nodes, columns, slots, reverse)


def flatten_graphs(batch: Mapping[str, jax.Array]) -> Graph:
    """B graphs of N nodes as one of B * N, self-loops of all real nodes after the edges: E' = B * E + B * N."""
    graphs, nodes = batch["node_mask"].shape
    offset = jnp.arange(graphs)[:, None] * nodes  # [B, 1]
    senders, receivers = ((batch[name] + offset).reshape(-1) for name in ("senders", "receivers"))
    node_valid = batch["node_mask"].reshape(-1)
    graph = Graph(senders, receivers, batch["edge_mask"].reshape(-1), node_valid, None)
    return add_self_loops(graph)._replace(neighbours=neighbours_of(batch), words=words_of(batch))


def add_self_loops(graph: Graph) -> Graph:
    """One more edge from every valid node to itself, after the edges; also where there is one already."""
    loops = jnp.arange(graph.node_valid.shape[0], dtype=graph.senders.dtype)
    senders, receivers = jnp.concatenate([graph.senders, loops]), jnp.concatenate([graph.receivers, loops])
    return Graph(senders, receivers, jnp.concatenate([graph.edge_valid, graph.node_valid]), graph.node_valid)


def drop_edges(graph: Graph, draws: jax.Array, rate: float) -> Graph:
    """DropEdge as in GraphMAE's code: edges whose uniform draw [E] is below `rate` go, then every node gets a(nother) self-loop."""
    return add_self_loops(graph._replace(edge_valid=graph.edge_valid & (draws >= rate), neighbours=None))


def pack_graph(graph: Graph, node_budget: int, edge_budget: int) -> tuple[Graph, jax.Array]:
    """The valid nodes and edges first, `node_budget` and `edge_budget` of them (which must be enough), and the nodes' old places int32."""
    places = jnp.nonzero(graph.node_valid, size=node_budget, fill_value=0)[0]
    edges = jnp.nonzero(graph.edge_valid, size=edge_budget, fill_value=0)[0]
    renumbered = jnp.cumsum(graph.node_valid) - 1  # [N]: the new number of each valid node
    node_valid = jnp.arange(node_budget) < graph.node_valid.sum()
    edge_valid = jnp.arange(edge_budget) < graph.edge_valid.sum()
    senders, receivers = (jnp.where(edge_valid, renumbered[ends[edges]], 0) for ends in (graph.senders, graph.receivers))
    return Graph(senders, receivers, edge_valid, node_valid), places


def with_packing(
    function: Callable[[Graph, Nodes], Any],
    graph: Graph,
    nodes: Nodes,
    budgets: tuple[int, int],
    unpack: Callable[[Any], Any] = lambda result: result,
) -> Any:
    """`function(graph, nodes)` on the packed graph where a batch's real nodes and edges fit into `budgets`, else on the graph as it is.

    Both are compiled; which one runs is decided per batch, so a budget changes the cost and not the result. `unpack` brings the packed
    result to the shapes of the other (see `unpack_nodes`). A budget of 0 (or no smaller than the graph) never packs.
    """
    node_budget, edge_budget = budgets
    if not 0 < node_budget < graph.node_valid.shape[0] or not 0 < edge_budget < graph.edge_valid.shape[0]:
        return function(graph, nodes)

    def packed() -> Any:
        small, places = pack_graph(graph, node_budget, edge_budget)
        return unpack(function(small, jax.tree.map(lambda rows: rows[places], nodes)))

    fits = (graph.node_valid.sum() <= node_budget) & (graph.edge_valid.sum() <= edge_budget)
    return jax.lax.cond(fits, packed, lambda: function(graph, nodes))


def unpack_nodes(rows: jax.Array, node_valid: jax.Array) -> jax.Array:
    """Rows [node_budget, D] of a packed graph back in the places of its nodes [N, D], zeros at padding."""
    places = jnp.clip(jnp.cumsum(node_valid) - 1, 0, rows.shape[0] - 1)
    return jnp.where(node_valid[:, None], rows[places], 0)


def row_shares(x: jax.Array) -> jax.Array:
    """Each row of [..., D] over its sum; rows that sum to 0 stay as they are."""
    total = x.sum(-1, keepdims=True)
    return x / jnp.where(total == 0, 1, total)


def pool_nodes(tokens: jax.Array, node_mask: jax.Array, pool: str) -> jax.Array:
    """Mean, maximum or sum over the real nodes of each graph: [B, N, D] with zeros at padding -> [B, D]; 0 for a graph without nodes."""
    if pool == "max":
        highest = maximum_over(jnp.where(node_mask[..., None], tokens, -jnp.inf), 1)
        return jnp.where(node_mask.any(1)[:, None], highest, 0)
    total = tokens.sum(1)
    return total if pool == "sum" else total / jnp.maximum(node_mask.sum(1), 1)[:, None]
