"""Guided batches: what the order owes for any groups, on the data that a pipeline really serves."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from maskae.data.guided_order import GuidedOrder, full_batches, ranks_in_groups, visits_with_reuse
from maskae.data.pipeline import Pipeline
from maskae.data.spec import DataSpec
from maskae.errors import UserError

DRAWS = np.random.default_rng(0)
UNEVEN = np.repeat(np.arange(12), [1, 2, 3, 3, 5, 8, 2, 9, 4, 1, 30, 6])
SHUFFLED = DRAWS.permutation(UNEVEN)


def distinct(batches: np.ndarray, groups: np.ndarray) -> bool:
    """Whether no batch holds a group twice."""
    return all(len(np.unique(groups[batch])) == len(batch) for batch in batches)


def naive_full_batches(sizes: np.ndarray, batch_size: int) -> int:
    return max(t for t in range(int(sizes.sum()) + 1) if np.minimum(sizes, t).sum() >= batch_size * t)


@pytest.mark.parametrize("batching", ["strict", "even"])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 12])
def test_batches_hold_different_groups_and_are_as_many_as_can_be(batch_size: int, batching: str) -> None:
    order = GuidedOrder(SHUFFLED, batch_size, seed=3, batching=batching)
    sizes = np.bincount(SHUFFLED)
    assert order.batches_per_epoch == naive_full_batches(sizes, batch_size)
    for number in range(3):
        epoch = order.epoch(number)
        assert epoch.shape == (order.batches_per_epoch, batch_size)
        assert distinct(epoch, SHUFFLED)
        assert len(np.unique(epoch)) == epoch.size, "a record twice in an epoch"
    served = [order[j] for j in range(2 * order.batches_per_epoch * batch_size)]
    np.testing.assert_array_equal(served, np.concatenate([order.epoch(0).reshape(-1), order.epoch(1).reshape(-1)]))
    if batch_size in (3, 7):
        assert not np.array_equal(order.epoch(0), order.epoch(1)) and not np.array_equal(order.epoch(0), GuidedOrder(SHUFFLED, 3).epoch(0))


def test_as_many_batches_as_can_be_for_many_sizes() -> None:
    for _ in range(200):
        sizes = DRAWS.integers(1, 20, DRAWS.integers(3, 15))
        batch_size = int(DRAWS.integers(1, len(sizes) + 1))
        assert full_batches(sizes, batch_size) == naive_full_batches(sizes, batch_size)
        visits = visits_with_reuse(sizes, batch_size)
        batches = max(sizes.max(), -(-sizes.sum() // batch_size))
        assert visits.sum() == batches * batch_size and (visits >= sizes).all() and visits.max() <= batches
        assert full_batches(visits, batch_size) == batches


@pytest.mark.parametrize("batching", ["strict", "even"])
def test_with_reuse_every_record_is_shown_and_small_groups_repeat(batching: str) -> None:
    groups = np.repeat(np.arange(4), [2, 3, 5, 9])
    order = GuidedOrder(groups, 4, reuse=True, batching=batching)
    epoch = order.epoch(0)
    assert len(epoch) == 9, "with as many groups as a batch has rows: the largest group's size"
    assert distinct(epoch, groups) and set(epoch.reshape(-1)) == set(range(len(groups)))
    counts = np.bincount(epoch.reshape(-1))
    for group in range(4):
        assert np.ptp(counts[groups == group]) <= 1, "the records of a group are shown about equally often"


def test_the_official_order_keeps_its_promise_only_while_every_group_has_records() -> None:
    order = GuidedOrder(SHUFFLED, 12, batching="official")
    epoch = order.epoch(0)
    assert len(np.unique(epoch)) == epoch.size == len(SHUFFLED) // 12 * 12
    ranks = ranks_in_groups(SHUFFLED, np.arange(len(SHUFFLED)))
    np.testing.assert_array_equal(ranks, [np.count_nonzero(SHUFFLED[:i] == SHUFFLED[i]) for i in range(len(SHUFFLED))])
    assert (np.diff(ranks[epoch.reshape(-1)]) >= 0).all()
    smallest = np.bincount(SHUFFLED).min()
    assert distinct(epoch[:smallest], SHUFFLED) and not distinct(epoch, SHUFFLED)
    assert len(np.unique(SHUFFLED[epoch[-1]])) == 1, "the tail is of the largest group alone"
    assert [order[j] for j in range(epoch.size, epoch.size + 5)] == list(epoch[0, :5]), "the same every epoch"
    np.testing.assert_array_equal(order.epoch(0), order.epoch(1))


def test_groups_of_one_size_make_official_and_strict_alike_and_groups_of_one_record_plain_batches() -> None:
    groups = DRAWS.permutation(np.repeat(np.arange(5), 6))
    official, strict = (GuidedOrder(groups, 5, batching=batching).epoch(0) for batching in ("official", "strict"))
    assert official.shape == strict.shape == (6, 5)
    for epoch in (official, strict):
        assert distinct(epoch, groups) and set(epoch.reshape(-1)) == set(range(30))
    single = GuidedOrder(np.arange(30), 7)
    assert single.batches_per_epoch == 4 and len(np.unique(single.epoch(2))) == 28


def test_with_labels_as_groups_no_batch_holds_a_false_negative_and_random_groups_change_nothing() -> None:
    labels = DRAWS.integers(0, 10, 2000)

    def pairs(groups: np.ndarray) -> float:
        batches = np.concatenate([GuidedOrder(groups, 8, seed=seed).epoch(0) for seed in range(4)])
        return float(np.mean([sum(n * (n - 1) // 2 for n in np.bincount(labels[batch])) for batch in batches]))

    assert pairs(labels) == 0
    noisy = np.where(DRAWS.random(2000) < 0.5, labels, DRAWS.integers(0, 10, 2000))
    chance = 28 * float((np.bincount(labels) / 2000) @ (np.bincount(labels) / 2000))
    assert pairs(noisy) < 0.85 * chance
    assert pairs(DRAWS.integers(0, 40, 2000)) == pytest.approx(chance, rel=0.08)


def test_even_batches_spare_false_negatives_where_large_groups_are_of_one_class() -> None:
    # One class in few large groups, nine in many small ones; the groups are pure.
    groups = np.r_[np.repeat(np.arange(8), 50), np.repeat(np.arange(8, 188), 20)]
    labels = np.where(groups < 8, 0, 1 + (groups - 8) % 9)

    def pairs(batching: str) -> float:
        epoch = GuidedOrder(groups, 16, batching=batching).epoch(0)
        return float(np.mean([sum(n * (n - 1) // 2 for n in np.bincount(labels[batch])) for batch in epoch]))

    chance = 120 * float(np.square(np.bincount(labels) / len(labels)).sum())
    assert pairs("even") < 0.98 * chance < chance < pairs("strict")


class Numbers:
    """A source whose records are nothing but their numbers."""

    spec = DataSpec("numbers", None, 0, (), (), num_classes=None, counts={"train": len(UNEVEN)}, fields={})

    def __len__(self) -> int:
        return len(UNEVEN)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"nodes": np.int32(index)}

    def name(self, index: int) -> str:
        return str(index)


def test_what_a_pipeline_serves_is_the_same_on_one_and_on_four_hosts_and_after_a_resume() -> None:
    def pipeline(**hosts: int) -> Pipeline:
        order = pickle.loads(pickle.dumps(GuidedOrder(SHUFFLED, 8, seed=5)))
        return Pipeline(Numbers(), lambda image, draw: image, batch_size=8, seed=5, order=order, **hosts)

    whole = pipeline()
    batches = [whole.batch(k)["index"] for k in range(9)]
    assert distinct(np.stack(batches), SHUFFLED)
    for k in (8, 0):
        rows = [pipeline(process_index=host, process_count=4).batch(k)["index"] for host in range(4)]
        np.testing.assert_array_equal(np.concatenate(rows), batches[k])
    with pipeline().iterate(6) as resumed:
        for k in range(6, 9):
            np.testing.assert_array_equal(next(resumed)["index"], batches[k])


def test_records_without_a_group_are_left_out_and_too_few_groups_are_refused() -> None:
    groups = np.where(np.arange(len(SHUFFLED)) % 5 == 0, -1, SHUFFLED)
    for batching in ("strict", "official"):
        assert (groups[GuidedOrder(groups, 4, batching=batching).epoch(0)] >= 0).all()
    with pytest.raises(UserError, match="guided batches of 13 need as many groups of records to take one from each, and there are 12"):
        GuidedOrder(SHUFFLED, 13)
    with pytest.raises(UserError, match="did you mean 'strict'"):
        GuidedOrder(SHUFFLED, 4, batching="strickt")
