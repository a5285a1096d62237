"""Several samples of different lengths in one row of tokens, for attention that keeps them apart by segment ids.

A plan says which row each sample lies in and from where; `pack` moves tokens there, `unpack` brings them back. Rows have a fixed length, so
that a compiled program serves every batch whose samples fit in its rows (sequence packing as in Dehghani et al. 2023, NaViT,
arXiv 2307.06304, section 2.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskae.errors import UserError

PADDING = -1


class Plan(NamedTuple):
    """Where samples lie: `row` int32 [B], -1 for a sample that has no place, and `start` int32 [B], the place of its first token there."""

    row: Any
    start: Any


class Packed(NamedTuple):
    """Rows of tokens; where nothing lies the vectors are 0 and both numbers are -1.

    Attributes:
        tokens: [R, L, D].
        segments: int32 [R, L], the number of the sample that a token belongs to.
        positions: int32 [R, L], the token's number in its sample.
    """

    tokens: jax.Array
    segments: jax.Array
    positions: jax.Array


def plan_packing(lengths: Sequence[int], row_length: int, rows: int | None = None) -> Plan:
    """First-fit decreasing on the host: long samples first, each into the first row with room for it; equal ones in the order given.

    Needs at most 11/9 of the fewest possible rows, plus one (Dosa 2007). The number of rows used is `plan.row.max() + 1`.

    Args:
        lengths: tokens of each sample, at least 1.
        row_length: tokens that fit in one row.
        rows: the most rows that may be used; None for as many as it takes.

    Raises:
        UserError: a sample that is empty or longer than a row; more rows needed than there are.
    """
    row, start = np.zeros((2, len(lengths)), np.int32)
    filled: list[int] = []
    for sample, length in enumerate(lengths):
        if not 1 <= length <= row_length:
            raise UserError(f"cannot pack sample {sample} of {length} tokens into rows of {row_length}")
    for sample in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        length = int(lengths[sample])
        chosen = next((index for index, used in enumerate(filled) if used + length <= row_length), len(filled))
        if chosen == len(filled):
            filled.append(0)
        row[sample], start[sample] = chosen, filled[chosen]
        filled[chosen] += length
    if rows is not None and len(filled) > rows:
        raise UserError(f"{len(lengths)} samples of {sum(lengths)} tokens need {len(filled)} rows of {row_length}, and there are {rows}")
    return Plan(row, start)


def plan_packing_on_device(lengths: jax.Array, row_length: int, rows: int) -> Plan:
    """The plan of `plan_packing` inside a compiled program, for int32 `lengths` [B] that are known only there, and a fixed number of rows.

    A sample that is empty or does not fit has row -1: it is left out by `pack` and comes back from `unpack` as zeros, which the caller
    must count (`plan.row < 0`). It takes B steps one after the other.
    """

    def place(filled: jax.Array, length: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        fits = (filled + length <= row_length) & (length > 0)  # [R]
        chosen = fits.argmax()
        start = filled[chosen]
        return filled.at[chosen].add(jnp.where(fits.any(), length, 0)), (jnp.where(fits.any(), chosen, -1), start)

    order = jnp.argsort(-lengths, stable=True)
    _, (row, start) = jax.lax.scan(place, jnp.zeros(rows, jnp.int32), lengths[order])
    back = jnp.argsort(order)
    return Plan(row[back].astype(jnp.int32), start[back])


def slots(plan: Plan, lengths: jax.Array, tokens: int, row_length: int) -> jax.Array:
    """int32 [B, tokens]: the place of each token among all rows' places in a line, -1 for what has none."""
    row, start = jnp.asarray(plan.row)[:, None], jnp.asarray(plan.start)[:, None]
    number = jnp.arange(tokens, dtype=jnp.int32)
    return jnp.where((number < lengths[:, None]) & (row >= 0), row * row_length + start + number, PADDING)


def pack(tokens: jax.Array, lengths: jax.Array, plan: Plan, row_length: int, rows: int) -> Packed:
    """The first lengths[b] of each sample's tokens [B, N, D] in rows [R, L, D]; `rows` and `row_length` are static.

    Args:
        lengths: int32 [B], as the plan was made for; a longer plan than N leaves nothing out.
        rows: at least `plan.row.max() + 1`; what lies in rows beyond is lost.
    """
    samples, count, width = tokens.shape
    places = rows * row_length
    slot = slots(plan, lengths, count, row_length)
    # Scattering numbers, then gathering vectors: a scatter of vectors would be slow on every device.
    source = jnp.full(places, PADDING, jnp.int32).at[jnp.where(slot < 0, places, slot)].set(
        jnp.arange(samples * count, dtype=jnp.int32).reshape(samples, count), mode="drop"
    )  # [R * L]
    shape, taken = (rows, row_length), source >= 0
    vectors = jnp.where(taken[:, None], tokens.reshape(samples * count, width)[jnp.maximum(source, 0)], 0)  # [R * L, D]
    segments, positions = (jnp.where(taken, number, PADDING).reshape(shape) for number in (source // count, source % count))
    return Packed(vectors.reshape(*shape, width), segments, positions)


def unpack(rows: jax.Array, lengths: jax.Array, plan: Plan, tokens: int) -> jax.Array:
    """Rows [R, L, D] -> samples [B, tokens, D], zeros behind each sample's own tokens."""
    slot = slots(plan, lengths, tokens, rows.shape[1])
    flat = rows.reshape(-1, rows.shape[-1])
    return jnp.where((slot >= 0)[:, :, None], flat[jnp.maximum(slot, 0)], 0)  # [B, tokens, D]


def pool_segments(packed: Packed, samples: int, skip: int = 0) -> jax.Array:
    """Mean of each sample's tokens but its first `skip` (a class token), float32 [samples, D]; 0 for a sample without any."""
    counted = packed.positions.reshape(-1) >= skip
    # What is not counted goes to a sample behind the last one.
    owner = jnp.where(counted, packed.segments.reshape(-1), samples)
    flat = packed.tokens.reshape(-1, packed.tokens.shape[-1]).astype(jnp.float32)
    total = jax.ops.segment_sum(flat, owner, samples + 1)[:samples]  # [B, D]
    count = jax.ops.segment_sum(jnp.ones_like(owner, jnp.float32), owner, samples + 1)[:samples]
    return total / jnp.maximum(count, 1)[:, None]
