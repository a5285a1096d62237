"""How a representation of incomplete records degrades: a probe at a growing share of removed cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from sklearn.linear_model import LogisticRegression

from maskae.errors import UserError, nearest
from maskae.evaluate.detection import macro_auc
from maskae.evaluate.evaluators import check_positive, column, labelled
from maskae.evaluate.features import Features, standardise
from maskae.evaluate.logistic import MAX_ITERATIONS
from maskae.evaluate.threads import limited_threads

FITTED_ON = ("same", "complete")


@dataclass(frozen=True)
class MissingCells:
    """`missing_<percent>_top1` and `..._auc` (macro, one class against the rest) of a logistic probe, `missing_mean_*` over all shares.

    Reads `pooled` for a share of 0 and the system's features `missing_<percent>` for the others, which have that share of each record's
    cells removed. `missing_loss_*` is how far the mean over the shares above 0 lies below the complete records.

    Args:
        shares: removed, in 0..1; the system must have features of each.
        fitted_on: the training records have as many cells removed ("same", TIP's protocol), or none ("complete").
        c: inverse strength of the penalty on the summed loss.
    """

    shares: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7, 0.9)
    fitted_on: str = "same"
    c: float = 1.0
    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("missing_cells", c=self.c)
        if not self.shares or any(not 0 <= share < 1 for share in self.shares):
            raise UserError(f"missing_cells.shares = {self.shares}: shares lie in 0..1, without 1")
        if self.fitted_on not in FITTED_ON:
            known = ", ".join(FITTED_ON)
            raise UserError(f"missing_cells.fitted_on = '{self.fitted_on}'{nearest(self.fitted_on, FITTED_ON)}; there are {known}")

    @staticmethod
    def key(share: float) -> str:
        """The feature of a share."""
        return f"missing_{round(100 * share)}" if share else "pooled"

    @property
    def keys(self) -> tuple[str, ...]:
        """The features that it reads."""
        return tuple(dict.fromkeys(("pooled", *map(self.key, self.shares))))

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        """Metrics by name; needs no seed."""
        train_labels, val_labels = labelled(train, val)
        found: dict[str, float] = {}
        for share in self.shares:
            of_train = self.key(share) if self.fitted_on == "same" else "pooled"
            fitted, scored = standardise(column(train, of_train, "train"), column(val, self.key(share), "val"))
            with limited_threads(fitted.size):
                model = LogisticRegression(C=self.c, max_iter=MAX_ITERATIONS).fit(fitted, train_labels)
                probabilities = np.zeros((len(scored), int(max(train_labels.max(), val_labels.max())) + 1))
                probabilities[:, model.classes_] = model.predict_proba(scored)
            name = f"missing_{round(100 * share)}"
            found[f"{name}_top1"] = float((probabilities.argmax(1) == val_labels).mean())
            found[f"{name}_auc"] = macro_auc(probabilities, val_labels)
        for metric in ("top1", "auc"):
            each = {share: found[f"missing_{round(100 * share)}_{metric}"] for share in self.shares}
            found[f"missing_mean_{metric}"] = float(np.mean(list(each.values())))
            if 0.0 in each and len(each) > 1:
                found[f"missing_loss_{metric}"] = each[0.0] - float(np.mean([value for share, value in each.items() if share]))
        return found
