"""Planetoid and TU graphs from every layout they come in, the published sets, and wrong files."""

from __future__ import annotations

import hashlib
import pickle
from collections import defaultdict

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from maskae.data import graph_files
from maskae.data.pipeline import Pipeline, evaluation_batches
from maskae.data.sources import open_source
from maskae.data.transforms import make_transform
from maskae.errors import UserError

NODES = 505 + 4  # 5 labelled, 500 of validation, 3 test nodes of which one is missing in the index
TEST = [508, 505, 507]


def opened(name, root, split="train", **arguments):
    return open_source(name, split, root=str(root), channels=0, **{"val_percent": 0.0} | arguments)


def blob_name(content):
    """Git's name of a file's contents."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def write_planetoid(folder, name="citeseer"):
    """Files as they were published: pickles of scipy matrices, one-hot labels and a dict of lists."""
    folder.mkdir()
    words = (np.random.default_rng(0).random((NODES, 6)) < 0.4).astype(np.float32)
    words[506] = 0
    classes = np.arange(NODES) % 3
    classes[506] = 0
    graph = defaultdict(list, {0: [1, 2, 2], 1: [0], 2: [0, 2], 508: [505], 505: [508]})
    parts = {"x": csr_matrix(words[:5]), "y": np.eye(3)[classes[:5]], "tx": csr_matrix(words[TEST]), "ty": np.eye(3)[classes[TEST]]}
    parts |= {"allx": csr_matrix(words[:505]), "ally": np.eye(3)[classes[:505]], "graph": graph}
    for part, value in parts.items():
        (folder / f"ind.{name}.{part}").write_bytes(pickle.dumps(value, protocol=2))
    (folder / f"ind.{name}.test.index").write_text("\n".join(map(str, TEST)))
    return words, classes


def test_published_planetoid_files_are_put_in_their_usual_order(tmp_path):
    words, classes = write_planetoid(tmp_path / "planetoid")
    source = opened("planetoid:citeseer", tmp_path)
    record = source[0]
    np.testing.assert_array_equal(record["nodes"], words)
    assert record["nodes"].dtype == np.uint8
    np.testing.assert_array_equal(record["node_label"], classes)
    pairs = set(zip(record["senders"].tolist(), record["receivers"].tolist(), strict=True))
    assert pairs == {(0, 1), (1, 0), (0, 2), (2, 0), (505, 508), (508, 505)}  # once each way, without the self-loop
    masks = {split: np.flatnonzero(record[f"{split}_mask"]).tolist() for split in ("train", "val", "test")}
    assert masks == {"train": list(range(5)), "val": list(range(5, 505)), "test": sorted(TEST)}
    assert source.spec.details == {"node_classes": 3, "splits": {"train": 5, "val": 500, "test": 3}}
    assert {name: (value.shape, str(value.dtype)) for name, value in record.items()} == {
        name: (field.shape, field.dtype) for name, field in source.spec.fields.items()
    }


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_pickles_of_anything_but_arrays_are_refused(tmp_path, capsys):
    write_planetoid(tmp_path / "planetoid")
    path = tmp_path / "planetoid" / "ind.citeseer.x"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"ind.citeseer.x is no Planetoid file: it wants builtins.print"):
        opened("planetoid:citeseer", tmp_path)
    assert capsys.readouterr().out == ""
    path.write_bytes(b"not a pickle")
    with pytest.raises(UserError, match="ind.citeseer.x is no Planetoid file"):
        opened("planetoid:citeseer", tmp_path)


def test_downloads_are_checked_and_resumed(tmp_path, monkeypatch, served):
    words, _ = write_planetoid(tmp_path / "published")
    served.files = {path.name: path.read_bytes() for path in (tmp_path / "published").iterdir()}
    monkeypatch.setattr(graph_files, "PLANETOID_URL", served.url(""))
    with pytest.raises(UserError, match=r"planetoid/ind.citeseer.x is not there; a run fetches it from \S+ind.citeseer.x"):
        opened("planetoid:citeseer", tmp_path, fetch=False)
    assert not served.asked
    with pytest.raises(UserError, match="ind.citeseer.x is not the published file"):
        opened("planetoid:citeseer", tmp_path)
    assert not list((tmp_path / "planetoid").iterdir())
    names = [blob_name(served.files[f"ind.citeseer.{part}"]) for part in graph_files.PLANETOID_PARTS]
    monkeypatch.setitem(graph_files.PLANETOID_BLOBS, "citeseer", names)
    np.testing.assert_array_equal(opened("planetoid:citeseer", tmp_path)[0]["nodes"], words)
    before = len(served.asked)
    opened("planetoid:citeseer", tmp_path)
    assert len(served.asked) == before


def test_a_set_of_graphs_is_downloaded_and_checked_and_equals_the_archive(tmp_path, monkeypatch, served):
    listing = b"2\n3 -1\n5 1 1\n5 2 0 2\n7 1 1\n2 1\n7 1 1\n5 1 0\n"
    served.files = {"MUTAG/MUTAG.txt": listing}
    monkeypatch.setattr(graph_files, "TU_URL", served.url(""))
    with pytest.raises(UserError, match=r"MUTAG.txt is not there; a run fetches it from"):
        opened("tu:mutag", tmp_path, fetch=False)
    with pytest.raises(UserError, match=r"tu:MUTAG: \S+MUTAG/MUTAG.txt is not the published file"):
        opened("tu:mutag", tmp_path)
    assert not list((tmp_path / "graphs_tu").iterdir())
    monkeypatch.setitem(graph_files.TU_BLOBS, "MUTAG", blob_name(listing))
    source = opened("tu:mutag", tmp_path)
    assert (len(source), source[0]["label"], source[1]["label"]) == (2, 0, 1)
    np.testing.assert_array_equal(source[0]["nodes"], [[1, 0], [1, 0], [0, 1]])
    assert list(zip(source[0]["senders"], source[0]["receivers"], strict=True)) == [(0, 1), (1, 0), (1, 2), (2, 1)]
    np.testing.assert_array_equal(source[1]["edge_mask"], [True, True, False, False])
    (tmp_path / "graphs_tu" / "MUTAG.txt").write_text("2\n3 0\n0 1")
    with pytest.raises(UserError, match=r"MUTAG.txt is no list of graphs and their neighbours"):
        opened("tu:MUTAG", tmp_path)


def write_set(folder, name="TOY"):
    """Two graphs, a path of three nodes and an edge, in the collection's text files."""
    folder.mkdir()
    texts = {"A": "4, 5\n1, 2\n2, 1\n5, 4\n2, 3\n3, 2", "graph_indicator": "1\n1\n1\n2\n2", "graph_labels": "-1\n1"}
    for part, text in texts.items():
        (folder / f"{name}_{part}.txt").write_text(text + "\n")


