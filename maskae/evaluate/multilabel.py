"""Records with several labels each: logistic regression per label, scored by average precision (BigEarthNet's protocol)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from sklearn.linear_model import LogisticRegression

from maskae.errors import UserError
from maskae.evaluate.evaluators import OverFeatures, check_positive, column
from maskae.evaluate.features import Features, standardise
from maskae.evaluate.threads import limited_threads

LABELS = "labels"
MAX_ITERATIONS = 1000


def average_precision(scores: np.ndarray, present: np.ndarray) -> float:
    """Mean over the positives of the precision at each one's score, ties taken together; in 0..1.

    Args:
        scores: float [N], higher is more likely.
        present: bool [N], at least one True.
    """
    order = np.argsort(-scores, kind="stable")
    scores, present = scores[order], present[order].astype(bool)
    # What is ranked at a score is everything down to the last row with that score.
    last = np.searchsorted(-scores, -scores, side="right")
    hits = np.cumsum(present)[last - 1]
    return float((hits / last)[present].mean())


def label_scores(train: np.ndarray, present: np.ndarray, val: np.ndarray, c: float = 1.0) -> np.ndarray:
    """Log-odds of every label for `val` by L2-regularised logistic regressions on standardised features.

    Args:
        train: [N, D] with present bool [N, K]. val: [M, D].
        c: inverse strength of the penalty on the summed loss.

    Returns:
        float [M, K]; NaN for a label that no training row or every one has.

    Raises:
        UserError: there is no label that some training rows have and others have not.
    """
    fitted, scored = standardise(train, val)
    scores = np.full((len(val), present.shape[1]), np.nan)
    with limited_threads(fitted.size):
        for label in np.flatnonzero(present.any(0) & ~present.all(0)):
            model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS).fit(fitted, present[:, label])
            scores[:, label] = model.decision_function(scored)
    if np.isnan(scores).all():
        raise UserError("multilabel: every label is on all training records or on none; there is nothing to learn")
    return scores


def multilabel_metrics(scores: np.ndarray, present: np.ndarray) -> dict[str, float]:
    """`multilabel_map`, `multilabel_micro_map` and `multilabel_labels` of scores [M, K] (NaN: not scored) and present bool [M, K]."""
    known = ~np.isnan(scores[0])
    counted = np.flatnonzero(known & present.any(0))
    if not len(counted):
        raise UserError("multilabel: no validation record has any of the labels that the training records differ in")
    precisions = [average_precision(scores[:, label], present[:, label]) for label in counted]
    micro = average_precision(scores[:, known].ravel(), present[:, known].ravel())
    return {"multilabel_map": float(np.mean(precisions)), "multilabel_micro_map": micro, "multilabel_labels": float(len(counted))}


@dataclass(frozen=True)
class MultiLabel(OverFeatures):
    """`multilabel_map` (mean over labels) and `multilabel_micro_map` (all decisions in one ranking) of a probe per label.

    Reads the field `labels` [K], 1 where a label is present. Labels that no training record or every one has are left out, and from the
    mean those that no validation record has; `multilabel_labels` counts what is left in it.
    """

    c: float = 1.0
    needs_labels: ClassVar[bool] = False  # it reads `labels`, not the `label` of which a record has one

    def __post_init__(self) -> None:
        check_positive("multilabel", c=self.c)

    @property
    def keys(self) -> tuple[str, ...]:
        """The features that it reads, and the labels."""
        return (*self.features, LABELS)

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        present, truth = column(train, LABELS, "train") > 0, column(val, LABELS, "val") > 0
        found: dict[str, float] = {}
        for key in self.features:
            scores = label_scores(column(train, key, "train"), present, column(val, key, "val"), self.c)
            plain = key == type(self).features[0]
            found |= {name if plain else f"{key}_{name}": value for name, value in multilabel_metrics(scores, truth).items()}
        return found
