"""Files of graphs: Planetoid's citation networks and the TU collections, as .npz archives or as they were published."""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from maskae.data.downloads import Published, provide
from maskae.errors import UserError

PLANETOID_URL = "https://raw.githubusercontent.com/kimiyoung/planetoid/af6abf468a772cc055bec88c52e4d6f51b7c37e3/data/"
PLANETOID_PARTS = ("x", "y", "tx", "ty", "allx", "ally", "graph", "test.index")
# Git's own name of each file's contents at that commit, in the order of PLANETOID_PARTS.
PLANETOID_BLOBS = {
    "cora": [
        "c4a91d008245403e7f26aa616b437191509793c0",
        "58e30ef120d3553cfaac33ff28c6b5436dbef661",
        "6e856d777401ee15dc8619db76c97d0a40ba2d60",
        "da1734ab670b5c8ecee78a9c30b35566df916f4b",
        "44d53b1fece343538e45592caac521d73c6f98d6",
        "04fbd0b083d09341fcf16b395c642329637f0542",
        "4d3bf85dfc8b1c105a2c995597a1b3eed6947925",
        "ded8092db4cd767a367eebe09003b954a5316f24",
    ],
    "citeseer": [
        "f094104a66f2689ffbd01085fe6a856689e9db9e",
        "e857ac49b611da98e101a068cf4855350274f68a",
        "b2aff18aa1fc6f4f5e8c64db7643b59b24e42584",
        "3795f79df0cd1123f4478b77c148a5fbacc4cefb",
        "592091071ac35b78599c722d0e60b1c655711728",
        "7503f81a0b6ac1cc21cb5a97073542a6b1dfe99c",
        "a01dca663d0103c130f525017a4a9c313037e286",
        "62d9e3d5ed53c66b069125af98529d76c70d9b3e",
    ],
    "pubmed": [
        "16c0eca8d2b3297014ff80327416f9332eda10d7",
        "e86670576c85340eeb2271b3c918bfa89322b2cf",
        "eee4f3c988fde0da87a9ec7b01ca5e7863c1b1f1",
        "225a0bb9bb6430e3925d04688daf6a0da964c07a",
        "3b86bccf08111c37c632a9dd8ab63db25ea76361",
        "4c8bcdc80882dd225fe4dd4fafd723baa616ac97",
        "76eb87e628a6b9d43fc31ea42c8c6c8f3e52b404",
        "41f6befcb7750cc4858cb852f2b349a9598cb2f4",
    ],
}
VALIDATION_NODES = 500
# The TU sets as the authors of DGCNN publish them: the same graphs as the collection's, in another order.
TU_URL = "https://raw.githubusercontent.com/muhanzhang/pytorch_DGCNN/50f504131ca66382f3f078ae98e59aa3ae35b795/data/"
TU_BLOBS = {
    "IMDB-BINARY": "b22c5540bc2dabbd786c78f45ba1cff2a43dbf47",
    "IMDB-MULTI": "ada2c2b94293fc72625faea764b3c4d13486a122",
    "MUTAG": "e462abb7fa4a0748ef7c3746dcb8889dec00aff6",
    "NCI1": "71da5c19220474d3392590292a30779d908f501b",
    "PROTEINS": "e9cd1e3183ded3ce4fd38acf5b714f608c2cefc7",
    "PTC": "e7afb868e0cb42891a8be498a1875921fe7eb74e",
}


@dataclass(frozen=True)
class NodeGraph:
    """One graph with labelled nodes: each undirected edge once, no self-loops."""

    features: np.ndarray  # uint8 (binary words) or float32 [N, D], not normalised
    edges: np.ndarray  # int32 [2, E]
    labels: np.ndarray  # int32 [N]
    splits: dict[str, np.ndarray]  # train, val, test -> nodes int32; empty arrays where the set has no split


@dataclass(frozen=True)
class GraphSet:
    """Many small graphs, one after the other."""

    node_ptr: np.ndarray  # [graphs + 1]
    edge_ptr: np.ndarray  # [graphs + 1]
    edges: np.ndarray  # int32 [2, all edges], nodes counted from 0 in each graph, both directions
    node_labels: np.ndarray | None  # int32 [all nodes], None where nodes have none
    labels: np.ndarray  # int32 [graphs]


