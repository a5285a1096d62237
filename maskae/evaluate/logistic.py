"""Logistic regression on standardised features, with all labels and with a few per class: the protocol of the digits tables."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression

from maskae.errors import UserError
from maskae.evaluate.features import standardise
from maskae.evaluate.threads import limited_threads

MAX_ITERATIONS = 1000


def logistic_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    val: np.ndarray,
    val_labels: np.ndarray,
    *,
    c: float = 1.0,
    labels_per_class: int | None = 10,
    draws: int = 5,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracy on `val` of L2-regularised multinomial logistic regression fitted on `train`.

    Features are standardised by the statistics of ALL training rows, also for the draws (statistics need no labels). The draws are a
    function of (train_labels, seed), so two encoders are compared on the same labelled rows.

    Args:
        train: [N, D] with train_labels int [N]. val: [M, D] with val_labels int [M].
        c: inverse strength of the L2 penalty on the summed loss.
        labels_per_class: size of a draw, without replacement; None leaves the draws out. draws: how many are averaged.

    Returns:
        `logistic_top1` (all labels) and, over the draws, the mean `logistic_<n>_per_class_top1` and its standard deviation `..._std`.

    Raises:
        UserError: fewer than two classes, or a class with fewer than `labels_per_class` training rows.
    """
    if len(np.unique(train_labels)) < 2:
        raise UserError(f"logistic regression needs two classes; all {len(train_labels)} training labels are equal")
    fitted, scored = standardise(train, val)

    def accuracy(rows: np.ndarray) -> float:
        with limited_threads(fitted.size):
            model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS).fit(fitted[rows], train_labels[rows])
            return float(model.score(scored, val_labels))

    metrics = {"logistic_top1": accuracy(np.arange(len(train_labels)))}
    if labels_per_class is not None:
        scores = [accuracy(draw_per_class(train_labels, labels_per_class, seed * draws + draw)) for draw in range(draws)]
        metrics[f"logistic_{labels_per_class}_per_class_top1"] = float(np.mean(scores))
        metrics[f"logistic_{labels_per_class}_per_class_top1_std"] = float(np.std(scores))
    return metrics


def draw_per_class(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Positions of `count` rows of every class, drawn without replacement; int [classes * count]."""
    generator = np.random.default_rng(seed)
    rows = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < count:
            raise UserError(f"labels_per_class = {count}, but class {label} has only {len(members)} training examples")
        rows.append(generator.choice(members, count, replace=False))
    return np.concatenate(rows)
