"""The probe with missing cells: which features it reads, what it fits on, and that a loss of information shows."""

from __future__ import annotations

import numpy as np
import pytest

from maskae.errors import UserError
from maskae.evaluate import make_evaluators, needed_keys
from maskae.evaluate.missing_cells import MissingCells


def features(seed: int, noise: float) -> dict[str, np.ndarray]:
    """Two classes apart in one of four channels, less so with cells missing."""
    generator = np.random.default_rng(seed)
    labels = np.arange(200) % 2
    clean = generator.normal(size=(200, 4)) * 0.1
    clean[:, 0] += labels
    return {"pooled": clean, "missing_50": -clean + noise * generator.normal(size=clean.shape), "label": labels}


def test_metrics_of_each_share() -> None:
    found = MissingCells((0.0, 0.5))(features(0, 2.0), features(1, 2.0))
    assert found["missing_0_top1"] == 1.0
    assert 0.5 < found["missing_50_top1"] < 0.75
    assert found["missing_50_top1"] < found["missing_50_auc"] + 0.1
    assert found["missing_loss_top1"] == pytest.approx(1.0 - found["missing_50_top1"])
    assert found["missing_mean_auc"] == pytest.approx((found["missing_0_auc"] + found["missing_50_auc"]) / 2)


def test_it_fits_on_records_with_as_many_cells_or_on_complete_ones() -> None:
    # The features of incomplete records point the other way here.
    data = features(0, 0.0), features(1, 0.0)
    assert MissingCells((0.5,))(*data)["missing_50_top1"] == 1.0
    assert MissingCells((0.5,), fitted_on="complete")(*data)["missing_50_top1"] < 0.6


def test_keys_and_wrong_arguments() -> None:
    evaluators = make_evaluators({"missing_cells": {"shares": (0.0, 0.3, 0.9)}})
    assert needed_keys(evaluators) == ("pooled", "missing_30", "missing_90")
    with pytest.raises(UserError, match="shares lie in"):
        MissingCells((1.0,))
    with pytest.raises(UserError, match="did you mean 'same'"):
        MissingCells(fitted_on="sam")