def test_text_files_of_a_graph_set_become_padded_records(tmp_path):
    write_set(tmp_path / "TOY")
    source = opened("tu:TOY", tmp_path)
    path, edge = source[0], source[1]
    assert (len(source), source.spec.num_classes, path["label"], edge["label"]) == (2, 2, 0, 1)
    np.testing.assert_array_equal(path["nodes"].argmax(1), [1, 2, 1])  # degrees
    np.testing.assert_array_equal(edge["nodes"], [[0, 1, 0], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(edge["node_mask"], [True, True, False])
    assert sorted(zip(path["senders"], path["receivers"], strict=True)) == [(0, 1), (1, 0), (1, 2), (2, 1)]
    np.testing.assert_array_equal(edge["edge_mask"], [True, True, False, False])
    assert source.name(1) == "tu:TOY graph 1"
    (tmp_path / "TOY" / "TOY_node_labels.txt").write_text("7\n7\n9\n9\n7\n")
    np.testing.assert_array_equal(opened("tu:TOY", tmp_path)[0]["nodes"], [[1, 0], [1, 0], [0, 1]])


def test_graphs_go_through_the_pipeline(tmp_path):
    write_set(tmp_path / "TOY")
    source, transform = opened("tu:TOY", tmp_path), make_transform((), 0, 1)
    batch = Pipeline(source, transform, batch_size=4, seed=0).batch(0)
    assert batch["nodes"].shape == (4, 3, 3) and batch["example"].tolist() == [0, 1, 2, 3]
    assert batch["label"].tolist() == [int(label) for label in batch["index"]]
    last = list(evaluation_batches(source, transform, 4))[-1]
    assert last["valid"].tolist() == [True, True, False, False] and not last["node_mask"][2:].any()


@pytest.mark.parametrize(
    ("name", "graphs", "nodes", "edges"),
    [("MUTAG", 188, (28, 7), 66), ("IMDB-BINARY", 1000, (136, 136), 2498), ("NCI1", 4110, (111, 37), 238)],
)
def test_sets_at_hand_have_their_published_sizes(shared, name, graphs, nodes, edges):
    source = opened(f"tu:{name}", shared / "data")
    assert (len(source), source.spec.fields["nodes"].shape, source.spec.fields["senders"].shape[0]) == (graphs, nodes, edges)
    parts = [opened(f"tu:{name}", shared / "data", split, val_percent=20.0).rows for split in ("train", "val")]
    assert sorted(np.concatenate(parts).tolist()) == list(range(graphs))


def test_cora_at_hand_has_its_published_sizes(shared):
    fields = opened("planetoid:cora", shared / "data").spec.fields
    assert str(fields["nodes"]) == "uint8[2708,1433]" and fields["senders"].shape == (10556,)


def test_names_and_files_that_are_none_are_named(tmp_path):
    with pytest.raises(UserError, match="did you mean 'pubmed'"):
        opened("planetoid:pubmet", tmp_path)
    (tmp_path / "toy.npz").write_bytes(b"none")
    with pytest.raises(UserError, match="toy.npz is no .npz file"):
        opened("planetoid:toy", tmp_path)
    np.savez(tmp_path / "toy.npz", images=np.zeros(3))
    with pytest.raises(UserError, match="holds no graph: no array x_indptr, x_indices, x_shape, edge_index, y; there are images"):
        opened("planetoid:toy", tmp_path)
    with pytest.raises(UserError, match="unpack the set's zip file of the TU collection"):
        opened("tu:REDDIT", tmp_path)
