"""Graphs as records: `planetoid:cora`, one graph with labelled nodes, and `tu:MUTAG`, a set of labelled graphs.

Fields: `nodes` [N, D], `senders` and `receivers` int32 [E] (both directions, no self-loops), `node_mask` bool [N], `edge_mask` bool [E].
A graph set is padded to its largest graph. The one graph also has `node_label` int32 [N], `train_mask`, `val_mask`, `test_mask` bool [N]
and the tables of `maskae.nn.graph_batch.table_fields`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from maskae.data.contract import Record, Source, SourceArguments, stratified_split
from maskae.data.graph_files import (
    PLANETOID_BLOBS,
    TU_BLOBS,
    GraphSet,
    NodeGraph,
    provide_graph_set,
    provide_planetoid,
    read_graph_set_lists,
    read_graph_set_npz,
    read_graph_set_text,
    read_node_npz,
    read_planetoid,
)
from maskae.data.spec import LABEL, DataSpec, Field, split_hash
from maskae.errors import UserError, nearest
from maskae.nn.graph_batch import table_fields
from maskae.nn.sparse_nodes import word_fields

# The official degree features stop at 400.
LARGEST_DEGREE = 400


@dataclass(frozen=True)
class NodeGraphSource:
    """One graph as the only record, the same in both splits: which of its nodes are for training is said by its masks."""

    record: Record
    spec: DataSpec

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Record:
        if index != 0:
            raise IndexError(index)
        return dict(self.record)

    def name(self, index: int) -> str:
        """The source's name: there is one record."""
        return self.spec.name


@dataclass(frozen=True)
class GraphSetSource:
    """Graphs `rows` of a set, padded to its largest one. features: uint8 [all nodes, D]."""

    graphs: GraphSet
    features: np.ndarray
    rows: np.ndarray
    spec: DataSpec

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        graphs, row = self.graphs, int(self.rows[index])
        nodes = slice(graphs.node_ptr[row], graphs.node_ptr[row + 1])
        edges = slice(graphs.edge_ptr[row], graphs.edge_ptr[row + 1])
        record = {name: np.zeros(field.shape, field.dtype) for name, field in self.spec.fields.items()}
        count, pairs = nodes.stop - nodes.start, edges.stop - edges.start
        record["nodes"][:count] = self.features[nodes]
        record["node_mask"][:count] = True
        record["senders"][:pairs], record["receivers"][:pairs] = graphs.edges[:, edges]
        record["edge_mask"][:pairs] = True
        return record | {LABEL: int(graphs.labels[row])}

    def name(self, index: int) -> str:
        """`tu:MUTAG graph 17`, its number in the whole set."""
        return f"{self.spec.name} graph {int(self.rows[index])}"


def fields_of(record: Record) -> dict[str, Field]:
    """The fields of a record of arrays."""
    return {name: Field(value.shape, str(value.dtype)) for name, value in record.items() if name != LABEL}


def open_planetoid(arguments: SourceArguments) -> Source:
    """A node-labelled graph by name: `<root>/graphs_node/<name>.npz`, `<root>/<name>.npz`, or Planetoid's files `ind.<name>.*` in
    `<root>/planetoid`, where they are fetched to if there is nothing. Raises UserError for a name or file that is none."""
    graph = read_node_graph(arguments, arguments.path)
    return NodeGraphSource(node_record(graph), node_spec(arguments.name, graph))


def read_node_graph(arguments: SourceArguments, name: str) -> NodeGraph:
    """The graph `name` from the first place that has it, see `open_planetoid`."""
    base = arguments.base
    archives = [folder / f"{name}.npz" for folder in (base / "graphs_node", base)]
    found = next((path for path in archives if path.is_file()), None)
    if found is not None:
        return read_node_npz(found)
    if name in PLANETOID_BLOBS:
        provide_planetoid(name, base / "planetoid", fetch=arguments.fetch)
        return read_planetoid(base / "planetoid", name)
    have = sorted({path.stem for folder in (base / "graphs_node", base) for path in folder.glob("*.npz")} | set(PLANETOID_BLOBS))
    raise UserError(f"{arguments.name}: no graph {archives[0]}{nearest(name, have)}; there are {', '.join(have)}")


def node_record(graph: NodeGraph) -> Record:
    """The record of a whole graph."""
    count = len(graph.labels)
    senders, receivers = np.concatenate([graph.edges, graph.edges[::-1]], axis=1)
    masks = {f"{split}_mask": np.isin(np.arange(count), nodes) for split, nodes in graph.splits.items()}
    return {
        "nodes": graph.features,
        "senders": senders,
        "receivers": receivers,
        "node_mask": np.ones(count, bool),
        "edge_mask": np.ones(len(senders), bool),
        "node_label": graph.labels,
        **masks,
        **table_fields(senders, receivers, count),
        **word_fields(graph.features),
    }


