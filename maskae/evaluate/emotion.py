"""Measures of emotion recognition: weighted and unweighted recall, concordance of continuous ratings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import softmax

from maskae.data.spec import CLIP
from maskae.errors import UserError
from maskae.evaluate.evaluators import check_positive, classes_of, column
from maskae.evaluate.features import Features


def recalls(predicted: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(UAR, WAR): the mean over occurring classes of their recall, and the accuracy. int [N] twice."""
    right = predicted == labels
    return float(np.mean([right[labels == each].mean() for each in np.unique(labels)])), float(right.mean())


def clip_probabilities(logits: np.ndarray, clips: np.ndarray, segments: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean over each clip's records of their softmax, float64 [C, K]; the first record of each clip, int [C]).

    logits: float32 [N, K]. clips: int [N], the clip of each record, in any order. Raises UserError where a clip has not `segments` records.
    """
    numbers, first, clip, counts = np.unique(clips, return_index=True, return_inverse=True, return_counts=True)
    if (wrong := np.flatnonzero(counts != segments)).size:
        advice = "the last number of data.source says how many it has, and evaluate.max_examples must be a multiple of it"
        raise UserError(f"recall.segments={segments}, but clip {numbers[wrong[0]]} has {counts[wrong[0]]} records: {advice}")
    total = np.zeros((len(numbers), logits.shape[1]))
    np.add.at(total, clip, softmax(np.asarray(logits, np.float64), axis=-1))
    return total / segments, first


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
    """`uar`, the mean over classes of their recall, and `war`, the accuracy, of the `logits` on the validation split. Needs no seed.

    With `segments` above 1 it judges clips, by the mean of the probabilities of their so many records (see `clip_probabilities`).
    """

    segments: int = 1
    needs_labels: ClassVar[bool] = True
    reads_train: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive("recall", segments=self.segments)

    @property
    def fields(self) -> tuple[str, ...]:
        """What it reads of the records themselves."""
        return (CLIP,) if self.segments > 1 else ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The feature that it reads, and the fields."""
        return ("logits", *self.fields)

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        scores, labels = column(val, "logits", "val"), classes_of(val, "val")
        if self.segments > 1:
            scores, first = clip_probabilities(scores, column(val, CLIP, "val", dimensions=1), self.segments)
            labels = labels[first]
        unweighted, weighted = recalls(scores.argmax(-1), labels)
        return {"uar": unweighted, "war": weighted}
