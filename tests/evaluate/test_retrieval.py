"""Recall against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from maskae.errors import UserError
from maskae.evaluate.retrieval import recall_at_k


def brute_force(queries: np.ndarray, gallery: np.ndarray, query_ids: np.ndarray, gallery_ids: np.ndarray, k: int, same_set: bool) -> float:
    hits = 0
    for number, (query, wanted) in enumerate(zip(queries, query_ids, strict=True)):
        score = gallery @ query / np.linalg.norm(gallery, axis=1)
        order = [item for item in np.argsort(-score, kind="stable") if not (same_set and item == number)]
        hits += wanted in gallery_ids[order[:k]]
    return hits / len(queries)


def test_paired_sets_equal_brute_force() -> None:
    generator = np.random.default_rng(0)
    first = generator.normal(size=(60, 8))
    second = first + generator.normal(size=(60, 8))
    ids = np.arange(60)
    metrics = recall_at_k(first, second, ids, ids)
    for k in (1, 5, 10):
        assert metrics[f"recall_at_{k}"] == pytest.approx(brute_force(first, second, ids, ids, k, same_set=False))
    assert metrics["recall_at_1"] < metrics["recall_at_5"] < metrics["recall_at_10"] < 1.0


def test_same_set_never_finds_itself() -> None:
    generator = np.random.default_rng(1)
    features = generator.normal(size=(50, 6))
    labels = generator.integers(0, 8, 50)
    metrics = recall_at_k(features, features, labels, labels, ks=(1, 4), same_set=True)
    for k in (1, 4):
        assert metrics[f"recall_at_{k}"] == pytest.approx(brute_force(features, features, labels, labels, k, same_set=True))
    ids = np.arange(50)
    assert recall_at_k(features, features, ids, ids, ks=(1,), same_set=True) == {"recall_at_1": 0.0}
    assert recall_at_k(features, features, ids, ids, ks=(1,)) == {"recall_at_1": 1.0}


def test_same_set_with_more_duplicates_than_k() -> None:
    features = np.ones((10, 3))
    labels = np.repeat(np.arange(5), 2)
    # Everything ties, so positions 0 and 1 come first: rows 0 and 1 find each other, no other row finds its own label.
    assert recall_at_k(features, features, labels, labels, ks=(1,), same_set=True) == {"recall_at_1": pytest.approx(0.2)}


def test_perfect_chance_and_scale() -> None:
    generator = np.random.default_rng(2)
    features = generator.normal(size=(200, 16))
    ids = np.arange(200)
    assert recall_at_k(features, features * 1e-6, ids, ids, ks=(1,)) == {"recall_at_1": 1.0}
    unrelated = recall_at_k(features, generator.normal(size=(200, 16)), ids, ids, ks=(20,))
    assert unrelated["recall_at_20"] == pytest.approx(0.1, abs=0.06)


def test_errors() -> None:
    with pytest.raises(UserError, match="3 queries and a gallery of 4"):
        recall_at_k(np.ones((3, 2)), np.ones((4, 2)), np.arange(3), np.arange(4), ks=(1,), same_set=True)
    with pytest.raises(UserError, match=r"k = 10 .* within 1\.\.4"):
        recall_at_k(np.ones((3, 2)), np.ones((4, 2)), np.arange(3), np.arange(4))
