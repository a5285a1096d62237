"""Measures of emotion recognition: weighted and unweighted recall, concordance of continuous ratings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from maskae.evaluate.evaluators import classes_of, column
from maskae.evaluate.features import Features


def recalls(predicted: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(UAR, WAR): the mean over occurring classes of their recall, and the accuracy. int [N] twice."""
    right = predicted == labels
    return float(np.mean([right[labels == each].mean() for each in np.unique(labels)])), float(right.mean())


def correlation(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each column, float64 [K] of [N, K] twice; 0 where a column does not vary."""
    left, right = (np.asarray(x, np.float64) - np.mean(x, 0, np.float64) for x in (predicted, target))
    norms = np.sqrt((left**2).sum(0) * (right**2).sum(0))
    return np.divide((left * right).sum(0), norms, out=np.zeros_like(norms), where=norms > 0)


def concordance(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Lin's concordance correlation of each column, 2 cov / (var + var + (difference of means)^2); float64 [K] of [N, K] twice.

    Unbiased moments, as in HiCMAE's released code; 0 where neither column varies and the means are equal.
    """
    left, right = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
    covariance = ((left - left.mean(0)) * (right - right.mean(0))).sum(0) / (len(left) - 1)
    spread = left.var(0, ddof=1) + right.var(0, ddof=1) + (left.mean(0) - right.mean(0)) ** 2
    return np.divide(2 * covariance, spread, out=np.zeros_like(spread), where=spread > 0)


@dataclass(frozen=True)
class Recall:
    """`uar`, the mean over classes of their recall, and `war`, the accuracy, of the `logits` on the validation split. Needs no seed."""

    needs_labels: ClassVar[bool] = True

    @property
    def keys(self) -> tuple[str, ...]:
        """The feature that it reads."""
        return ("logits",)

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        unweighted, weighted = recalls(column(val, "logits", "val").argmax(-1), classes_of(val, "val"))
        return {"uar": unweighted, "war": weighted}
