"""The grid engine and the linear probe against a slow numpy loop."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.evaluate import Features, standardise
from maskae.evaluate.linear import linear_probe
from maskae.evaluate.probe import Entry, class_rank, grid_metrics, make_plan, select, shuffled_batches, split_held_out

Make = Callable[..., Features]


def probe(train: Features, val: Features, keys: tuple[str, ...] = ("pooled",), **arguments: object) -> list[Entry]:
    return linear_probe({key: train[key] for key in keys}, train["label"], {key: val[key] for key in keys}, val["label"], **arguments)


@pytest.fixture(scope="module")
def noisy(blobs: Make) -> tuple[Features, Features]:
    return blobs(0, rows=150, classes=7, noise=1.5), blobs(1, rows=90, classes=7, noise=1.5)


def probabilities(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    logits = x @ kernel + bias
    exponent = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponent / exponent.sum(axis=1, keepdims=True)


def slow_sgd(x: np.ndarray, y: np.ndarray, batches: np.ndarray, rate: float, decay: float) -> tuple[np.ndarray, np.ndarray]:
    kernel, bias = np.zeros((x.shape[1], 7)), np.zeros(7)
    speed = [np.zeros_like(kernel), np.zeros_like(bias)]
    for step, rows in enumerate(batches):
        error = (probabilities(x[rows], kernel, bias) - np.eye(7)[y[rows]]) / len(rows)
        speed = [0.9 * speed[0] + x[rows].T @ error + decay * kernel, 0.9 * speed[1] + error.sum(axis=0)]
        now = rate * (1 + np.cos(np.pi * step / len(batches))) / 2
        kernel, bias = kernel - now * speed[0], bias - now * speed[1]
    return kernel, bias


def test_every_entry_equals_a_slow_loop(noisy: tuple[Features, Features]) -> None:
    train, val = noisy
    grid = {"learning_rates": (0.02, 0.2), "weight_decays": (0.0, 0.05)}
    arguments = {**grid, "epochs": 4, "batch_size": 32, "held_out_percent": 20.0, "seed": 3}
    plan = make_plan(train["label"], **arguments)
    x, val_x = (array.astype(np.float64) for array in standardise(train["pooled"], val["pooled"]))
    entries = probe(train, val, **arguments)
    assert [(entry.learning_rate, entry.weight_decay) for entry in entries] == [(0.02, 0.0), (0.02, 0.05), (0.2, 0.0), (0.2, 0.05)]
    for entry in entries:
        trained = slow_sgd(x, train["label"], plan.batches, entry.learning_rate, entry.weight_decay)
        held_out = probabilities(x[plan.held_out], *trained)
        true = held_out[np.arange(len(held_out)), train["label"][plan.held_out]]
        order = np.argsort(-probabilities(val_x, *trained), axis=1)
        assert entry.held_out_loss == pytest.approx(-np.log(true).mean(), rel=1e-4)
        assert entry.held_out_top1 == pytest.approx(np.mean(held_out.argmax(axis=1) == train["label"][plan.held_out]))
        assert entry.top1 == pytest.approx(np.mean(order[:, 0] == val["label"]))
        assert entry.top5 == pytest.approx(np.mean((order[:, :5] == val["label"][:, None]).any(axis=1)))
    assert len({entry.held_out_loss for entry in entries}) == 4


def test_whole_grid_is_one_compilation(noisy: tuple[Features, Features], compilations: Callable[[], int]) -> None:
    before = compilations()
    probe(*noisy, learning_rates=(0.1, 0.2, 0.3), epochs=3, batch_size=17)
    assert compilations() == before + 1
    probe(*noisy, learning_rates=(0.5, 0.6, 0.7), weight_decays=(0.0, 0.2, 0.3), epochs=3, batch_size=17, seed=5)
    assert compilations() == before + 1


def test_separable_is_perfect_and_noise_is_chance(blobs: Make, shuffled_labels: Make) -> None:
    metrics = grid_metrics("linear", probe(blobs(0), blobs(1), epochs=10), report_grid=False)
    assert metrics["linear_top1"] == metrics["linear_held_out_top1"] == 1.0
    assert "linear_top5" not in metrics  # four classes
    train, val = shuffled_labels(blobs(0, rows=1500), 2), shuffled_labels(blobs(1, rows=1000), 3)
    assert select(probe(train, val, epochs=5)).top1 == pytest.approx(0.25, abs=0.05)


def test_deterministic_in_the_seed(noisy: tuple[Features, Features]) -> None:
    first, again, other = (probe(*noisy, epochs=3, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_scale_and_offset_of_channels_change_nothing(noisy: tuple[Features, Features]) -> None:
    factor = np.random.default_rng(0).uniform(0.01, 100, 12).astype(np.float32)
    moved = tuple({**features, "pooled": features["pooled"] * factor + 3 * factor} for features in noisy)
    for entry, expected in zip(probe(*moved, epochs=3), probe(*noisy, epochs=3), strict=True):
        assert entry.held_out_loss == pytest.approx(expected.held_out_loss, rel=1e-4)


def test_kinds_of_different_width_equal_each_alone(noisy: tuple[Features, Features]) -> None:
    train, val = ({**features, "cls": features["pooled"][:, :5]} for features in noisy)
    both = probe(train, val, ("pooled", "cls"), epochs=3)
    alone = probe(train, val, ("pooled",), epochs=3) + probe(train, val, ("cls",), epochs=3)
    assert [entry.feature for entry in both] == ["pooled"] * 15 + ["cls"] * 15
    for entry, expected in zip(both, alone, strict=True):
        assert entry.held_out_loss == pytest.approx(expected.held_out_loss, rel=1e-5)
        assert (entry.feature, entry.top1) == (expected.feature, expected.top1)


def test_validation_labels_never_select(noisy: tuple[Features, Features], shuffled_labels: Make) -> None:
    train, val = noisy
    chosen, blind = (select(probe(train, split, epochs=3)) for split in (val, shuffled_labels(val, 9)))
    assert (chosen.learning_rate, chosen.weight_decay) == (blind.learning_rate, blind.weight_decay)
    assert chosen.held_out_loss == blind.held_out_loss
    assert chosen.top1 != blind.top1


def test_held_out_rows_are_never_trained_on(noisy: tuple[Features, Features]) -> None:
    """Destroying the held-out rows' labels changes what is measured there, and nothing of what is trained."""
    train, val = noisy
    _, held_out = split_held_out(train["label"], 10.0, 0)
    entries = probe(train, val, epochs=3)
    broken = {**train, "pooled": train["pooled"].copy()}
    # Swapping two held-out rows of other classes keeps the standardisation exactly as it is.
    first, second = held_out[0], next(row for row in held_out if train["label"][row] != train["label"][held_out[0]])
    broken["pooled"][[first, second]] = broken["pooled"][[second, first]]
    changed = probe(broken, val, epochs=3)
    assert [entry.top1 for entry in changed] == [entry.top1 for entry in entries]
    assert [entry.held_out_loss for entry in changed] != [entry.held_out_loss for entry in entries]


