"""Accuracy of a classifier's own logits, for systems that are classifiers (fine-tuning, linear probing)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from maskae.evaluate.evaluators import classes_of, column
from maskae.evaluate.features import Features


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of rows whose label is among the `k` largest of `logits` float32 [N, K], `labels` int [N]; ties count against the label."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)  # [N, 1]
    return float(((logits >= own).sum(axis=1) <= k).mean())


@dataclass(frozen=True)
class Accuracy:
    """`top1` of the `logits` on the validation split, and `top5` where there are more than five classes. Needs no seed."""

    needs_labels: ClassVar[bool] = True

    @property
    def keys(self) -> tuple[str, ...]:
        """The feature that it reads."""
        return ("logits",)

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        logits, labels = column(val, "logits", "val"), classes_of(val, "val")
        return {f"top{k}": top_k_accuracy(logits, labels, k) for k in (1, 5) if k < logits.shape[1]}
