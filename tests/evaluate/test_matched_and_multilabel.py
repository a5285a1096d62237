"""Retrieval of the other half of a pair, and average precision over several labels."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from maskae.errors import UserError
from maskae.evaluate import make_evaluators, needed_keys
from maskae.evaluate.features import extract
from maskae.evaluate.multilabel import average_precision, multilabel_metrics

GENERATOR = np.random.default_rng(0)


def test_average_precision_is_that_of_scikit_learn_with_ties() -> None:
    for _ in range(5):
        present = GENERATOR.random(40) < 0.3
        present[0] = True
        scores = np.round(GENERATOR.normal(size=40) + present, 1)
        assert average_precision(scores, present) == pytest.approx(average_precision_score(present, scores), rel=1e-12)


def test_labels_that_cannot_be_scored_are_left_out() -> None:
    scores = np.stack([[0.9, 0.1, 0.2], [np.nan] * 3, [0.1, 0.2, 0.3]], 1)
    present = np.asarray([[1, 1, 0], [0, 1, 0], [0, 1, 0]], bool)
    assert multilabel_metrics(scores, present) == {"multilabel_map": 1.0, "multilabel_micro_map": 1.0, "multilabel_labels": 1.0}


def test_probe_of_several_labels_finds_what_the_features_hold() -> None:
    evaluators = make_evaluators({"multilabel": {"features": ("pooled", "noise")}})
    assert needed_keys(evaluators) == ("pooled", "noise", "labels")
    mixing = GENERATOR.normal(size=(3, 8))

    def part(count: int) -> dict[str, np.ndarray]:
        labels = (GENERATOR.random((count, 3)) < 0.4).astype(np.float32)
        return {"pooled": labels @ mixing, "noise": GENERATOR.normal(size=(count, 4)), "labels": labels}

    found = evaluators["multilabel"](part(80), part(60))
    assert found["multilabel_map"] == pytest.approx(1.0)
    assert found["noise_multilabel_map"] < 0.7


def test_matched_pairs_are_found_and_chance_is_chance() -> None:
    first = GENERATOR.normal(size=(96, 16))
    matched = make_evaluators({"matched": {"features": ("a", "b"), "batch": 32, "ks": (1, 500)}})["matched"]
    exact = matched({}, {"a": first, "b": 3 * first})
    assert exact == {"matched_recall_at_1": 1.0, "matched_in_32_recall_at_1": 1.0}
    chance = matched({}, {"a": first, "b": GENERATOR.normal(size=(96, 16))})
    assert chance["matched_in_32_recall_at_1"] < 0.15
    with pytest.raises(UserError, match="two halves"):
        make_evaluators({"matched": {"features": ("a",)}})


def test_fields_of_the_batch_can_be_asked_for_like_features() -> None:
    batches = [{"labels": np.eye(3, dtype=np.uint8), "valid": np.asarray([True, True, False])}]
    found = extract(lambda batch: {"pooled": np.ones((3, 2))}, batches, ("pooled", "labels"))
    np.testing.assert_array_equal(found["labels"], np.eye(3)[:2])
