"""Finding the other half of a pair: image and text, two sensors, two views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from maskae.errors import UserError
from maskae.evaluate.evaluators import check_positive, column
from maskae.evaluate.features import Features
from maskae.evaluate.retrieval import recall_at_k


@dataclass(frozen=True)
class Matched:
    """`matched_recall_at_<k>` among all validation records, and `matched_in_<batch>_recall_at_1` among so many drawn ones; both directions.

    Args:
        features: the two halves of a pair, compared by their cosine.
        ks: the recalls wanted among all records; those larger than the number of records are left out.
        batch: records per draw, averaged over one pass in random order; chance is 1 / batch.
    """

    features: tuple[str, ...] = ("optical_embedding", "radar_embedding")
    ks: tuple[int, ...] = (1, 5, 10)
    batch: int = 64
    needs_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive("matched", ks=self.ks, batch=self.batch)
        if len(self.features) != 2:
            raise UserError(f"matched.features = {self.features}: name the two halves of a pair")

    @property
    def keys(self) -> tuple[str, ...]:
        """The features that it reads."""
        return self.features

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        """Of the validation records; the training ones are not read."""
        first, second = (column(val, key, "val") for key in self.features)
        ks = tuple(k for k in self.ks if k <= len(first))
        found = {f"matched_{name}": value for name, value in both_ways(first, second, ks).items()}
        size = min(self.batch, len(first))
        order = np.random.default_rng(seed).permutation(len(first))
        draws = [order[start : start + size] for start in range(0, len(first) - size + 1, size)]
        inside = [both_ways(first[rows], second[rows], (1,))["recall_at_1"] for rows in draws]
        return found | {f"matched_in_{size}_recall_at_1": float(np.mean(inside))}


def both_ways(first: np.ndarray, second: np.ndarray, ks: tuple[int, ...]) -> dict[str, float]:
    """`recall_at_<k>`, the mean of looking for the second half by the first and the other way round. [N, D] each, row i matches row i."""
    rows = np.arange(len(first))
    ways = [recall_at_k(*pair, rows, rows, ks=ks) for pair in ((first, second), (second, first))]
    return {name: (ways[0][name] + ways[1][name]) / 2 for name in ways[0]}