def test_a_diverged_entry_cannot_win(noisy: tuple[Features, Features]) -> None:
    diverged, _, _, sound = probe(*noisy, learning_rates=(1.0, 0.1), weight_decays=(1e9, 0.0), epochs=40)
    assert not np.isfinite(diverged.held_out_loss)
    assert diverged.held_out_top1 == diverged.top1 == diverged.top5 == 0.0
    assert select([diverged, sound]) is sound


def test_the_best_on_held_out_rows_is_selected_whatever_it_does_on_validation_rows() -> None:
    entries = [Entry("pooled", held_out, 0.0, held_out, 1.0, top1, None) for held_out, top1 in ((0.7, 0.9), (0.8, 0.6), (0.75, 0.99))]
    assert select(entries).held_out_top1 == 0.8


def test_ties_go_to_the_lower_finite_loss() -> None:
    entries = [Entry("pooled", rate, 0.0, 0.9, loss, 0.5, None) for rate, loss in ((1.0, np.nan), (2.0, 0.7), (3.0, 0.2), (4.0, np.inf))]
    assert select(entries).learning_rate == 3.0
    assert select(entries[:2]).learning_rate == 2.0


def test_split_is_stratified_disjoint_and_complete() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [100, 40, 4, 1]))
    fit, held_out = split_held_out(labels, 10.0, 0)
    np.testing.assert_array_equal(np.sort(np.concatenate([fit, held_out])), np.arange(145))
    assert np.bincount(labels[held_out], minlength=4).tolist() == [10, 4, 1, 0]
    assert (split_held_out(labels, 10.0, 1)[1] != held_out).any()


