"""Weighted nearest-neighbour classification by cosine similarity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maskae.errors import UserError


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32 [N, D]; a zero row stays zero (similarity 0 to everything) instead of becoming NaN."""
    length = np.linalg.norm(features.astype(np.float64), axis=-1, keepdims=True)
    return (features / np.where(length > 0, length, 1.0)).astype(np.float32)


@partial(jax.jit, static_argnames=("k",))
def _search(bank: jax.Array, count: jax.Array, queries: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k most similar of the first `count` rows of bank [blocks, block, D] for queries [Q, D]: similarities and positions [Q, k]."""
    block = bank.shape[1]

    def visit(best: tuple[jax.Array, jax.Array], item: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, jax.Array], None]:
        number, rows = item
        position = number * block + jnp.arange(block, dtype=jnp.int32)
        # Accelerators multiply float32 in a shorter format by default, which reorders near neighbours.
        similarity = jnp.matmul(queries, rows.T, precision=jax.lax.Precision.HIGHEST)  # [Q, block]
        similarity = jnp.where(position < count, similarity, -jnp.inf)
        similarity = jnp.concatenate([best[0], similarity], axis=1)  # [Q, k + block]
        position = jnp.concatenate([best[1], jnp.broadcast_to(position, (len(queries), block))], axis=1)
        # top_k keeps the first of equals and the best so far stand first: ties go to the lower position, whatever the block.
        similarity, order = jax.lax.top_k(similarity, k)  # [Q, k]
        return (similarity, jnp.take_along_axis(position, order, axis=1)), None

    start = jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), -1, jnp.int32)
    best, _ = jax.lax.scan(visit, start, (jnp.arange(len(bank), dtype=jnp.int32), bank))
    return best


def neighbours(
    bank: np.ndarray,
    queries: np.ndarray,
    k: int,
    *,
    bank_block: int = 16384,
    query_block: int = 1024,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of the bank with the largest cosine similarity to each query, most similar first.

    The bank stays on the device; the similarity matrix exists only in pieces of query_block x bank_block. Queries are spread over
    `devices` (default: all of this host's), which changes no result.

    Args:
        bank: [M, D]. queries: [N, D]. Any scale per row.

    Returns:
        similarity float32 [N, k] and position int32 [N, k] in the bank; equal similarities are in order of position.

    Raises:
        UserError: k is not within 1..M.
    """
    if not 1 <= k <= len(bank):
        raise UserError(f"k = {k} neighbours of {len(bank)} training examples: k must be within 1..{len(bank)}")
    devices = list(devices) if devices is not None else jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("query",), axis_types=(AxisType.Auto,), devices=devices)
    block = min(bank_block, len(bank))
    rows = _pad_rows(unit_rows(bank), block).reshape(-1, block, bank.shape[1])  # [blocks, block, D]
    step = -(-min(query_block, len(queries)) // len(devices)) * len(devices)
    padded = _pad_rows(unit_rows(queries), step)
    found = []
    # The search has a mesh of its own; a mesh that the caller has set must not meet it inside jit.
    with jax.set_mesh(mesh):
        stored = jax.device_put(rows, NamedSharding(mesh, PartitionSpec()))
        for start in range(0, len(padded), step):
            piece = jax.device_put(padded[start : start + step], NamedSharding(mesh, PartitionSpec("query")))
            found.append(jax.tree.map(np.asarray, _search(stored, np.int32(len(bank)), piece, k)))
    similarity, position = (np.concatenate(parts)[: len(queries)] for parts in zip(*found, strict=True))
    return similarity, position


def _pad_rows(array: np.ndarray, multiple: int) -> np.ndarray:
    return np.pad(array, [(0, -len(array) % multiple)] + [(0, 0)] * (array.ndim - 1))


def votes(similarity: np.ndarray, labels: np.ndarray, classes: int, temperature: float) -> np.ndarray:
    """Weight of each class among the neighbours: sum of exp(similarity / temperature), up to a factor per row; float32 [N, classes].

    Weights are relative to the nearest neighbour, so that a small temperature cannot overflow.

    Args:
        similarity: [N, k], most similar first. labels: int [N, k], those neighbours' classes.

    Source: the weighted kNN of Wu et al. 2018 (arXiv 1805.01978), section 3.4, as used by DINO.
    """
    weight = np.exp((similarity - similarity[:, :1]) / temperature)  # [N, k]
    total = np.zeros((len(similarity), classes), np.float32)
    np.add.at(total, (np.arange(len(similarity))[:, None], labels), weight)
    return total


def knn_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    val: np.ndarray,
    val_labels: np.ndarray,
    *,
    ks: Sequence[int] = (10, 20),
    temperature: float = 0.07,
    bank_block: int = 16384,
    query_block: int = 1024,
    devices: Sequence[jax.Device] | None = None,
) -> dict[str, float]:
    """Share of `val` rows whose class wins the weighted vote of the k nearest `train` rows, for every k from one search.

    Depends on the direction of each feature only: any positive factor per row changes nothing.

    Args:
        train: [M, D] with train_labels int [M]. val: [N, D] with val_labels int [N].

    Returns:
        `knn_top1_k<k>` and, with more than five classes, `knn_top5_k<k>` (a class without any vote is never a hit), all in 0..1.
    """
    classes = int(max(train_labels.max(), val_labels.max())) + 1
    similarity, position = neighbours(train, val, max(ks), bank_block=bank_block, query_block=query_block, devices=devices)
    hits = {k: np.zeros(2) for k in ks}
    for start in range(0, len(val), query_block):
        piece = slice(start, start + query_block)
        for k in ks:
            total = votes(similarity[piece, :k], train_labels[position[piece, :k]], classes, temperature)
            order = np.argsort(-total, axis=1, kind="stable")[:, :5]  # [piece, up to 5]
            hit = (order == val_labels[piece, None]) & (np.take_along_axis(total, order, axis=1) > 0)
            hits[k] += hit[:, 0].sum(), hit.any(axis=1).sum()
    metrics = {f"knn_top1_k{k}": float(hits[k][0] / len(val)) for k in ks}
    if classes > 5:
        metrics |= {f"knn_top5_k{k}": float(hits[k][1] / len(val)) for k in ks}
    return metrics
