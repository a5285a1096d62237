"""The probe on shrinking shares of the labels."""

from __future__ import annotations

import numpy as np
import pytest

from maskae.errors import UserError
from maskae.evaluate import make_evaluators
from maskae.evaluate.detection import macro_auc
from maskae.evaluate.label_fractions import draw_fraction

LABELS = np.repeat(np.arange(4), 25)
GENERATOR = np.random.default_rng(0)
FEATURES = {"pooled": np.eye(4, 6)[LABELS] * 2 + GENERATOR.normal(size=(100, 6)), "label": LABELS}


def test_each_sampler_keeps_the_share_that_it_says() -> None:
    drawn = draw_fraction(LABELS, 0.1, 0, "stratified")
    np.testing.assert_array_equal(np.bincount(LABELS[drawn]), [2, 2, 2, 2])
    assert len(draw_fraction(LABELS, 0.001, 0, "stratified")) == 4
    np.testing.assert_array_equal(draw_fraction(LABELS, 0.129, 0, "first"), np.arange(12))
    shuffled = draw_fraction(LABELS, 0.129, 0, "shuffled")
    assert len(set(shuffled)) == 12 and set(shuffled) != set(range(12))
    np.testing.assert_array_equal(shuffled, draw_fraction(LABELS, 0.129, 0, "shuffled"))
    with pytest.raises(UserError, match="unknown sampler 'firs' \\(did you mean 'first'"):
        draw_fraction(LABELS, 0.1, 0, "firs")
    with pytest.raises(UserError, match="none at all"):
        draw_fraction(LABELS, 0.001, 0, "first")


def test_fewer_labels_are_worth_less_and_all_are_worth_most() -> None:
    evaluator = make_evaluators({"label_fractions": {"fractions": (1.0, 0.04)}})["label_fractions"]
    found = evaluator(FEATURES, FEATURES, seed=0)
    assert set(found) == {f"labels_{share}_percent_{metric}" for share in (100, 4) for metric in ("top1", "auc", "top1_std")}
    assert found["labels_100_percent_top1"] > found["labels_4_percent_top1"] > 0.25
    assert found["labels_100_percent_auc"] > found["labels_4_percent_auc"] > 0.5
    assert found["labels_100_percent_top1_std"] == 0 < found["labels_4_percent_top1_std"]


def test_the_area_is_that_of_the_classes_at_hand() -> None:
    perfect = np.eye(3)[[0, 1, 1, 0]]
    assert macro_auc(perfect, np.asarray([0, 1, 1, 0])) == 1
    assert macro_auc(1 - perfect, np.asarray([0, 1, 1, 0])) == 0
    assert np.isnan(macro_auc(perfect, np.zeros(4, int)))


def test_shares_above_one_and_unknown_samplers_are_refused() -> None:
    with pytest.raises(UserError, match="shares are at most 1"):
        make_evaluators({"label_fractions": {"fractions": (2.0,)}})
    with pytest.raises(UserError, match="label_fractions.sampler = 'frist'"):
        make_evaluators({"label_fractions": {"sampler": "frist"}})
