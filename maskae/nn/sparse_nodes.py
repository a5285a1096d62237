"""The first product of a masked graph whose node features are mostly zero, such as bags of words: over what is there alone.

Of the corrupted features of `maskae.nn.node_masks.corrupt` the masked rows are dense, as the token fills them; the others are summed
non-zero by non-zero. Node features are data: they get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskae.nn.graphs import fill_tables, side_by_side, sum_slots
from maskae.nn.node_masks import NodeMask, corrupt

PREFIX = "words_"
# Share of non-zeros from which on the dense product is no slower.
DENSE = 0.1

Dropout = Callable[[jax.Array, jax.Array | None], jax.Array]


class Slots(NamedTuple):
    """The non-zeros of each row (or column) in tables of equal height, as in `maskae.nn.graphs.Neighbours`; int32."""

    entries: tuple[jax.Array, ...]  # [K, R] each: number of the non-zero, Z where the slot is empty
    sources: tuple[jax.Array, ...]  # [K, R] each: its column (or row), 0 where empty
    places: jax.Array  # [N] (or [D]): position in the tables side by side; past the end where there is no non-zero


class Words(NamedTuple):
    """Where features [N, D] are not zero: Z places, and the same by row and by column."""

    rows: jax.Array  # int32 [Z]
    columns: jax.Array  # int32 [Z]
    by_row: Slots
    by_column: Slots


def word_fields(features: np.ndarray) -> dict[str, np.ndarray]:
    """`Words` of features [N, D] as fields of a record; none where a tenth or more of them are not zero. On the host, once per graph."""
    rows, columns = (ends.astype(np.int32) for ends in np.nonzero(features))
    if rows.size >= DENSE * features.size:
        return {}
    fields = {f"{PREFIX}rows": rows, f"{PREFIX}columns": columns}
    for kind, owners, others, count in (("row", rows, columns, features.shape[0]), ("column", columns, rows, features.shape[1])):
        tables, members = fill_tables(np.argsort(owners, kind="stable"), np.bincount(owners, minlength=count), rows.size, None)
        places = np.full(count, sum(map(len, members)), np.int32)
        places[np.concatenate([*members, np.zeros(0, int)]).astype(int)] = np.arange(sum(map(len, members)))
        fields[f"{PREFIX}{kind}_places"] = places
        for number, table in enumerate(tables):
            fields[f"{PREFIX}{kind}_entries_{number}"] = table.astype(np.int32)
            fields[f"{PREFIX}{kind}_sources_{number}"] = np.append(others, 0)[table].astype(np.int32)
    return fields


def words_of(batch: Mapping[str, Any]) -> Words | None:
    """The `Words` in a batch of one graph; None where the batch has several graphs or no such fields."""
    if f"{PREFIX}rows" not in batch or batch["node_mask"].shape[0] != 1:
        return None

    def slots(kind: str) -> Slots:
        count = sum(name.startswith(f"{PREFIX}{kind}_entries_") for name in batch)
        entries, sources = (tuple(batch[f"{PREFIX}{kind}_{part}_{n}"][0] for n in range(count)) for part in ("entries", "sources"))
        return Slots(entries, sources, batch[f"{PREFIX}{kind}_places"][0])

    return Words(batch[f"{PREFIX}rows"][0], batch[f"{PREFIX}columns"][0], slots("row"), slots("column"))


class MaskedWords(NamedTuple):
    """Corrupted node features, not yet put together; `product` takes the place of dropout and a linear map."""

    features: jax.Array  # [N, D]
    mask: NodeMask
    token: jax.Array  # [1, D]
    words: Words

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""
        return self.features.shape

    def product(self, kernel: jax.Array, drop: Dropout, key: jax.Array | None) -> jax.Array:
        """`drop(corrupt(features)) @ kernel` [D, W] -> [N, W]; see `parts` for what is dropped."""
        dense, values = self.parts(drop, key)
        place = jnp.zeros(self.shape[0], jnp.int32).at[self.mask.nodes].set(jnp.arange(len(dense), dtype=jnp.int32))
        return _product(dense, values, kernel, self.words, self.mask.nodes, self.mask.masked, place)

    def parts(self, drop: Dropout, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The rows of `mask.nodes` [m, D] and the non-zeros [Z] of all other rows (0 of masked ones), both after `drop`."""
        keys = (None, None) if key is None else jax.random.split(key)
        mask = self.mask
        of_rows = NodeMask(mask.nodes, mask.counted, mask.masked[mask.nodes], mask.token[mask.nodes])
        if mask.noise is not None and mask.donor is not None:
            sources = jnp.where(mask.noise, mask.donor, jnp.arange(self.shape[0]))[mask.nodes]
        else:
            sources = mask.nodes
        dense = corrupt(jax.lax.stop_gradient(self.features)[sources], of_rows, self.token)  # [m, D]
        values = self.features[self.words.rows, self.words.columns]  # [Z]
        values = jnp.where(mask.masked[self.words.rows], 0, values)
        return drop(dense, keys[0]), drop(jax.lax.stop_gradient(values), keys[1])


@jax.custom_vjp
def _product(
    dense: jax.Array, values: jax.Array, kernel: jax.Array, words: Words, nodes: jax.Array, masked: jax.Array, place: jax.Array
) -> jax.Array:
    """[m, D] and [Z] times [D, W] -> [N, W], row i from `dense[place[i]]` where masked. `values` get no gradient: they are data."""
    others = _sum(kernel, values, words.by_row)
    return jnp.where(masked[:, None], (dense @ kernel)[place], others)


def _sum(rows: jax.Array, values: jax.Array, slots: Slots) -> jax.Array:
    """For each place the sum over its non-zeros of value times source row: [M, W] and [Z] -> [places, W]."""
    sums = [
        sum_slots(rows[:, None], values[:, None].at[entries].get(mode="fill", fill_value=0), sources)[:, 0]
        for entries, sources in zip(slots.entries, slots.sources, strict=True)
    ]
    if not sums:
        return jnp.zeros((len(slots.places), rows.shape[1]), rows.dtype)
    return side_by_side(sums).at[slots.places].get(mode="fill", fill_value=0)


def _forward(dense: jax.Array, values: jax.Array, kernel: jax.Array, *where: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return _product(dense, values, kernel, *where), (dense, values, kernel, *where)


def _backward(saved: tuple[Any, ...], cotangent: jax.Array) -> tuple[Any, ...]:
    dense, values, kernel, words, nodes, masked, _ = saved
    # Entries of `nodes` past the count of the mask are nodes that are not masked.
    own = jnp.where(masked[nodes][:, None], cotangent[nodes], 0)  # [m, W]
    kernel_gradient = dense.T @ own + _sum(cotangent, values, words.by_column)
    return own @ kernel.T, jnp.zeros_like(values), kernel_gradient, None, None, None, None


_product.defvjp(_forward, _backward)
