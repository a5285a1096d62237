"""Two-class detection: area under the ROC curve and equal error rate, over all examples and domain by domain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve

from maskae.errors import UserError
from maskae.evaluate.evaluators import classes_of, column
from maskae.evaluate.features import Features


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve of float scores [N] that are higher where labels [N] are true; NaN where all labels are one."""
    positive = labels.astype(bool)
    return float("nan") if positive.all() or not positive.any() else float(roc_auc_score(positive, scores))


def macro_auc(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, one class against the rest, averaged over the classes that `labels` has and not all rows belong to.

    probabilities: [M, K]; labels: int [M] in 0..K-1. NaN where there is no such class.
    """
    present = [label for label in np.unique(labels) if not (labels == label).all()]
    areas = [area_under_curve(probabilities[:, label], labels == label) for label in present]
    return float(np.mean(areas)) if areas else float("nan")


def equal_error_rate(scores: np.ndarray, labels: np.ndarray) -> float:
    """The rate at which as many negatives pass as positives are missed, interpolated along the ROC curve; NaN where all labels are one."""
    positive = labels.astype(bool)
    if positive.all() or not positive.any():
        return float("nan")
    passed, caught, _ = roc_curve(positive, scores)
    gap = passed - (1 - caught)  # rises from -1 to 1
    last = int(np.searchsorted(gap, 0.0))
    if gap[last] == 0:
        return float(passed[last])
    share = -gap[last - 1] / (gap[last] - gap[last - 1])
    return float(passed[last - 1] + share * (passed[last] - passed[last - 1]))


@dataclass(frozen=True)
class Detection:
    """`auc`, `eer` and `detection_accuracy` of `logits` [N, 2], class 1 being what is to be detected; needs no seed.

    Where the records have the fields `domain` and `seen`: `auc_domain_<number>` of each domain, and the means over domains `auc_seen` and
    `eer_seen` of those that were trained on, `auc_held_out` and `eer_held_out` of the others.
    """

    needs_labels: ClassVar[bool] = True
    reads_train: ClassVar[bool] = False
    keys: ClassVar[tuple[str, ...]] = ("logits", "domain", "seen")

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        """Metrics by name. Raises UserError for logits that are not of two classes."""
        logits, labels = column(val, "logits", "val"), classes_of(val, "val")
        if logits.shape[1] != 2:
            raise UserError(f"detection needs logits of 2 classes, not {logits.shape[1]}")
        scores, domains = logits[:, 1] - logits[:, 0], val["domain"]
        found = {"auc": area_under_curve(scores, labels), "eer": equal_error_rate(scores, labels)}
        found["detection_accuracy"] = float((logits.argmax(1) == labels).mean())
        kinds: dict[str, list[tuple[float, float]]] = {"seen": [], "held_out": []}
        for domain in np.unique(domains):
            rows = domains == domain
            area = found[f"auc_domain_{domain}"] = area_under_curve(scores[rows], labels[rows])
            kinds["seen" if val["seen"][rows].all() else "held_out"].append((area, equal_error_rate(scores[rows], labels[rows])))
        for kind, members in kinds.items():
            if members:
                found[f"auc_{kind}"], found[f"eer_{kind}"] = (float(mean) for mean in np.mean(members, 0))
        return found
