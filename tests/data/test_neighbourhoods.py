"""Weights of a random walk, graphs of nearest neighbours, and the sources that read them."""

from __future__ import annotations

import numpy as np
import pytest

from maskae.data.neighbourhoods import knn_edges, neighbourhood_weights, transition_matrix
from maskae.data.sources import open_source
from maskae.errors import UserError

EDGES = np.asarray([[0, 1, 1, 3, 5], [1, 2, 3, 4, 0]])
NODES = 7  # node 6 is alone


def step() -> np.ndarray:
    table = np.eye(NODES)
    table[EDGES[0], EDGES[1]] = table[EDGES[1], EDGES[0]] = 1
    return table / table.sum(1, keepdims=True)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_weights_are_powers_of_the_walk_or_their_sum(steps):
    transition = transition_matrix(EDGES, NODES)
    np.testing.assert_allclose(transition.toarray(), step(), rtol=1e-6)
    power, total = (neighbourhood_weights(transition, steps, total=total) for total in (False, True))
    np.testing.assert_allclose(power.toarray(), np.linalg.matrix_power(step(), steps), rtol=1e-6)
    np.testing.assert_allclose(total.toarray(), sum(np.linalg.matrix_power(step(), r + 1) for r in range(steps)), rtol=1e-6)
    np.testing.assert_allclose(power.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(total.sum(1), steps, rtol=1e-6)
    assert power.nnz == np.count_nonzero(power.toarray()) and power[6, 6] == 1
    if steps == 1:
        np.testing.assert_array_equal(power.toarray(), total.toarray())


def test_a_complete_graph_mixes_at_once_and_an_empty_one_never():
    ends = np.stack(np.nonzero(1 - np.eye(5)))
    np.testing.assert_allclose(neighbourhood_weights(transition_matrix(ends, 5), 3, total=False).toarray(), 0.2, rtol=1e-6)
    none = transition_matrix(np.zeros((2, 0), int), 5)
    np.testing.assert_array_equal(neighbourhood_weights(none, 3, total=False).toarray(), np.eye(5))


@pytest.mark.parametrize("similarity", ["heat", "ncos"])
def test_nearest_neighbours_equal_brute_force(similarity):
    rows = np.random.default_rng(0).normal(size=(30, 12)) * 40  # at this scale exp(-d^2 / 2) is 0 for every pair
    if similarity == "heat":
        likeness = -np.square(rows[:, None] - rows).sum(-1)
    else:
        words = np.where(rows > 0, 1, rows)  # only what is above 0 becomes a word, as in SDCN's script
        shares = words / np.abs(words).sum(1, keepdims=True)
        likeness = shares @ shares.T
    np.fill_diagonal(likeness, -np.inf)
    edges = knn_edges(rows, 3, similarity)
    assert edges.shape == (2, 90)
    for row in range(30):
        chosen = edges[1][edges[0] == row]
        assert len(set(chosen) - {row}) == 3
        np.testing.assert_allclose(np.sort(likeness[row, chosen]), np.sort(likeness[row])[-3:], rtol=1e-9)


def test_a_row_among_its_equals_may_have_one_neighbour_more():
    senders, receivers = knn_edges(np.ones((4, 2)), 2, "cos")  # the same three of four for every row
    assert (senders != receivers).all() and sorted(np.bincount(senders)) == [2, 2, 2, 3]


@pytest.fixture
def root(tmp_path):
    """A root with a graph of 7 nodes and 3 words."""
    words = np.asarray([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]])
    rows, columns = np.nonzero(words)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=7))])
    np.savez(tmp_path / "toy.npz", x_indptr=indptr, x_indices=columns, x_shape=(7, 3), edge_index=EDGES, y=np.arange(7) % 2)
    return str(tmp_path)


def test_the_sources_give_nodes_and_whole_graphs(root):
    rows = open_source("node_rows:toy", "val", root=root)
    assert len(rows) == 7 and rows.spec.num_classes == 2 and str(rows.spec.fields["nodes"]) == "uint8[3]"
    assert rows[3]["nodes"].tolist() == [0, 1, 1] and rows[3]["label"] == 1 and rows.name(3) == "node_rows:toy node 3"
    for kind, wanted in (("power2", step() @ step()), ("sum2", step() + step() @ step())):
        whole = open_source(f"neighbourhood:toy:{kind}", "train", root=root)
        record = whole[0]
        assert len(whole) == 1 and {name: str(value.dtype) for name, value in record.items()} == {
            name: field.dtype for name, field in whole.spec.fields.items()
        }
        table = np.zeros((7, 7))
        table[record["neighbour_rows"], record["neighbour_columns"]] = record["neighbour_weights"]
        np.testing.assert_allclose(table, wanted, rtol=1e-6)
    near = open_source("neighbourhood:toy:power1:heat1", "train", root=root)[0]
    assert {0, 5} <= set(near["neighbour_columns"][near["neighbour_rows"] == 0]), "rows 0 and 5 are equal"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("neighbourhood:toy", "write the steps of the walk behind the name, as in neighbourhood:toy:power2"),
        ("neighbourhood:toy:power0", "write the steps of the walk"),
        ("neighbourhood:toy:power1:heta3", "unknown similarity 'heta' .did you mean 'heat'"),
        ("neighbourhood:toy:power1:heat7", "7 nearest others of 7 rows"),
        ("node_rows:toi", "no graph .*toi.npz .did you mean 'toy'"),
    ],
)
def test_a_wrong_source_is_named(root, source, message):
    with pytest.raises(UserError, match=message):
        open_source(source, "train", root=root)
