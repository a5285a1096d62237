"""N-way K-shot classification on frozen features, the protocol of the few-shot tables of point clouds (Sharma & Kaul, NeurIPS 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

from maskae.errors import UserError, nearest
from maskae.evaluate.evaluators import OverFeatures, check_positive
from maskae.evaluate.features import Features, standardise
from maskae.evaluate.threads import limited_threads

CLASSIFIERS = ("logistic", "centroid")
MAX_ITERATIONS = 1000


def draw_episode(
    train_labels: np.ndarray, val_labels: np.ndarray, ways: int, shots: int, queries: int, seed: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The classes int [ways], support rows int [ways * shots] of the training split and query rows of the validation split of one episode.

    Classes are drawn among those with `shots` training rows and one validation row; of each, `queries` validation rows or all there are.
    The draws depend on labels and seed alone, so that encoders are compared on the same episodes.

    Raises:
        UserError: fewer than `ways` such classes.
    """
    known = [label for label in np.unique(train_labels) if (train_labels == label).sum() >= shots and (val_labels == label).any()]
    if len(known) < ways:
        raise UserError(f"few_shot: {ways} ways of {shots} shots: only {len(known)} classes have the rows")
    generator = np.random.default_rng(seed)
    classes = np.sort(generator.choice(known, ways, replace=False))
    support = [generator.permutation(np.flatnonzero(train_labels == label))[:shots] for label in classes]
    query = [generator.permutation(np.flatnonzero(val_labels == label))[:queries] for label in classes]
    return classes, np.concatenate(support), np.concatenate(query)


def episode_accuracy(
    support: np.ndarray, support_labels: np.ndarray, query: np.ndarray, query_labels: np.ndarray, classifier: str
) -> float:
    """Share of queries [M, D] given their label by a classifier fitted on the support rows [N, D] alone.

    "logistic": L2-regularised logistic regression on features standardised by the support rows. "centroid": the class whose mean support
    feature has the largest cosine (Snell et al. 2017, with cosines).
    """
    if classifier == "centroid":
        classes = np.unique(support_labels)
        centres = np.stack([support[support_labels == label].mean(axis=0) for label in classes])  # [ways, D]
        scores = query @ (centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)).T  # [M, ways]
        return float((classes[scores.argmax(axis=1)] == query_labels).mean())
    fitted, scored = standardise(support, query)
    with limited_threads(fitted.size):
        return float(LogisticRegression(max_iter=MAX_ITERATIONS).fit(fitted, support_labels).score(scored, query_labels))


@dataclass(frozen=True)
class FewShot(OverFeatures):
    """`few_shot_<N>way_<K>shot_top1`, the mean over episodes, and `..._std` over them, for every K in `shots`."""

    ways: int = 5
    shots: tuple[int, ...] = (10, 20)
    queries: int = 20
    episodes: int = 10
    classifier: str = "logistic"

    def __post_init__(self) -> None:
        check_positive("few_shot", ways=self.ways, shots=self.shots, queries=self.queries, episodes=self.episodes)
        if self.classifier not in CLASSIFIERS:
            hint = nearest(self.classifier, CLASSIFIERS)
            raise UserError(f"few_shot.classifier = '{self.classifier}': unknown{hint}; there are {', '.join(CLASSIFIERS)}")

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        def metrics(rows: np.ndarray, labels: np.ndarray, val_rows: np.ndarray, val_labels: np.ndarray) -> dict[str, float]:
            found: dict[str, float] = {}
            for shots in self.shots:
                scores = []
                for episode in range(self.episodes):
                    _, support, query = draw_episode(labels, val_labels, self.ways, shots, self.queries, (seed, episode))
                    scores.append(episode_accuracy(rows[support], labels[support], val_rows[query], val_labels[query], self.classifier))
                name = f"few_shot_{self.ways}way_{shots}shot_top1"
                found |= {name: float(np.mean(scores)), f"{name}_std": float(np.std(scores))}
            return found

        return self.each_labelled(train, val, metrics)
