"""The node probe against a loop written out, and the graph SVM's folds; what they refuse."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.evaluate import make_evaluators
from maskae.evaluate.node_probe import NodeProbe, fit_node_probe, initial_probe

GENERATOR = np.random.default_rng(0)
LABELS = np.arange(60) % 3
EMBEDDINGS = (np.eye(3)[LABELS] @ GENERATOR.normal(size=(3, 5)) + 0.8 * GENERATOR.normal(size=(60, 5))).astype(np.float32)
GRAPH = {"tokens": EMBEDDINGS[None], "node_label": LABELS[None]}
GRAPH |= {f"{split}_mask": (np.arange(60) // 20 == part)[None] for part, split in enumerate(("train", "val", "test"))}


def test_probe_is_adam_with_coupled_decay_on_the_training_nodes_alone():
    """Against Adam by hand in float64 (Kingma & Ba 2015, algorithm 1)."""
    splits = [(EMBEDDINGS[rows], LABELS[rows]) for rows in np.split(np.arange(60), 3)]
    start = initial_probe(jax.random.key(0), 5, 3)
    probe = fit_node_probe(start, *splits, learning_rate=0.05, weight_decay=0.01, epochs=7)
    weights = np.concatenate([np.asarray(start["kernel"], np.float64), np.asarray(start["bias"], np.float64)[None]])
    first, second, accuracies = np.zeros_like(weights), np.zeros_like(weights), []
    x = np.concatenate([EMBEDDINGS, np.ones((60, 1))], axis=1).astype(np.float64)
    for step in range(1, 8):
        shares = np.exp(x[:20] @ weights)
        shares /= shares.sum(1, keepdims=True)
        gradient = x[:20].T @ (shares - np.eye(3)[LABELS[:20]]) / 20 + 0.01 * weights
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        weights -= 0.05 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        accuracies.append(((x @ weights).argmax(1) == LABELS).reshape(3, 20).mean(1))
    np.testing.assert_allclose(probe.params["kernel"], weights[:-1], atol=1e-4)
    np.testing.assert_allclose(probe.params["bias"], weights[-1], atol=1e-4)
    np.testing.assert_allclose(np.stack([probe.val, probe.test], 1), np.stack(accuracies)[:, 1:], atol=1e-6)


def test_selection_takes_the_later_of_equal_epochs():
    probe = NodeProbe({}, np.asarray([0.5, 0.7, 0.7, 0.6]), np.asarray([0.1, 0.2, 0.3, 0.4]))
    assert (probe.last, probe.selected) == (0.4, 0.3)


def test_node_probe_finds_the_classes_and_gives_both_accuracies():
    evaluator = make_evaluators({"node_probe": {"epochs": 100, "learning_rate": 0.05}})["node_probe"]
    metrics = evaluator(GRAPH, GRAPH, 0)
    assert set(metrics) == {"node_probe_top1", "node_probe_selected_top1"}
    assert min(metrics.values()) > 0.7
    shuffled = GRAPH | {"tokens": EMBEDDINGS[None, ::-1] * 0 + GENERATOR.normal(size=(1, 60, 5)).astype(np.float32)}
    assert evaluator(shuffled, shuffled, 0)["node_probe_top1"] < 0.7


def test_graph_svm_cross_validates_the_training_split():
    evaluator = make_evaluators({"graph_svm": {"costs": (0.1, 1.0), "folds": 4}})["graph_svm"]
    features = {"pooled": EMBEDDINGS, "label": LABELS}
    metrics = evaluator(features, {}, 0)
    assert metrics == evaluator(features, {}, 5)  # folds of record, whatever the seed
    assert metrics["graph_svm_top1"] > 0.7 and metrics["graph_svm_top1_std"] > 0
    assert evaluator(features | {"label": GENERATOR.permutation(LABELS)}, {}, 0)["graph_svm_top1"] < 0.6


def test_features_that_they_cannot_read_are_named():
    node, graph = make_evaluators({"node_probe": {}, "graph_svm": {}}).values()
    with pytest.raises(UserError, match="needs 'node_label'"):
        node({"tokens": EMBEDDINGS[None]}, {}, 0)
    with pytest.raises(UserError, match="the split has 2 graphs: use graph_svm"):
        node({name: np.concatenate([value, value]) for name, value in GRAPH.items()}, {}, 0)
    with pytest.raises(UserError, match="'test_mask' marks no node"):
        node(GRAPH | {"test_mask": np.zeros((1, 60), bool)}, {}, 0)
    with pytest.raises(UserError, match="10 folds need two classes with 10 graphs each; there are 3, one with 3"):
        graph({"pooled": EMBEDDINGS[:9], "label": LABELS[:9]}, {}, 0)
