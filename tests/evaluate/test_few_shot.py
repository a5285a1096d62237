"""Few-shot episodes: separable features, equal draws for all encoders, and clear refusals."""

from __future__ import annotations

import numpy as np
import pytest

from maskae.errors import UserError
from maskae.evaluate import make_evaluators
from maskae.evaluate.few_shot import draw_episode


def labelled(noise: float, rows: int = 12, classes: int = 6, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), rows)
    return {"pooled": (np.eye(8)[labels] + noise * generator.normal(size=(len(labels), 8))).astype(np.float32), "label": labels}


@pytest.mark.parametrize("classifier", ["logistic", "centroid"])
def test_separable_classes_are_told_apart_and_noise_is_not(classifier: str) -> None:
    arguments = {"ways": 5, "shots": (1, 5), "queries": 6, "episodes": 4, "classifier": classifier}
    evaluator = make_evaluators({"few_shot": arguments})["few_shot"]
    clear = evaluator(labelled(0.05), labelled(0.05, seed=1), 0)
    assert set(clear) == {f"few_shot_5way_{k}shot_top1{end}" for k in (1, 5) for end in ("", "_std")}
    assert clear["few_shot_5way_5shot_top1"] == 1
    lost = evaluator(labelled(50.0), labelled(50.0, seed=1), 0)
    assert lost["few_shot_5way_5shot_top1"] < 0.45  # chance is 0.2


def test_episodes_hold_what_they_should_and_depend_on_the_seed_alone() -> None:
    labels = labelled(1.0)["label"]
    classes, support, query = draw_episode(labels, labels, 5, 3, 20, (0, 1))
    assert len(classes) == 5
    assert (np.bincount(labels[support], minlength=6)[classes] == 3).all()
    assert set(labels[query]) == set(classes)
    assert len(query) == 5 * 12  # all there are, where a class has fewer than asked
    again, other = draw_episode(labels, labels, 5, 3, 20, (0, 1)), draw_episode(labels, labels, 5, 3, 20, (0, 2))
    np.testing.assert_array_equal(support, again[1])
    assert not np.array_equal(support, other[1])


def test_too_few_classes_and_unknown_classifiers_are_named() -> None:
    evaluator = make_evaluators({"few_shot": {"ways": 5, "shots": (20,)}})["few_shot"]
    with pytest.raises(UserError, match="only 0 classes"):
        evaluator(labelled(1.0), labelled(1.0), 0)
    with pytest.raises(UserError, match="did you mean 'centroid'"):
        make_evaluators({"few_shot": {"classifier": "centroids"}})
