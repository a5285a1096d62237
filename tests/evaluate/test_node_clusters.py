"""A system's own clusters of nodes against their classes, and what the papers' code does to them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from maskae.errors import UserError
from maskae.evaluate import make_evaluators, run
from maskae.evaluate.clustering import clustering_metrics, fill_empty_clusters, fit_kmeans
from maskae.evaluation import Evaluation
from maskae.monitor.tables import JsonlWriter

LABELS = np.arange(12) % 3


def features(assigned: np.ndarray) -> dict[str, np.ndarray]:
    return {"assignment": 0.1 + 0.7 * np.eye(3, dtype=np.float32)[assigned][None], "node_label": LABELS[None]}


def test_it_reads_the_graphs_assignment_and_needs_no_training_features():
    evaluators = make_evaluators({"node_clusters": {}})
    assert run(evaluators, None, features((LABELS + 1) % 3))["cluster_accuracy"] == 1.0
    wrong = (LABELS + 1) % 3
    wrong[:3] = 0
    assert run(evaluators, None, features(wrong)) == pytest.approx(clustering_metrics(wrong, LABELS))
    with pytest.raises(UserError, match="needs 'node_label'"):
        run(evaluators, None, {"assignment": np.ones((1, 12, 3))})
    with pytest.raises(UserError, match="not finite"):
        run(evaluators, None, features(wrong) | {"assignment": np.full((1, 12, 3), np.nan)})


def test_the_released_code_moves_the_first_rows_into_empty_clusters():
    assigned = np.asarray([2, 2, 2, 0, 0, 2])
    assert fill_empty_clusters(assigned, 3).tolist() == [1, 2, 2, 0, 0, 2]
    assert fill_empty_clusters(np.asarray([3, 3, 3]), 4).tolist() == [0, 1, 2]
    assert fill_empty_clusters(LABELS, 3).tolist() == LABELS.tolist() and assigned[0] == 2
    assert fill_empty_clusters(np.asarray([0, 3, 1]), 3).tolist() == [0, 3, 1]  # as many as classes, whatever their numbers
    two = np.minimum(LABELS, 1)
    plain, filled = (run(make_evaluators({"node_clusters": {"fill_empty": fill}}), None, features(two)) for fill in (False, True))
    assert plain == pytest.approx(clustering_metrics(two, LABELS))
    assert filled == pytest.approx(clustering_metrics(fill_empty_clusters(two, 3), LABELS)) != plain


def test_kmeans_gives_its_centres(blobs):
    found = fit_kmeans(blobs(0)["pooled"], 4, restarts=2)
    means = np.stack([blobs(0)["pooled"][found.assigned == cluster].mean(0) for cluster in range(4)])
    np.testing.assert_allclose(found.centres, means, rtol=1e-4, atol=1e-4)
    assert found.inertia == pytest.approx(np.square(blobs(0)["pooled"] - found.centres[found.assigned]).sum(), rel=1e-3)


def test_maxima_are_those_of_the_logged_evaluations_and_now(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl", resume_step=None)
    for step, value in enumerate((0.2, 0.7, 0.4)):
        writer.scalars(step, {"evaluate/cluster_nmi": value})
    for wanted, expected in ((True, {"cluster_nmi_maximum": 0.7}), (False, {})):
        own = SimpleNamespace(workdir=tmp_path, experiment=SimpleNamespace(config=SimpleNamespace(evaluate=SimpleNamespace(maxima=wanted))))
        assert Evaluation.maxima(own, {"cluster_nmi": 0.5}) == expected
    assert Evaluation.maxima(own, {}) == {}
