"""Cached features: run a frozen encoder once over a split, keep the real rows on the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from maskae.errors import UserError, nearest

Features = dict[str, np.ndarray]
Batch = Mapping[str, Any]

# Two batches in flight: the device computes the next one while the host copies the last one.
IN_FLIGHT = 2

PIXEL_SIDE = 16


def to_host(array: Any) -> np.ndarray:
    """The whole array on this host, from any sharding over any number of hosts; floating types (bfloat16 too) become float32."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    host = np.asarray(array)
    return host.astype(np.float32) if jax.dtypes.issubdtype(host.dtype, np.floating) else host


def extract(features_fn: Callable[[Batch], Mapping[str, Any]], batches: Iterable[Batch], keys: Sequence[str] = ("pooled",)) -> Features:
    """Features of every real row, in the order of the batches.

    Args:
        features_fn: batch -> {"pooled": [B, D], "tokens": [B, N, D], ...}, usually jitted; its arrays may be sharded.
        batches: batches with `valid` bool [B] (False for padding; absent means that all rows count), `label` int32 [B], `index` int32 [B].
        keys: which of the features, or of the batch's fields, to keep. Only these are copied to the host.

    Returns:
        {key: float32 [rows, ...]} and `label`, `index` int32 [rows] where the batches have them.

    Raises:
        UserError: no rows at all, or `features_fn` gives no feature of that name.
    """
    columns: dict[str, list[np.ndarray]] = {}
    pending: deque[tuple[dict[str, Any], Any]] = deque()

    def collect() -> None:
        arrays, valid = pending.popleft()
        keep = None if valid is None else to_host(valid).astype(bool)
        for name, array in arrays.items():
            host = to_host(array)
            if keep is not None and len(keep) != len(host):
                raise ValueError(f"'{name}' has {len(host)} rows where the batch has {len(keep)}")
            columns.setdefault(name, []).append(host if keep is None else host[keep])

    for batch in batches:
        given = features_fn(batch)
        # A field of the records, such as several labels each, may be asked for like a feature.
        arrays = {key: batch[key] if key in batch and key not in given else _pick(given, key) for key in keys}
        arrays.update({key: batch[key] for key in ("label", "index") if key in batch})
        pending.append((arrays, batch.get("valid")))
        if len(pending) >= IN_FLIGHT:
            collect()
    while pending:
        collect()
    features = {name: np.concatenate(parts) for name, parts in columns.items()}
    if not features or not len(next(iter(features.values()))):
        raise UserError("nothing to evaluate: the split has no examples")
    return features


def _pick(given: Mapping[str, Any], key: str) -> Any:
    if key not in given:
        raise UserError(f"the system gives no feature '{key}'{nearest(key, given)}; it gives {', '.join(sorted(given))}")
    return given[key]


def raw_pixels(batches: Iterable[Batch]) -> Features:
    """The baseline that an encoder must beat: `pooled` is the flattened image, float32 [rows, h * w * C].

    Images with sides above 16 are averaged down to 16 pixels: a probe on all pixels of a photograph would have more weights than examples,
    and take longer than the training.
    """

    def flatten(batch: Batch) -> dict[str, jax.Array]:
        images = jnp.asarray(batch["image"], jnp.float32)
        count, height, width, channels = images.shape
        shape = (count, min(height, PIXEL_SIDE), min(width, PIXEL_SIDE), channels)
        small = images if shape == images.shape else jax.image.resize(images, shape, "linear")
        return {"pooled": small.reshape(count, -1)}

    return extract(flatten, batches)


def standardise(train: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Each channel (last axis) of all arrays less the TRAINING mean, over the TRAINING standard deviation; float32, same shapes.

    A channel that does not vary in training becomes zero everywhere: it carries nothing, and dividing by its rounding noise would let a
    validation row explode. The threshold is relative, so the result does not depend on the scale of the features.
    """
    rows = train.reshape(-1, train.shape[-1])  # [rows, D]
    mean = rows.mean(axis=0, dtype=np.float64)
    deviation = rows.std(axis=0, dtype=np.float64)
    varies = deviation > 1e-6 * np.abs(rows).max(axis=0)
    factor = np.where(varies, 1.0 / np.where(varies, deviation, 1.0), 0.0)
    return tuple(((array - mean) * factor).astype(np.float32) for array in (train, *others))
