"""The nearest neighbours and their vote against brute force and scikit-learn."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from maskae.errors import UserError
from maskae.evaluate import Features
from maskae.evaluate.knn import knn_accuracy, neighbours, unit_rows, votes

Make = Callable[..., Features]


def accuracy(train: Features, val: Features, **arguments: object) -> dict[str, float]:
    return knn_accuracy(train["pooled"], train["label"], val["pooled"], val["label"], **arguments)


@pytest.fixture(scope="module")
def noisy(blobs: Make) -> tuple[Features, Features]:
    return blobs(0, rows=200, classes=7, noise=1.5), blobs(1, rows=90, classes=7, noise=1.5)


def test_neighbours_equal_brute_force_in_any_blocks(noisy: tuple[Features, Features]) -> None:
    train, val = noisy
    similarity = unit_rows(val["pooled"]) @ unit_rows(train["pooled"]).T
    expected = np.argsort(-similarity, axis=1, kind="stable")[:, :13]
    for bank_block, query_block in ((16384, 1024), (64, 32), (7, 16), (200, 90)):
        found, position = neighbours(train["pooled"], val["pooled"], 13, bank_block=bank_block, query_block=query_block)
        np.testing.assert_array_equal(position, expected)
        np.testing.assert_allclose(found, np.take_along_axis(similarity, expected, axis=1), atol=1e-6)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0), (200, 0.5)])
def test_top1_equals_scikit_learn(noisy: tuple[Features, Features], k: int, temperature: float) -> None:
    train, val = noisy
    slow = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature))
    slow.fit(train["pooled"], train["label"])
    expected = slow.score(val["pooled"], val["label"])
    assert 0.2 < expected < 0.95
    assert accuracy(train, val, ks=(k,), temperature=temperature)[f"knn_top1_k{k}"] == pytest.approx(expected)


def test_top5_equals_a_slow_vote(noisy: tuple[Features, Features]) -> None:
    train, val = noisy
    hits = 0
    for row, label in zip(unit_rows(val["pooled"]), val["label"], strict=True):
        similarity = unit_rows(train["pooled"]) @ row
        total: dict[int, float] = {}
        for near in np.argsort(-similarity, kind="stable")[:6]:
            total[train["label"][near]] = total.get(train["label"][near], 0.0) + np.exp(similarity[near] / 0.07)
        hits += label in sorted(total, key=lambda label: -total[label])[:5]
    metrics = accuracy(train, val, ks=(6,), query_block=16)
    assert metrics["knn_top5_k6"] == pytest.approx(hits / 90)
    assert metrics["knn_top1_k6"] < metrics["knn_top5_k6"] < 1.0


def test_several_k_in_one_search_equal_one_by_one(noisy: tuple[Features, Features]) -> None:
    together = accuracy(*noisy, ks=(3, 50, 10))
    assert together == accuracy(*noisy, ks=(3,)) | accuracy(*noisy, ks=(50,)) | accuracy(*noisy, ks=(10,))


def test_same_numbers_on_one_and_on_eight_devices(noisy: tuple[Features, Features]) -> None:
    train, val = noisy
    assert len(jax.devices()) == 8
    one = neighbours(train["pooled"], val["pooled"], 20, devices=jax.devices()[:1])
    eight = neighbours(train["pooled"], val["pooled"], 20, devices=jax.devices())
    np.testing.assert_array_equal(one[1], eight[1])
    np.testing.assert_allclose(one[0], eight[0], rtol=1e-6)
    assert accuracy(train, val, devices=jax.devices()[:1]) == accuracy(train, val, devices=jax.devices())


def test_works_inside_of_another_mesh(noisy: tuple[Features, Features]) -> None:
    expected = accuracy(*noisy)
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)):
        assert accuracy(*noisy) == expected


def test_one_compilation_for_all_blocks(noisy: tuple[Features, Features], compilations: Callable[[], int]) -> None:
    train, val = noisy
    arguments = {"bank_block": 33, "query_block": 24, "devices": jax.devices()[:1]}
    before = compilations()
    neighbours(train["pooled"], val["pooled"], 9, **arguments)
    assert compilations() == before + 1
    neighbours(train["pooled"] + 1, val["pooled"][:70], 9, **arguments)
    assert compilations() == before + 1


def test_separable_is_perfect_and_noise_is_chance(blobs: Make, shuffled_labels: Make) -> None:
    train, val = blobs(0), blobs(1)
    assert accuracy(train, val, ks=(1, 20)) == {"knn_top1_k1": 1.0, "knn_top1_k20": 1.0}
    train, val = blobs(0, rows=2000), blobs(1, rows=1000)
    assert accuracy(shuffled_labels(train, 2), shuffled_labels(val, 3), ks=(20,))["knn_top1_k20"] == pytest.approx(0.25, abs=0.05)


def test_only_the_direction_of_a_row_counts(noisy: tuple[Features, Features]) -> None:
    train, val = noisy
    factor = np.random.default_rng(3).uniform(1e-3, 1e3, (200, 1)).astype(np.float32)
    scaled = {**train, "pooled": train["pooled"] * factor}
    assert accuracy(scaled, {**val, "pooled": val["pooled"] * 1e-12}) == accuracy(train, val)


def test_zero_rows_and_small_temperatures_are_safe(noisy: tuple[Features, Features]) -> None:
    train, val = noisy
    assert np.isfinite(neighbours(np.zeros((30, 12), np.float32), val["pooled"], 5)[0]).all()
    # At a temperature near zero the nearest neighbour alone decides; exp(similarity / temperature) itself would overflow.
    assert accuracy(train, val, ks=(20,), temperature=1e-4)["knn_top1_k20"] == accuracy(train, val, ks=(1,))["knn_top1_k1"]
    weight = votes(np.array([[1.0, 0.9]], np.float32), np.array([[1, 0]]), 2, 1e-4)
    np.testing.assert_array_equal(weight, [[0.0, 1.0]])


def test_equal_similarities_go_to_the_lower_position() -> None:
    bank = np.ones((10, 3), np.float32)
    _, position = neighbours(bank, np.ones((2, 3), np.float32), 4, bank_block=3)
    np.testing.assert_array_equal(position, [[0, 1, 2, 3]] * 2)


def test_padding_of_the_bank_is_never_a_neighbour() -> None:
    train = -np.eye(3, dtype=np.float32)
    _, position = neighbours(train, np.ones((1, 3), np.float32), 3, bank_block=2)
    assert set(position[0]) == {0, 1, 2}


@pytest.mark.parametrize("k", [0, 201])
def test_k_outside_the_bank(noisy: tuple[Features, Features], k: int) -> None:
    with pytest.raises(UserError, match=rf"k = {k} .* within 1\.\.200"):
        accuracy(*noisy, ks=(k,))
