"""The registry: names, arguments, errors, labels; every evaluator by the same call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import pytest

from maskae.errors import UserError
from maskae.evaluate import EVALUATORS, Evaluator, Features, has_labels, make_evaluators, needed_keys, run
from maskae.evaluate.knn import knn_accuracy

# Those that read nothing but features and labels; evaluators of a kind of data have tests of their own.
SMALL = {
    "accuracy": {},
    "attentive": {"epochs": 1, "heads": 2},
    "clustering": {"restarts": 2},
    "knn": {"ks": (5,)},
    "linear": {"epochs": 1},
    "logistic": {"labels_per_class": 5, "draws": 2},
    "rank": {},
    "ridge": {},
}


@pytest.fixture(scope="module")
def splits(blobs: Callable[..., Features]) -> tuple[Features, Features]:
    both = blobs(0, classes=6, noise=1.0), blobs(1, classes=6, noise=1.0)
    return tuple(
        {**split, "tokens": split["pooled"].reshape(-1, 3, 4), "cls": split["pooled"][:, :5], "logits": split["pooled"]} for split in both
    )


def test_all_metrics_of_all_evaluators_have_names_that_say_what_they_are(splits: tuple[Features, Features]) -> None:
    evaluators = make_evaluators(SMALL)
    assert set(evaluators) <= set(EVALUATORS)
    assert all(isinstance(evaluator, Evaluator) for evaluator in evaluators.values())
    assert needed_keys(evaluators) == ("logits", "tokens", "pooled")
    metrics = run(evaluators, *splits)
    grid = ("top1", "top5", "held_out_top1", "learning_rate", "weight_decay")
    assert set(metrics) == {
        *("top1", "top5"),
        *(f"{probe}_{what}" for probe in ("attentive", "linear") for what in grid),
        *("cluster_accuracy", "cluster_macro_f1", "cluster_nmi", "cluster_ari"),
        *("knn_top1_k5", "knn_top5_k5", "effective_rank", "feature_std"),
        *("logistic_top1", "logistic_5_per_class_top1", "logistic_5_per_class_top1_std"),
        *("ridge_top1", "ridge_leave_one_out_top1", "ridge_penalty"),
    }
    assert all(type(value) is float and np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("name", sorted(SMALL))
def test_pure_function_of_features_and_seed(name: str, splits: tuple[Features, Features]) -> None:
    evaluator = make_evaluators({name: SMALL[name]})[name]
    before = [{key: array.copy() for key, array in split.items()} for split in splits]
    assert evaluator(*splits, 3) == evaluator(*splits, seed=3)
    for split, kept in zip(splits, before, strict=True):
        for key, array in kept.items():
            np.testing.assert_array_equal(split[key], array)


def test_other_features_are_named_in_front(splits: tuple[Features, Features]) -> None:
    train, val = splits
    metrics = make_evaluators({"knn": {"ks": 3, "features": ["pooled", "cls"]}})["knn"](train, val)
    assert set(metrics) == {"knn_top1_k3", "knn_top5_k3", "cls_knn_top1_k3", "cls_knn_top5_k3"}
    expected = knn_accuracy(train["cls"], train["label"], val["cls"], val["label"], ks=(3,))
    assert metrics["cls_knn_top1_k3"] == expected["knn_top1_k3"] != metrics["knn_top1_k3"]
    assert set(make_evaluators({"rank": {"features": ("cls",)}})["rank"](train, val)) == {"cls_effective_rank", "cls_feature_std"}


def test_linear_takes_kinds_of_features_as_one_grid(splits: tuple[Features, Features]) -> None:
    arguments = {"features": ("pooled", "cls"), "epochs": 1, "learning_rates": (0.1,), "weight_decays": (0.0,), "report_grid": True}
    metrics = make_evaluators({"linear": arguments})["linear"](*splits)
    assert {"linear_top1", "linear_grid/pooled_lr_0.1_wd_0_top1", "linear_grid/cls_lr_0.1_wd_0_top1"} <= set(metrics)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kn": {}}, r"unknown evaluator 'kn' \(did you mean 'knn'\?\); there are accuracy, .*ridge"),
        ({"knn": {"temprature": 1.0}}, r"'knn' has no argument 'temprature' \(did you mean 'temperature'\?\)"),
        ({"knn": {"ks": "five"}}, r"knn\.ks = 'five': it takes a value of type int"),
        ({"knn": {"ks": (5, 0)}}, r"knn\.ks = \(5, 0\): must be above zero"),
        ({"knn": {"ks": ()}}, r"knn\.ks = \(\): must be above zero"),
        ({"linear": {"epochs": True}}, r"linear\.epochs = True: it takes a value of type int"),
        ({"linear": {"report_grid": 1}}, r"linear\.report_grid = 1: it takes a value of type bool"),
        ({"attentive": {"learning_rates": -1}}, r"attentive\.learning_rates = \(-1,\)"),
        ({"logistic": {"c": 0}}, r"logistic\.c = 0: must be above zero"),
        ({"logistic": {"labels_per_class": 0}}, r"logistic\.labels_per_class = 0: must be above zero"),
        ({"clustering": {"clusters": "many"}}, r"clustering\.clusters = 'many'"),
        ({"rank": {"max_examples": None}}, r"rank\.max_examples = None"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_evaluators(arguments)


def test_arguments_take_the_form_of_their_defaults() -> None:
    made = make_evaluators({"knn": {"ks": [1, 2]}, "linear": {"learning_rates": 1}, "logistic": {"labels_per_class": None}})
    assert made["knn"].ks == (1, 2)
    assert made["linear"].learning_rates == (1,)
    assert made["logistic"].labels_per_class is None


@pytest.mark.parametrize("name", sorted(SMALL))
def test_missing_labels(name: str, splits: tuple[Features, Features], caplog: pytest.LogCaptureFixture) -> None:
    train, val = splits
    evaluators = make_evaluators({name: SMALL[name]})
    some = {**val, "label": np.where(np.arange(120) < 3, -1, val["label"])}
    none = {key: array for key, array in val.items() if key != "label"}
    assert has_labels(val) and not has_labels(some) and not has_labels(none)
    if not evaluators[name].needs_labels:
        assert run(evaluators, train, none) == run(evaluators, train, val)
        return
    with pytest.raises(UserError, match="3 of the 120 val examples have no label"):
        evaluators[name](train, some)
    with pytest.raises(UserError, match="the val split has no labels"):
        evaluators[name](train, none)
    with caplog.at_level(logging.INFO):
        assert run(evaluators, train, some) == {}
    assert f"'{name}' is left out" in caplog.text


@pytest.mark.parametrize("name", sorted(SMALL))
def test_unusable_features(name: str, splits: tuple[Features, Features]) -> None:
    train, val = splits
    evaluator = make_evaluators({name: SMALL[name]})[name]
    (key,) = evaluator.keys
    diverged = val[key].copy()
    diverged[[5, 8]] = np.nan
    with pytest.raises(UserError, match=f"'{key}' is not finite in 2 of the 120 val examples"):
        evaluator(train, {**val, key: diverged})
    with pytest.raises(UserError, match=rf"'{key}' has shape \[120, 2, 2, 3\]"):
        evaluator(train, {**val, key: val[key].reshape(120, 2, 2, 3)})
    with pytest.raises(UserError, match=f"no feature '{key}' of the val split"):
        evaluator(train, {name: array for name, array in val.items() if name != key})
    empty = {name: array[:0] for name, array in val.items()}
    with pytest.raises(UserError, match="the val split has no examples"):
        evaluator(train, empty)


def test_digits_raw_pixels_in_seconds(digits: tuple[Features, Features]) -> None:
    """The whole set on the quickstart's data; the limit is wide because the machine may be busy (about 2 s with compilation)."""
    start = time.perf_counter()
    metrics = run(make_evaluators({"knn": {}, "linear": {}, "logistic": {}, "ridge": {}, "rank": {}}), *digits)
    assert time.perf_counter() - start < 30
    assert metrics["knn_top1_k10"] == pytest.approx(0.978, abs=0.01)
    assert metrics["linear_top1"] == pytest.approx(0.96, abs=0.015)
    assert metrics["ridge_top1"] == pytest.approx(0.933, abs=0.015)
    assert 35 < metrics["effective_rank"] < 45
