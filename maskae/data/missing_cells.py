"""Which cells of a table are taken away: TIP's protocol for incomplete data (Du et al. 2024, arXiv 2407.07582, section 4).

Written behind a source as `PATTERN@SHARE`, such as `value@0.3`: `value` takes that share of all cells of a split at random, the others that
share of the columns, the same in both splits: `feature` at random, `most_important` and `least_important` by a random forest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from maskae.errors import UserError, nearest

PATTERNS = ("value", "feature", "most_important", "least_important")
SPLIT_SEEDS = {"train": 2021, "val": 2022}
COLUMN_SEED = 2022


class Removal(NamedTuple):
    """`pattern`: one of `PATTERNS`; `share` of the cells or of the columns, in 0..1."""

    pattern: str
    share: float


def parse_removal(text: str, name: str) -> Removal | None:
    """What `PATTERN@SHARE` says; None for an empty text. Raises UserError for another one, which names the source `name`."""
    if not text:
        return None
    pattern, _, share = text.partition("@")
    if pattern not in PATTERNS:
        raise UserError(f"{name}: unknown pattern '{pattern}'{nearest(pattern, PATTERNS)}; there are {', '.join(PATTERNS)}")
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError(f"{name}: '{share}' after {pattern}@ must be a share in 0..1")
    return Removal(pattern, value)


def column_importance(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float [N]: how much a random forest of seed 2022 uses each column to tell the labels int [M] by; table [M, N] without gaps."""
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(random_state=COLUMN_SEED).fit(table, labels).feature_importances_


def removed_cells(removal: Removal, tables: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, np.ndarray]:
    """bool [M, N] for each split.

    Args:
        removal: pattern and share; int(share * M * N) cells, or int(share * N) columns are taken.
        tables: [M, N] by split.
        labels: int [M] of the training rows, read where columns are ranked.
    """
    columns = tables["train"].shape[1]
    if removal.pattern == "value":
        taken = {}
        for split, table in tables.items():
            order = np.random.default_rng(SPLIT_SEEDS[split]).permutation(table.size)
            taken[split] = (order < int(removal.share * table.size)).reshape(table.shape)
        return taken
    if removal.pattern == "feature":
        order = np.random.default_rng(COLUMN_SEED).permutation(columns)
    else:
        order = np.argsort(column_importance(tables["train"], labels))
        order = order[::-1] if removal.pattern == "most_important" else order
    chosen = np.isin(np.arange(columns), order[: int(removal.share * columns)])
    return {split: np.broadcast_to(chosen, table.shape) for split, table in tables.items()}
