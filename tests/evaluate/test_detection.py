"""Detection: areas and equal error rates of known scores, and domain by domain."""

from __future__ import annotations

import numpy as np
import pytest

from maskae.errors import UserError
from maskae.evaluate.detection import Detection, area_under_curve, equal_error_rate

LABELS = np.array([0, 0, 0, 1, 1, 1])


def test_area_and_equal_error_rate_of_known_scores() -> None:
    assert area_under_curve(LABELS.astype(float), LABELS) == 1.0
    assert area_under_curve(np.zeros(6), LABELS) == 0.5
    assert equal_error_rate(LABELS.astype(float), LABELS) == 0.0
    assert equal_error_rate(np.zeros(6), LABELS) == pytest.approx(0.5)
    # One of three real ones above one of three fake ones: each side errs once at any threshold between them.
    scores = np.array([0.0, 0.1, 0.6, 0.5, 0.8, 0.9])
    assert area_under_curve(scores, LABELS) == pytest.approx(8 / 9)
    assert equal_error_rate(scores, LABELS) == pytest.approx(1 / 3)
    assert equal_error_rate(1 - scores, LABELS) == pytest.approx(2 / 3)
    assert np.isnan(area_under_curve(scores, np.ones(6)))
    assert np.isnan(equal_error_rate(scores, np.zeros(6)))


def test_domains_are_counted_apart() -> None:
    scores = np.array([0.0, 1.0, 0.1, 0.2, 0.9, 0.4])
    features = {
        "logits": np.stack([np.zeros(6), scores - 0.5], 1),
        "label": np.array([0, 1, 0, 1, 0, 1]),
        "domain": np.array([0, 0, 1, 1, 2, 2]),
        "seen": np.array([1, 1, 1, 1, 0, 0]),
    }
    found = Detection()({}, features)
    assert [found[f"auc_domain_{i}"] for i in range(3)] == [1.0, 1.0, 0.0]
    assert (found["auc_seen"], found["auc_held_out"], found["eer_held_out"]) == (1.0, 0.0, 1.0)
    assert found["detection_accuracy"] == pytest.approx(3 / 6)
    assert found["auc"] == pytest.approx(7 / 9)
    with pytest.raises(UserError, match="2 classes, not 3"):
        Detection()({}, {**features, "logits": np.zeros((6, 3))})
