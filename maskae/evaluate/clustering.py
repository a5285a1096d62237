"""Clusters without labels, and how well they meet the classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, f1_score, normalized_mutual_info_score

from maskae.evaluate.threads import limited_threads

Match = Callable[[np.ndarray, np.ndarray], np.ndarray]  # clusters [N], classes [N] -> classes [N]


class Clusters(NamedTuple):
    """Centres float32 [C, D], the nearest one of each row int32 [N], and the sum of squared distances to it."""

    centres: np.ndarray
    assigned: np.ndarray
    inertia: float


def fit_kmeans(features: np.ndarray, clusters: int, *, restarts: int = 10, seed: int = 0) -> Clusters:
    """Clusters of the rows of features [N, D]: k-means++ starts, the best of `restarts` by inertia."""
    with limited_threads(features.size):
        fitted = KMeans(clusters, n_init=restarts, random_state=seed).fit(features.astype(np.float32))
    return Clusters(fitted.cluster_centers_.astype(np.float32), fitted.labels_.astype(np.int32), float(fitted.inertia_))


def kmeans(features: np.ndarray, clusters: int, *, restarts: int = 10, seed: int = 0) -> np.ndarray:
    """Cluster of each row of features [N, D], int32 [N], see `fit_kmeans`."""
    return fit_kmeans(features, clusters, restarts=restarts, seed=seed).assigned


def fill_empty_clusters(assigned: np.ndarray, classes: int) -> np.ndarray:
    """`assigned` int [N] with the first rows put into the clusters of 0..classes-1 that have none, one row each.

    That is what the evaluation code shared by DEC, SDCN and SCGC does to the predictions before it matches them, so that all of its
    numbers are of the changed ones. Where there are as many clusters as classes it changes nothing, whatever their numbers. Only to compare
    with it: the matching here needs no such thing.
    """
    if len(np.unique(assigned)) == classes:
        return assigned.copy()
    empty = np.setdiff1d(np.arange(classes), assigned)
    filled = assigned.copy()
    filled[: len(empty)] = empty[: len(filled)]
    return filled


def match_clusters(assigned: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The class of each row's cluster under the one-to-one matching with the most agreement (Hungarian); -1 for an unmatched cluster."""
    clusters, classes = int(assigned.max()) + 1, int(labels.max()) + 1
    table = np.zeros((clusters, classes), np.int64)
    np.add.at(table, (assigned, labels), 1)
    cluster, matched = linear_sum_assignment(table, maximize=True)
    meaning = np.full(clusters, -1, np.int32)
    meaning[cluster] = matched
    return meaning[assigned]


def clustering_metrics(assigned: np.ndarray, labels: np.ndarray, match: Match = match_clusters) -> dict[str, float]:
    """Agreement of clusters int [N] with classes int [N]; none of the numbers depends on how clusters are numbered.

    Args:
        assigned: clusters.
        labels: classes.
        match: gives the class of each row's cluster; of several best matchings another one may have another F1.

    Returns:
        `cluster_accuracy` and `cluster_macro_f1` (mean over the classes that occur) after Hungarian matching, `cluster_nmi` (arithmetic
        mean in the denominator), `cluster_ari`.
    """
    matched = match(assigned, labels)
    return {
        "cluster_accuracy": float(np.mean(matched == labels)),
        "cluster_macro_f1": float(f1_score(labels, matched, labels=np.unique(labels), average="macro", zero_division=0)),
        "cluster_nmi": float(normalized_mutual_info_score(labels, assigned)),
        "cluster_ari": float(adjusted_rand_score(labels, assigned)),
    }