def test_batches_are_epochs_of_the_rows() -> None:
    rows = np.array([3, 5, 8, 13, 21])
    batches = shuffled_batches(rows, 2, 3, 0)
    assert batches.shape == (6, 2) and batches.dtype == np.int32
    for epoch in batches.reshape(3, 4):
        assert len(set(epoch)) == 4 and set(epoch) <= set(rows)
    assert shuffled_batches(rows, 100, 3, 0).shape == (3, 5)


def test_class_rank_breaks_ties_like_argmax_and_fails_what_is_not_finite() -> None:
    scores = jnp.array([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [jnp.nan, 1.0, 9.0], [0.0, 1.0, jnp.inf]])
    places = class_rank(scores, jnp.array([2, 0, 2, 2, 2]))
    np.testing.assert_array_equal(places, [1, 0, 2, 3, 3])


def test_scoring_blocks_do_not_count_their_padding(noisy: tuple[Features, Features]) -> None:
    """1100 rows are two blocks, the second one padded; 90 rows repeated have the accuracy of 90 rows."""
    train, val = noisy
    rows = np.arange(1170) % 90
    many = {key: array[rows] for key, array in val.items()}
    for entry, expected in zip(probe(train, many, epochs=3), probe(train, val, epochs=3), strict=True):
        assert (entry.top1, entry.top5) == pytest.approx((expected.top1, expected.top5))


def test_metrics_name_the_grid(noisy: tuple[Features, Features]) -> None:
    entries = [entry for entry in probe(*noisy, epochs=3) if entry.learning_rate in (0.1, 0.01) and not entry.weight_decay]
    metrics = grid_metrics("linear", entries, report_grid=True)
    best = select(entries)
    assert metrics == {
        "linear_top1": best.top1,
        "linear_top5": best.top5,
        "linear_held_out_top1": best.held_out_top1,
        "linear_learning_rate": best.learning_rate,
        "linear_weight_decay": 0.0,
        "linear_grid/lr_0.01_wd_0_top1": entries[0].top1,
        "linear_grid/lr_0.1_wd_0_top1": entries[1].top1,
    }


def test_same_numbers_under_a_mesh_of_eight(noisy: tuple[Features, Features]) -> None:
    expected = probe(*noisy, epochs=3)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        for entry, alone in zip(probe(*noisy, epochs=3), expected, strict=True):
            assert entry.held_out_loss == pytest.approx(alone.held_out_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rates": ()}, "at least one learning rate"),
        ({"weight_decays": (-0.1,)}, "none may be negative"),
        ({"held_out_percent": 0.0}, "held_out_percent = 0.0"),
    ],
)
def test_errors(noisy: tuple[Features, Features], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        probe(*noisy, **arguments)


def test_nothing_to_hold_out() -> None:
    features = {"pooled": np.eye(3, dtype=np.float32), "label": np.arange(3)}
    with pytest.raises(UserError, match="no class has two"):
        probe(features, features)
