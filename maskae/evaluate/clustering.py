"""Clusters without labels, and how well they meet the classes."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, f1_score, normalized_mutual_info_score

from maskae.evaluate.threads import limited_threads


def kmeans(features: np.ndarray, clusters: int, *, restarts: int = 10, seed: int = 0) -> np.ndarray:
    """Cluster of each row of features [N, D], int32 [N]: k-means++ starts, the best of `restarts` by inertia."""
    with limited_threads(features.size):
        return KMeans(clusters, n_init=restarts, random_state=seed).fit_predict(features.astype(np.float32)).astype(np.int32)


def match_clusters(assigned: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The class of each row's cluster under the one-to-one matching with the most agreement (Hungarian); -1 for an unmatched cluster."""
    clusters, classes = int(assigned.max()) + 1, int(labels.max()) + 1
    table = np.zeros((clusters, classes), np.int64)
    np.add.at(table, (assigned, labels), 1)
    cluster, matched = linear_sum_assignment(table, maximize=True)
    meaning = np.full(clusters, -1, np.int32)
    meaning[cluster] = matched
    return meaning[assigned]


def clustering_metrics(assigned: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Agreement of clusters int [N] with classes int [N]; none of the numbers depends on how clusters are numbered.

    Returns:
        `cluster_accuracy` and `cluster_macro_f1` (mean over the classes that occur) after Hungarian matching, `cluster_nmi` (arithmetic
        mean in the denominator), `cluster_ari`.
    """
    matched = match_clusters(assigned, labels)
    return {
        "cluster_accuracy": float(np.mean(matched == labels)),
        "cluster_macro_f1": float(f1_score(labels, matched, labels=np.unique(labels), average="macro", zero_division=0)),
        "cluster_nmi": float(normalized_mutual_info_score(labels, assigned)),
        "cluster_ari": float(adjusted_rand_score(labels, assigned)),
    }
