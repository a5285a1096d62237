"""Accuracy of logits by hand, with ties and without labels."""

from __future__ import annotations

import numpy as np
import pytest

from maskae.data.contract import Record
from maskae.data.pipeline import evaluation_batches
from maskae.data.spec import BadRecord, DataSpec
from maskae.data.transforms import make_transform
from maskae.errors import UserError
from maskae.evaluate import EVALUATORS, extract, make_evaluators, needed_keys
from maskae.evaluate.accuracy import Accuracy, top_k_accuracy
from maskae.evaluate.emotion import clip_probabilities


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


def test_recall_of_clips_is_that_of_their_mean_probabilities() -> None:
    """By hand, and where the mean of logits would decide otherwise; records of a clip lie anywhere."""
    logits = np.array([[0, 1, 0], [4, 0, 0], [0, 0, 9], [0, 6, 0], [0, 1, 0], [0, 1.5, 0]], np.float32)
    clips, labels = np.array([7, 3, 5, 3, 5, 7]), np.array([1, 0, 1, 0, 1, 1])
    mean, first = clip_probabilities(logits, clips, 2)
    odds = np.exp(np.array([[4, 0, 0], [0, 6, 0]]))
    np.testing.assert_allclose(mean[0], (odds / odds.sum(1, keepdims=True)).mean(0), rtol=1e-6)
    assert first.tolist() == [1, 2, 0] and mean.argmax(1).tolist() == [1, 2, 1]
    evaluator = make_evaluators({"recall": {"segments": 2}})["recall"]
    val = {"logits": logits, "clip": clips, "label": labels}
    assert evaluator({}, val) == {"uar": pytest.approx(1 / 4), "war": pytest.approx(1 / 3)}
    assert evaluator.keys == ("logits", "clip") and make_evaluators({"recall": {}})["recall"].keys == ("logits",)
    opposed = np.array([[0, 2], [0, 2], [5, 0]], np.float32)
    assert opposed.mean(0).argmax() == 0 and clip_probabilities(opposed, np.zeros(3, int), 3)[0].argmax() == 1


class Segments:
    """Seven clips of two segments each whose logits are stored; both segments of clip 2 are broken."""

    spec = DataSpec("segments", None, 0, (), ())
    logits = np.random.default_rng(0).normal(size=(14, 3)).astype(np.float32)

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, index: int) -> Record:
        if index % 7 == 2:
            raise BadRecord("broken")
        return {"table": self.logits[index], "clip": np.int32(index % 7), "label": index % 7 % 3}

    def name(self, index: int) -> str:
        return f"clip {index % 7}"


@pytest.mark.parametrize("batch_size", [1, 3, 4, 64])
def test_batches_and_padding_may_part_a_clips_segments(batch_size: int) -> None:
    source, evaluator = Segments(), make_evaluators({"recall": {"segments": 2}})["recall"]
    batches = evaluation_batches(source, make_transform(()), batch_size)
    val = extract(lambda batch: {"logits": batch["table"]}, batches, evaluator.keys)
    powers = np.exp(source.logits.astype(np.float64))
    shares = powers / powers.sum(1, keepdims=True)
    right = {clip: (shares[clip] + shares[clip + 7]).argmax() == clip % 3 for clip in range(7) if clip != 2}
    recalls = [np.mean([right[clip] for clip in right if clip % 3 == label]) for label in range(3)]
    assert evaluator({}, val) == {"uar": pytest.approx(np.mean(recalls)), "war": pytest.approx(np.mean(list(right.values())))}
    assert 0 < sum(right.values()) < 6


def test_clips_with_missing_segments_are_refused() -> None:
    logits = np.zeros((3, 2), np.float32)
    with pytest.raises(UserError, match=r"recall.segments=2, but clip 4 has 1 records: .* evaluate.max_examples"):
        clip_probabilities(logits, np.array([1, 4, 1]), 2)
    with pytest.raises(UserError, match=r"recall.segments = 0: must be above zero"):
        make_evaluators({"recall": {"segments": 0}})
