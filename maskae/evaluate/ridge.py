"""Closed-form ridge probe: all regularisers from one eigendecomposition, the best one by exact leave-one-out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maskae.errors import UserError
from maskae.evaluate.features import standardise
from maskae.evaluate.threads import limited_threads


def ridge_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    val: np.ndarray,
    val_labels: np.ndarray,
    *,
    penalties: Sequence[float] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
) -> dict[str, float]:
    """Least squares on one-hot targets with an L2 penalty and a free bias; no seed, no iterations, no held-out rows.

    The penalty is chosen by the leave-one-out accuracy on the training rows, exact and free in closed form: the prediction for row i
    without row i is (y_i_hat - h_i y_i) / (1 - h_i), with h_i the leverage.

    Args:
        train: [N, D] with train_labels int [N]. val: [M, D] with val_labels int [M].
        penalties: multiples of the number of rows (features are standardised, so 1.0 doubles a channel of unit variance).

    Returns:
        `ridge_top1`, `ridge_leave_one_out_top1` (training rows) and the chosen `ridge_penalty`.
    """
    if not penalties or min(penalties) <= 0:
        raise UserError(f"ridge penalties must be positive, not {tuple(penalties)}")
    fitted, scored = standardise(train, val)
    classes = int(max(train_labels.max(), val_labels.max())) + 1
    with limited_threads(fitted.size):
        accuracy, penalty, kernel, bias = _best_by_leave_one_out(fitted, train_labels, classes, penalties)
        top1 = float(np.mean((scored @ kernel + bias).argmax(axis=1) == val_labels))
    return {"ridge_top1": top1, "ridge_leave_one_out_top1": accuracy, "ridge_penalty": penalty}


def _best_by_leave_one_out(
    fitted: np.ndarray, labels: np.ndarray, classes: int, penalties: Sequence[float]
) -> tuple[float, float, np.ndarray, np.ndarray]:
    """Leave-one-out accuracy, penalty, kernel [D, K] and bias [K] of the best penalty; of equals the strongest."""
    rows = len(fitted)
    targets = np.eye(classes)[labels]  # [N, K]
    bias = targets.mean(axis=0)
    values, vectors = np.linalg.eigh(fitted.T.astype(np.float64) @ fitted / rows)  # [D], [D, D]
    rotated = fitted @ vectors  # [N, D]
    projected = rotated.T @ (targets - bias) / rows  # [D, K]
    best = (-1.0, 0.0, projected)
    for penalty in sorted(penalties, reverse=True):
        shrink = 1.0 / (np.clip(values, 0.0, None) + penalty)  # [D]
        kernel = shrink[:, None] * projected  # [D, K] in the rotated basis
        # The bias is one more column of ones, orthogonal to the centred features: leverage 1 / N.
        leverage = (rotated**2 @ shrink + 1.0)[:, None] / rows  # [N, 1]
        left_out = (rotated @ kernel + bias - leverage * targets) / np.maximum(1.0 - leverage, 1e-12)  # [N, K]
        accuracy = float(np.mean(left_out.argmax(axis=1) == labels))
        if accuracy > best[0]:
            best = (accuracy, penalty, vectors @ kernel)
    return *best, bias
