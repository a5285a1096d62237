"""Accuracy of logits by hand, with ties and without labels."""

from __future__ import annotations

import numpy as np
import pytest

from maskae.errors import UserError
from maskae.evaluate import EVALUATORS, make_evaluators, needed_keys
from maskae.evaluate.accuracy import Accuracy, top_k_accuracy


def test_by_hand() -> None:
    logits = np.array([[3, 2, 1], [1, 2, 3], [0, 9, 5], [0, 9, 5]], np.float32)
    labels = np.array([0, 1, 2, 1])
    assert top_k_accuracy(logits, labels, 1) == 0.5
    assert top_k_accuracy(logits, labels, 2) == 1.0


def test_a_classifier_that_says_nothing_scores_nothing() -> None:
    assert top_k_accuracy(np.zeros((4, 3), np.float32), np.array([0, 1, 2, 0]), 1) == 0.0


def test_the_evaluator_reads_the_validation_logits() -> None:
    assert EVALUATORS["accuracy"] is Accuracy
    evaluators = make_evaluators({"accuracy": {}})
    assert needed_keys(evaluators) == ("logits",)
    logits = np.eye(6, dtype=np.float32) + 0.1 * np.arange(6, dtype=np.float32)
    val = {"logits": logits, "label": np.arange(6)}
    assert evaluators["accuracy"]({}, val) == {"top1": 1.0, "top5": 1.0}
    few = {"logits": logits[:3, :3], "label": np.array([0, 2, 2])}
    assert evaluators["accuracy"]({}, few) == {"top1": pytest.approx(2 / 3)}
    with pytest.raises(UserError, match="1 of the 3 val examples have no label"):
        evaluators["accuracy"]({}, few | {"label": np.array([0, -1, 2])})


def test_recall_weighs_classes_alike() -> None:
    logits = np.eye(3, dtype=np.float32)[[0, 0, 1, 0, 2]]
    found = make_evaluators({"recall": {}})["recall"]({}, {"logits": logits, "label": np.array([0, 0, 0, 1, 2])})
    assert found == {"uar": pytest.approx((2 / 3 + 0 + 1) / 3), "war": pytest.approx(3 / 5)}
