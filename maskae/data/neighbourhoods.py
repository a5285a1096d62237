"""Graphs for clustering: nodes as records, and a whole graph with the weights of a random walk's steps.

`node_rows:acm` has a record per node: `nodes` [D] and its class as the label. `neighbourhood:acm:power2` is the whole graph as one record:
`nodes` [N, D], `node_label` int32 [N], and the weights above 0 as `neighbour_rows`, `neighbour_columns` int32 [P], `neighbour_weights`
float32 [P]. They are those of the walk's second step (`power2`), or of its first three together (`sum3`). A set that comes without a graph
gets that of each node's nearest others: `neighbourhood:usps:power4:heat3`.

A set is a file `graphs_node/<name>.npz` under the data root (`maskae.data.graph_files.read_node_npz`); the citation networks are also read
as published. Nobody is held out in these sets: both splits are all nodes, and labels only score.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from maskae.data.contract import Record, Source, SourceArguments
from maskae.data.graph_files import NodeGraph
from maskae.data.graphs import NodeGraphSource, fields_of, read_node_graph
from maskae.data.spec import LABEL, DataSpec, Field, split_hash
from maskae.errors import UserError, check_choice

SIMILARITIES = ("heat", "cos", "ncos")


@dataclass(frozen=True)
class NodeRows:
    """The nodes of a graph as records without their edges. features [N, D], labels int32 [N]."""

    features: np.ndarray
    labels: np.ndarray
    spec: DataSpec

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        return {"nodes": self.features[index], LABEL: int(self.labels[index])}

    def name(self, index: int) -> str:
        """`node_rows:acm node 17`."""
        return f"{self.spec.name} node {index}"


def open_node_rows(arguments: SourceArguments) -> Source:
    """All nodes of a graph, in both splits. Raises UserError for a name or file that is none."""
    graph = read_node_graph(arguments, arguments.path)
    count = len(graph.labels)
    spec = DataSpec(
        arguments.name,
        None,
        0,
        (),
        (),
        num_classes=int(graph.labels.max()) + 1,
        counts={"train": count, "val": count},
        split_hash=_hash(graph),
        fields={"nodes": Field(graph.features.shape[1:], str(graph.features.dtype))},
    )
    return NodeRows(graph.features, graph.labels, spec)


def open_neighbourhood(arguments: SourceArguments) -> Source:
    """One graph with its neighbourhood weights, `NAME:power2` or `NAME:sum3`, maybe `:heat3`. Raises UserError for anything else."""
    name, _, rest = arguments.path.partition(":")
    found = re.fullmatch(r"(power|sum)([1-9]\d*)(?::([a-z]+)([1-9]\d*))?", rest)
    if not found:
        start = f"{arguments.name.partition(':')[0]}:{name or 'acm'}"
        raise UserError(f"{arguments.name}: write the steps of the walk behind the name, as in {start}:power2 or {start}:sum3")
    kind, steps, similarity, count = found.groups()
    graph = read_node_graph(arguments, name)
    edges = knn_edges(graph.features, int(count), similarity) if similarity else graph.edges
    weights = neighbourhood_weights(transition_matrix(edges, len(graph.labels)), int(steps), total=kind == "sum")
    record = neighbourhood_record(graph, weights)
    classes = int(graph.labels.max()) + 1
    spec = DataSpec(
        arguments.name,
        None,
        0,
        (),
        (),
        counts={"train": 1, "val": 1},
        split_hash=_hash(graph),
        fields=fields_of(record),
        details={"node_classes": classes},
    )
    return NodeGraphSource(record, spec)


def neighbourhood_record(graph: NodeGraph, weights: sparse.csr_matrix) -> Record:
    """The record of a whole graph with the weights above 0, in the order of rows."""
    pairs = weights.tocoo()
    return {
        "nodes": graph.features,
        "node_label": graph.labels,
        "neighbour_rows": pairs.row.astype(np.int32),
        "neighbour_columns": pairs.col.astype(np.int32),
        "neighbour_weights": pairs.data.astype(np.float32),
    }


def _hash(graph: NodeGraph) -> str:
    members = [(str(node), int(label)) for node, label in enumerate(graph.labels)]
    return split_hash(members, members)


def transition_matrix(edges: np.ndarray, nodes: int) -> sparse.csr_matrix:
    """A step of the random walk, D^-1 (max(A, A^T) + I), float32 [N, N]; rows sum to 1 (SCGC, section 3; its code's load_graph).

    edges: int [2, E], directed; an edge given several times counts as often. Rounded to float32 as the released loader does.
    """
    ones = np.ones(edges.shape[1])
    counts = sparse.coo_matrix((ones, (edges[0], edges[1])), shape=(nodes, nodes)).tocsr()
    walk = counts.maximum(counts.T) + sparse.identity(nodes, format="csr")
    degrees = np.asarray(walk.sum(1)).ravel()
    return sparse.csr_matrix(sparse.diags(1 / degrees) @ walk, dtype=np.float32)


def neighbourhood_weights(transition: sparse.csr_matrix, steps: int, *, total: bool) -> sparse.csr_matrix:
    """Gamma, float64 [N, N]: the power `steps` of a transition matrix, or with `total` the sum of all powers from 1 to `steps`."""
    step = power = sparse.csr_matrix(transition, dtype=np.float64)
    gathered = power
    for _ in range(steps - 1):
        power = sparse.csr_matrix(power @ step)
        gathered = gathered + power
    weights = sparse.csr_matrix(gathered if total else power)
    weights.sort_indices()
    return weights


def knn_edges(features: np.ndarray, count: int, similarity: str = "heat") -> np.ndarray:
    """Edges int32 [2, E] from every row of features [N, D] to the `count` others most like it, as SDCN builds graphs.

    It takes the `count` + 1 rows most like each and leaves out the row itself. Where so many are as like it as it is itself, it may not be
    among them, and has one neighbour more.

    similarity: "heat" is exp(-|x - y|^2 / 2), taken as the distance itself, which has the same order and does not underflow; "cos" the
    number of words that both rows have, of features above 0; "ncos" the same with rows divided by their sum. Raises UserError.
    """
    check_choice("similarity", similarity, SIMILARITIES)
    rows = features.astype(np.float64)
    if not 0 < count < len(rows):
        raise UserError(f"{count} nearest others of {len(rows)} rows: there must be more rows")
    if similarity != "heat":
        rows = np.where(rows > 0, 1.0, rows)
        if similarity == "ncos":
            total = np.abs(rows).sum(1, keepdims=True)
            rows /= np.where(total == 0, 1.0, total)
    chosen = np.empty((len(rows), count + 1), np.int64)
    squares = np.square(rows).sum(1)
    for start in range(0, len(rows), 1024):
        block = slice(start, start + 1024)
        likeness = rows[block] @ rows.T
        if similarity == "heat":
            likeness = 2 * likeness - squares[block, None] - squares
            likeness[np.arange(len(likeness)), np.arange(start, start + len(likeness))] = 0.0
        chosen[block] = np.argpartition(likeness, -(count + 1), axis=1)[:, -(count + 1) :]
    edges = np.stack([np.repeat(np.arange(len(rows)), count + 1), chosen.ravel()])
    return edges[:, edges[0] != edges[1]].astype(np.int32)