def read_npz(path: Path, wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of a .npz file. Raises UserError where it is none, or lacks a wanted array."""
    try:
        with np.load(path, allow_pickle=False) as loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, BadZipFile, AttributeError, TypeError, EOFError) as error:
        raise UserError(f"{path} is no .npz file of plain arrays: {error}") from error
    if missing := [name for name in wanted if name not in arrays]:
        raise UserError(f"{path} holds no graph: no array {', '.join(missing)}; there are {', '.join(arrays)}")
    return arrays


def read_node_npz(path: Path) -> NodeGraph:
    """A graph from `x_indptr`, `x_indices`, `x_shape`, maybe `x_data` (sparse rows), `edge_index` [2, E], `y`, maybe `<split>_idx`."""
    arrays = read_npz(path, ("x_indptr", "x_indices", "x_shape", "edge_index", "y"))
    count, width = (int(size) for size in arrays["x_shape"])
    if len(arrays["x_indptr"]) != count + 1 or len(arrays["y"]) != count:
        raise UserError(f"{path}: features of {count} nodes, {len(arrays['x_indptr']) - 1} rows and {len(arrays['y'])} labels do not fit")
    rows = np.repeat(np.arange(count), np.diff(arrays["x_indptr"]))
    features = np.zeros((count, width), np.float32 if "x_data" in arrays else np.uint8)
    features[rows, arrays["x_indices"]] = arrays.get("x_data", 1)
    splits = {split: arrays.get(f"{split}_idx", np.zeros(0)).astype(np.int32) for split in ("train", "val", "test")}
    edges = unique_edges(arrays["edge_index"], count, str(path))
    return NodeGraph(features, edges, arrays["y"].astype(np.int32), splits)


def unique_edges(edges: np.ndarray, nodes: int, name: str) -> np.ndarray:
    """Every undirected edge once, smaller node first, without self-loops; int32 [2, E]. Raises UserError for nodes out of range."""
    if edges.size and not 0 <= edges.min() <= edges.max() < nodes:
        raise UserError(f"{name}: edges name nodes {edges.min()}..{edges.max()}, but there are {nodes}")
    ordered = np.sort(np.asarray(edges, np.int64), axis=0)
    return np.unique(ordered[:, ordered[0] != ordered[1]], axis=1).astype(np.int32)


class _Plain:
    """Stands for a scipy matrix in an old pickle: keeps its parts as attributes and runs nothing."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def dense(self) -> np.ndarray:
        """The rows, float32 [N, D]."""
        parts = self.__dict__
        shape, starts = parts["_shape" if "_shape" in parts else "shape"], parts["indptr"]
        rows = np.zeros(shape, np.float32)
        rows[np.repeat(np.arange(shape[0]), np.diff(starts)), parts["indices"]] = parts["data"]
        return rows


class _Unpickler(pickle.Unpickler):
    """The published files are pickles of arrays: everything that is no array, sparse matrix or plain container is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "csr_matrix" and module.startswith("scipy.sparse"):
            return _Plain
        if name in ("ndarray", "dtype") and module == "numpy":
            return getattr(np, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if (module, name) == ("collections", "defaultdict"):
            return defaultdict
        if module in ("__builtin__", "builtins") and name in ("list", "object"):
            return {"list": list, "object": object}[name]
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it wants {module}.{name}")


def _unpickle(content: bytes, name: str) -> Any:
    try:
        return _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"{name} is no Planetoid file: {error}") from error


def read_planetoid(folder: Path, name: str) -> NodeGraph:
    """The citation network `name` from the published `ind.<name>.*` (Yang et al. 2016), in its usual order and with its fixed split.

    CiteSeer's test nodes have gaps: nodes without a word, of class 0, fill them. Raises UserError for a file that is missing or damaged.
    """
    contents = {}
    for part in PLANETOID_PARTS:
        path = folder / f"ind.{name}.{part}"
        if not path.is_file():
            raise UserError(f"planetoid:{name}: no file {path}")
        contents[part] = path.read_bytes()
    try:
        test = np.asarray(contents.pop("test.index").split(), np.int64)
    except ValueError as error:
        raise UserError(f"{folder / f'ind.{name}.test.index'} is no list of nodes: {error}") from error
    parts = {part: _unpickle(content, str(folder / f"ind.{name}.{part}")) for part, content in contents.items()}
    known = len(parts["ally"])
    count = int(np.max(test)) + 1
    features = np.zeros((count, parts["allx"].dense().shape[1]), np.float32)
    labels = np.zeros(count, np.int32)
    features[:known], labels[:known] = parts["allx"].dense(), parts["ally"].argmax(1)
    features[test], labels[test] = parts["tx"].dense(), parts["ty"].argmax(1)
    pairs = [(node, other) for node, others in parts["graph"].items() for other in others]
    binary = np.isin(features, (0, 1)).all()
    labelled = len(parts["y"])
    splits = {
        "train": np.arange(labelled, dtype=np.int32),
        "val": np.arange(labelled, labelled + VALIDATION_NODES, dtype=np.int32),
        "test": np.sort(test).astype(np.int32),
    }
    edges = unique_edges(np.asarray(pairs).T, count, f"planetoid:{name}")
    return NodeGraph(features.astype(np.uint8) if binary else features, edges, labels, splits)


def provide_planetoid(name: str, folder: Path, *, fetch: bool = True) -> None:
    """Fetches the published files that are missing in `folder`, each checked. Raises UserError where that fails, or `fetch` forbids it."""
    for part, blob in zip(PLANETOID_PARTS, PLANETOID_BLOBS[name], strict=True):
        file = f"ind.{name}.{part}"
        provide(Published(folder / file, f"{PLANETOID_URL}{file}", blob), f"planetoid:{name}", fetch=fetch)


def read_graph_set_npz(path: Path) -> GraphSet:
    """Graphs from `node_ptr`, `edge_ptr`, `edge_index` (both directions, counted within the graph), `node_label` and `y`."""
    arrays = read_npz(path, ("node_ptr", "edge_ptr", "edge_index", "y"))
    node_ptr, edge_ptr, labels = (arrays[name].astype(np.int64) for name in ("node_ptr", "edge_ptr", "y"))
    if not len(node_ptr) == len(edge_ptr) == len(labels) + 1 or edge_ptr[-1] != arrays["edge_index"].shape[1]:
        runs = f"{len(node_ptr) - 1} runs of nodes, {len(edge_ptr) - 1} of edges"
        raise UserError(f"{path}: its graphs do not fit: {len(labels)} labels, {runs}")
    kinds = arrays.get("node_label")
    kinds = None if kinds is None or len(np.unique(kinds)) < 2 else kinds.astype(np.int32)
    return GraphSet(node_ptr, edge_ptr, arrays["edge_index"].astype(np.int32), kinds, labels.astype(np.int32))


def read_graph_set_text(folder: Path, name: str) -> GraphSet:
    """Graphs from the TU collection's own text files, `<name>_A.txt`, `_graph_indicator`, `_graph_labels` and maybe `_node_labels`.

    Nodes and graphs are counted from 1 there, and any label numbers are taken in their order.
    """

    def numbers(part: str) -> np.ndarray:
        path = folder / f"{name}_{part}.txt"
        try:
            return np.loadtxt(path, dtype=np.int64, delimiter=",", ndmin=1)
        except (OSError, ValueError) as error:
            raise UserError(f"tu:{name}: {path} cannot be read: {error}") from error

    owner, pairs = numbers("graph_indicator") - 1, numbers("A").reshape(-1, 2).T - 1
    labels = np.unique(numbers("graph_labels"), return_inverse=True)[1]
    counts = np.bincount(owner, minlength=len(labels))
    node_ptr = np.append(0, np.cumsum(counts))
    pairs = pairs[:, np.argsort(owner[pairs[0]], kind="stable")]
    edge_ptr = np.append(0, np.cumsum(np.bincount(owner[pairs[0]], minlength=len(labels))))
    kinds = np.unique(numbers("node_labels"), return_inverse=True)[1] if (folder / f"{name}_node_labels.txt").is_file() else None
    local = pairs - node_ptr[owner[pairs[0]]]
    return GraphSet(node_ptr, edge_ptr, local.astype(np.int32), None if kinds is None else kinds.astype(np.int32), labels.astype(np.int32))


def read_graph_set_lists(path: Path) -> GraphSet:
    """Graphs from one text file of lists, as DGCNN's authors (Zhang et al., AAAI 2018) publish the TU sets.

    The number of graphs; then for each its number of nodes and its label; then for each node its label, its number of neighbours, and the
    neighbours, counted from 0. Labels of nodes that are all the same say nothing and are left out. Raises UserError for another file.
    """
    try:
        numbers = iter([int(word) for word in path.read_text().split()])
        graphs = [_read_lists(numbers) for _ in range(next(numbers))]
    except (OSError, ValueError, StopIteration) as error:
        raise UserError(f"{path} is no list of graphs and their neighbours: {error}") from error
    labels, nodes = [label for label, _ in graphs], [rows for _, rows in graphs]
    kinds = np.unique([kind for rows in nodes for kind, _ in rows], return_inverse=True)
    edges = [[(place, other) for place, (_, others) in enumerate(rows) for other in others] for rows in nodes]
    return GraphSet(
        np.append(0, np.cumsum([len(rows) for rows in nodes])),
        np.append(0, np.cumsum([len(pairs) for pairs in edges])),
        np.asarray([pair for pairs in edges for pair in pairs], np.int32).reshape(-1, 2).T,
        kinds[1].astype(np.int32) if len(kinds[0]) > 1 else None,
        np.unique(labels, return_inverse=True)[1].astype(np.int32),
    )


def _read_lists(numbers: Iterator[int]) -> tuple[int, list[tuple[int, list[int]]]]:
    """The next graph's label, and the label and the neighbours of each of its nodes."""
    count, label = next(numbers), next(numbers)
    return label, [(next(numbers), [next(numbers) for _ in range(next(numbers))]) for _ in range(count)]


def provide_graph_set(name: str, folder: Path, *, fetch: bool = True) -> Path:
    """The file of lists of a set in `TU_BLOBS`, fetched and checked where it is missing.

    Raises UserError where that fails, or `fetch` forbids it.
    """
    stem = name.replace("-", "")
    path = folder / f"{stem}.txt"
    provide(Published(path, f"{TU_URL}{stem}/{stem}.txt", TU_BLOBS[name]), f"tu:{name}", fetch=fetch)
    return path
