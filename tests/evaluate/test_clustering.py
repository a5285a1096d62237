"""Cluster metrics against brute force over all matchings."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from sklearn.metrics import f1_score

from maskae.evaluate import Features
from maskae.evaluate.clustering import clustering_metrics, kmeans, match_clusters

METRICS = ("cluster_accuracy", "cluster_macro_f1", "cluster_nmi", "cluster_ari")


def noisy_clusters(clusters: int, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(clusters)
    labels = generator.integers(0, classes, 150)
    assigned = np.where(generator.random(150) < 0.5, (labels * 3 + 1) % clusters, generator.integers(0, clusters, 150))
    return assigned, labels


@pytest.mark.parametrize("clusters", [3, 4, 6])
def test_matching_equals_brute_force(clusters: int) -> None:
    assigned, labels = noisy_clusters(clusters)
    meanings = itertools.permutations([*range(4), *[-1] * max(0, clusters - 4)], clusters)
    best = max(np.mean(np.array(meaning)[assigned] == labels) for meaning in meanings)
    assert clustering_metrics(assigned, labels)["cluster_accuracy"] == pytest.approx(best)


def test_macro_f1_by_hand() -> None:
    labels, assigned = np.array([0, 0, 0, 1, 1, 2]), np.array([2, 2, 0, 0, 0, 1])
    np.testing.assert_array_equal(match_clusters(assigned, labels), [0, 0, 1, 1, 1, 2])
    metrics = clustering_metrics(assigned, labels)
    assert metrics["cluster_accuracy"] == pytest.approx(5 / 6)
    assert metrics["cluster_macro_f1"] == pytest.approx((2 * 1 * (2 / 3) / (1 + 2 / 3) + 2 * (2 / 3) * 1 / (2 / 3 + 1) + 1) / 3)


def test_a_class_without_a_cluster_counts_as_zero() -> None:
    labels = np.arange(30) % 3
    metrics = clustering_metrics(np.minimum(labels, 1), labels)
    assert metrics["cluster_accuracy"] == pytest.approx(2 / 3)
    matched = match_clusters(np.minimum(labels, 1), labels)
    assert metrics["cluster_macro_f1"] == pytest.approx(np.mean(f1_score(labels, matched, average=None, labels=[0, 1, 2])))
    assert metrics["cluster_macro_f1"] < 0.6


def test_nmi_and_ari_by_their_formulas() -> None:
    assigned, labels = noisy_clusters(4)
    table = np.array([[np.sum((assigned == cluster) & (labels == label)) for label in range(4)] for cluster in range(4)])
    joint, rows, columns = table / 150, table.sum(axis=1) / 150, table.sum(axis=0) / 150
    information = sum(joint[i, j] * np.log(joint[i, j] / (rows[i] * columns[j])) for i in range(4) for j in range(4) if joint[i, j])
    entropy = [-(share * np.log(share)).sum() for share in (rows, columns)]

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    expected = pairs(table.sum(axis=1)) * pairs(table.sum(axis=0)) / pairs(np.array(150))
    rand = (pairs(table) - expected) / ((pairs(table.sum(axis=1)) + pairs(table.sum(axis=0))) / 2 - expected)
    metrics = clustering_metrics(assigned, labels)
    assert metrics["cluster_nmi"] == pytest.approx(information / np.mean(entropy))
    assert metrics["cluster_ari"] == pytest.approx(rand)
    assert 0.0 < metrics["cluster_ari"] < metrics["cluster_accuracy"] < 1.0


def test_numbering_of_clusters_does_not_matter() -> None:
    assigned, labels = noisy_clusters(4)
    renumbered = np.array([2, 0, 3, 1])[assigned]
    assert clustering_metrics(renumbered, labels) == pytest.approx(clustering_metrics(assigned, labels))


def test_separable_is_perfect_noise_is_near_zero_one_cluster_is_safe(blobs: Callable[..., Features]) -> None:
    features = blobs(0)
    assigned = kmeans(features["pooled"], 4)
    assert clustering_metrics(assigned, features["label"]) == pytest.approx(dict.fromkeys(METRICS, 1.0))
    noise = clustering_metrics(np.random.default_rng(0).integers(0, 4, 2000), np.arange(2000) % 4)
    assert abs(noise["cluster_ari"]) < 0.01 and noise["cluster_nmi"] < 0.01 and noise["cluster_accuracy"] < 0.32
    assert clustering_metrics(np.zeros(8, int), np.arange(8) % 4)["cluster_accuracy"] == pytest.approx(0.25)


def test_kmeans_is_a_function_of_the_seed() -> None:
    features = np.random.default_rng(0).normal(size=(100, 5))
    first, again, other = (kmeans(features, 8, restarts=1, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
