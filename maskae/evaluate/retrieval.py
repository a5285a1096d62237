"""Retrieval between two sets of features."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from maskae.errors import UserError
from maskae.evaluate.knn import neighbours


def recall_at_k(
    queries: np.ndarray,
    gallery: np.ndarray,
    query_ids: np.ndarray,
    gallery_ids: np.ndarray,
    *,
    ks: Sequence[int] = (1, 5, 10),
    same_set: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> dict[str, float]:
    """Share of queries with at least one item of their own id among the k most similar (cosine) of the gallery.

    For paired sets (image and text, two views) the ids are row numbers; for retrieval by class they are labels. Independent of the
    scale of each row.

    Args:
        queries: [N, D] with query_ids int [N]. gallery: [M, D] with gallery_ids int [M].
        same_set: queries and gallery are the same rows in the same order, and no query may find itself.

    Returns:
        `recall_at_<k>` in 0..1 for each k.

    Raises:
        UserError: `same_set` with two sets of different size, or k larger than the gallery.
    """
    if same_set and len(queries) != len(gallery):
        raise UserError(f"same_set, but {len(queries)} queries and a gallery of {len(gallery)}")
    most = max(ks)
    _, position = neighbours(gallery, queries, most + same_set, devices=devices)
    if same_set:
        # A query may come after its duplicates, or not at all: drop it where it is, else the last one.
        itself = position == np.arange(len(queries))[:, None]
        itself[~itself.any(axis=1), -1] = True
        position = position[~itself].reshape(len(queries), most)
    hit = gallery_ids[position] == query_ids[:, None]  # [N, k]
    return {f"recall_at_{k}": float(hit[:, :k].any(axis=1).mean()) for k in ks}
