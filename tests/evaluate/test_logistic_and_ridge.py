"""The two probes without a step size, against scikit-learn, slow loops and the figures of the digits protocol."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from maskae.errors import UserError
from maskae.evaluate import Features
from maskae.evaluate.logistic import draw_per_class, logistic_probe
from maskae.evaluate.ridge import ridge_probe
from maskae.evaluate.threads import limited_threads

Make = Callable[..., Features]


def logistic(train: Features, val: Features, **arguments: object) -> dict[str, float]:
    return logistic_probe(train["pooled"], train["label"], val["pooled"], val["label"], **arguments)


def ridge(train: Features, val: Features, **arguments: object) -> dict[str, float]:
    return ridge_probe(train["pooled"], train["label"], val["pooled"], val["label"], **arguments)


@pytest.fixture(scope="module")
def noisy(blobs: Make) -> tuple[Features, Features]:
    return blobs(0, rows=150, classes=7, noise=1.5), blobs(1, rows=90, classes=7, noise=1.5)


def test_raw_digits_give_the_figures_of_the_protocol(digits: tuple[Features, Features]) -> None:
    metrics = logistic(*digits, seed=0)
    assert metrics["logistic_top1"] == pytest.approx(0.969, abs=0.015)
    assert metrics["logistic_10_per_class_top1"] == pytest.approx(0.868, abs=0.015)


def test_all_labels_equal_a_scikit_learn_pipeline(digits: tuple[Features, Features]) -> None:
    train, val = digits
    slow = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=1000))
    with limited_threads(0):
        expected = slow.fit(train["pooled"], train["label"]).score(val["pooled"], val["label"])
    assert logistic(*digits, c=0.3, labels_per_class=None) == {"logistic_top1": pytest.approx(expected, abs=1.5 / 360)}


def test_draws_are_averaged(noisy: tuple[Features, Features]) -> None:
    train, val = noisy
    scaler = StandardScaler().fit(train["pooled"])
    scores = []
    for draw in (6, 7, 8):
        rows = draw_per_class(train["label"], 4, draw)
        model = LogisticRegression(C=1.0, max_iter=1000).fit(scaler.transform(train["pooled"][rows]), train["label"][rows])
        scores.append(model.score(scaler.transform(val["pooled"]), val["label"]))
    metrics = logistic(*noisy, labels_per_class=4, draws=3, seed=2)
    assert metrics["logistic_4_per_class_top1"] == pytest.approx(np.mean(scores), abs=0.01)
    assert metrics["logistic_4_per_class_top1_std"] == pytest.approx(np.std(scores), abs=0.01)
    assert metrics["logistic_4_per_class_top1"] < metrics["logistic_top1"]


def test_a_draw_has_so_many_different_rows_of_each_class() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 200)
    rows = draw_per_class(labels, 10, 0)
    assert len(set(rows)) == 40
    assert np.bincount(labels[rows]).tolist() == [10] * 4
    np.testing.assert_array_equal(rows, draw_per_class(labels, 10, 0))
    assert set(rows) != set(draw_per_class(labels, 10, 1))


def test_ridge_equals_scikit_learn_at_one_penalty(noisy: tuple[Features, Features]) -> None:
    train, val = noisy
    scaler = StandardScaler().fit(train["pooled"])
    x, val_x, targets = scaler.transform(train["pooled"]), scaler.transform(val["pooled"]), np.eye(7)[train["label"]]
    for penalty in (1e-3, 0.5):
        slow = Ridge(alpha=penalty * 150).fit(x, targets)
        left_out = [
            Ridge(alpha=penalty * 150).fit(np.delete(x, row, axis=0), np.delete(targets, row, axis=0)).predict(x[row : row + 1]).argmax()
            for row in range(150)
        ]
        metrics = ridge(*noisy, penalties=(penalty,))
        assert metrics["ridge_top1"] == pytest.approx(np.mean(slow.predict(val_x).argmax(axis=1) == val["label"]))
        assert metrics["ridge_leave_one_out_top1"] == pytest.approx(np.mean(left_out == train["label"]))
        assert metrics["ridge_penalty"] == penalty


def test_ridge_takes_the_best_penalty_by_leave_one_out(noisy: tuple[Features, Features], shuffled_labels: Make) -> None:
    penalties = (1e-5, 1e-2, 1.0, 1e3)
    each = {penalty: ridge(*noisy, penalties=(penalty,))["ridge_leave_one_out_top1"] for penalty in penalties}
    chosen = ridge(*noisy, penalties=penalties)
    assert chosen["ridge_leave_one_out_top1"] == max(each.values()) > min(each.values())
    assert chosen["ridge_penalty"] == max(penalty for penalty in penalties if each[penalty] == max(each.values()))
    # The validation labels have no part in it.
    assert ridge(noisy[0], shuffled_labels(noisy[1], 1), penalties=penalties)["ridge_penalty"] == chosen["ridge_penalty"]


@pytest.mark.parametrize("probe", [logistic, ridge])
def test_separable_noise_scale_and_seed(probe: Callable[..., dict[str, float]], blobs: Make, shuffled_labels: Make) -> None:
    name = f"{probe.__name__}_top1"
    assert probe(blobs(0), blobs(1))[name] == 1.0
    train, val = shuffled_labels(blobs(0, rows=1500), 2), shuffled_labels(blobs(1, rows=1000), 3)
    assert probe(train, val)[name] == pytest.approx(0.25, abs=0.05)
    noisy = blobs(0, noise=1.5), blobs(1, noise=1.5)
    moved = tuple({**features, "pooled": features["pooled"] * 1e-6 + 1e-6} for features in noisy)
    assert probe(*moved)[name] == pytest.approx(probe(*noisy)[name], abs=1.5 / 120)
    assert probe(*noisy) == probe(*noisy)


def test_logistic_draws_follow_the_seed(noisy: tuple[Features, Features]) -> None:
    first, other = (logistic(*noisy, labels_per_class=3, seed=seed) for seed in (0, 1))
    assert first["logistic_top1"] == other["logistic_top1"]
    assert first["logistic_3_per_class_top1"] != other["logistic_3_per_class_top1"]


def test_more_channels_than_rows(blobs: Make) -> None:
    assert ridge(blobs(0, rows=40, width=90), blobs(1, width=90))["ridge_top1"] == 1.0


def test_errors(blobs: Make) -> None:
    train = blobs(0)
    with pytest.raises(UserError, match="labels_per_class = 31, but class 0 has only 30"):
        logistic(train, train, labels_per_class=31)
    with pytest.raises(UserError, match="needs two classes"):
        logistic({**train, "label": np.zeros(120, int)}, train)
    with pytest.raises(UserError, match="penalties must be positive"):
        ridge(train, train, penalties=(0.0,))
