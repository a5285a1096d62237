"""Graph classification on pooled embeddings by cross-validated support vector machines (InfoGraph, GraphCL; GraphMAE's released code)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.svm import SVC

from maskae.errors import UserError
from maskae.evaluate.evaluators import OverFeatures, check_positive, classes_of, column
from maskae.evaluate.features import Features

INNER_FOLDS = 5


def cross_validated_svm(
    embeddings: np.ndarray, labels: np.ndarray, *, costs: tuple[float, ...], folds: int, fold_seed: int
) -> np.ndarray:
    """Accuracy on each of `folds` stratified folds, float64 [folds], of an RBF SVM whose cost the other folds choose.

    Args:
        embeddings: float [N, D], not normalised. labels: int [N].
        costs: C, chosen by five-fold cross-validation within the training folds.
        fold_seed: of the shuffled folds; the released code uses 0 throughout.

    Raises:
        UserError: a class with fewer members than folds.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2 or np.min(counts) < folds:
        fewest = int(np.min(counts))
        raise UserError(f"graph_svm: {folds} folds need two classes with {folds} graphs each; there are {len(classes)}, one with {fewest}")
    scores = []
    for fit, scored in StratifiedKFold(folds, shuffle=True, random_state=fold_seed).split(embeddings, labels):
        search = GridSearchCV(SVC(), {"C": list(costs)}, cv=INNER_FOLDS).fit(embeddings[fit], labels[fit])
        scores.append(np.mean(search.predict(embeddings[scored]) == labels[scored]))
    return np.asarray(scores)


@dataclass(frozen=True)
class GraphSvm(OverFeatures):
    """`graph_svm_top1`, the mean over the folds, and `graph_svm_top1_std`, over ALL graphs of the training split.

    The protocol has no validation split: the recipes open graph sets with `val_percent=0`, which gives all graphs. The folds are those of
    `fold_seed` for every run, so the evaluation's seed is not used.
    """

    costs: tuple[float, ...] = (1e-3, 1e-2, 0.1, 1.0, 10.0)
    folds: int = 10
    fold_seed: int = 0
    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("graph_svm", costs=self.costs, folds=self.folds)

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        labels = classes_of(train, "train")

        def metrics(key: str) -> dict[str, float]:
            scores = cross_validated_svm(
                column(train, key, "train"), labels, costs=self.costs, folds=self.folds, fold_seed=self.fold_seed
            )
            return {"graph_svm_top1": float(scores.mean()), "graph_svm_top1_std": float(scores.std())}

        return self.each(metrics)