def node_spec(name: str, graph: NodeGraph) -> DataSpec:
    """The spec of a whole graph; its classes are those of nodes, so `num_classes` (of records) is None."""
    members = [[(str(node), int(graph.labels[node])) for node in graph.splits[split]] for split in ("train", "val")]
    details = {"node_classes": int(graph.labels.max()) + 1, "splits": {split: len(nodes) for split, nodes in graph.splits.items()}}
    counts = {"train": 1, "val": 1}
    fields = fields_of(node_record(graph))
    return DataSpec(name, None, 0, (), (), counts=counts, split_hash=split_hash(*members), fields=fields, details=details)


def open_graph_set(arguments: SourceArguments) -> Source:
    """A TU set by name: `<root>/graphs_tu/<name>.npz`, `<root>/<name>.npz`, the collection's text files in `<root>/<name>`, or for
    `TU_BLOBS` the file of DGCNN's authors in `<root>/graphs_tu`, where it is fetched to if there is nothing.

    `val_percent` 0 gives ALL graphs as both splits: the protocol of these sets is cross-validation within one set. Nodes have their label
    one-hot, or where the set has none their degree. Raises UserError for a name or file that is none.
    """
    known = {name.lower().replace("-", ""): name for name in TU_BLOBS}
    name = known.get(arguments.path.lower().replace("-", "").replace("_", ""), arguments.path)
    graphs = read_graph_set(arguments, name)
    if arguments.val_percent:
        parts = dict(zip(("train", "val"), stratified_split(graphs.labels, arguments.val_percent, arguments.split_seed), strict=True))
    else:
        parts = {split: np.arange(len(graphs.labels)) for split in ("train", "val")}
    members = [[(str(row), int(graphs.labels[row])) for row in parts[split]] for split in ("train", "val")]
    features = set_features(graphs)
    nodes, edges = int(np.diff(graphs.node_ptr).max()), int(np.diff(graphs.edge_ptr).max())
    fields = {
        "nodes": Field((nodes, features.shape[1]), "uint8"),
        "senders": Field((edges,), "int32"),
        "receivers": Field((edges,), "int32"),
        "node_mask": Field((nodes,), "bool"),
        "edge_mask": Field((edges,), "bool"),
    }
    spec = DataSpec(
        arguments.name,
        None,
        0,
        (),
        (),
        num_classes=int(graphs.labels.max()) + 1,
        counts={split: len(rows) for split, rows in parts.items()},
        split_hash=split_hash(*members),
        fields=fields,
    )
    return GraphSetSource(graphs, features, parts[arguments.split], spec)


def read_graph_set(arguments: SourceArguments, name: str) -> GraphSet:
    """The graphs of the set `name` from the first place that has it."""
    base = arguments.base
    stem = name.replace("-", "").lower() if name in TU_BLOBS else name
    for path in (base / "graphs_tu" / f"{stem}.npz", base / f"{stem}.npz"):
        if path.is_file():
            return read_graph_set_npz(path)
    for folder in (base / name, base / "graphs_tu" / name):
        if (folder / f"{name}_A.txt").is_file():
            return read_graph_set_text(folder, name)
    if name in TU_BLOBS:
        return read_graph_set_lists(provide_graph_set(name, base / "graphs_tu", fetch=arguments.fetch))
    raise UserError(
        f"{arguments.name}: neither {base / 'graphs_tu' / f'{stem}.npz'} nor {base / name / f'{name}_A.txt'} is there"
        f"{nearest(arguments.path, TU_BLOBS)}; {', '.join(sorted(TU_BLOBS))} are fetched; "
        f"for others unpack the set's zip file of the TU collection into {base}"
    )


def set_features(graphs: GraphSet) -> np.ndarray:
    """Node labels one-hot; where there are none, min(degree, 400) one-hot; uint8 [all nodes, D]."""
    if graphs.node_labels is not None:
        values = graphs.node_labels
    else:
        owner = np.repeat(np.arange(len(graphs.labels)), np.diff(graphs.edge_ptr))
        degrees = np.bincount(graphs.node_ptr[owner] + graphs.edges[1], minlength=int(graphs.node_ptr[-1]))
        values = np.minimum(degrees, LARGEST_DEGREE)
    features = np.zeros((len(values), int(values.max()) + 1), np.uint8)
    features[np.arange(len(values)), values] = 1
    return features
