"""What every implementation of attention is given: static options and the arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax

IMPLEMENTATIONS = ("auto", "xla", "pallas_tpu", "pallas_gpu", "cudnn")


@dataclass(frozen=True)
class Options:
    """What is fixed at compile time.

    Attributes:
        scale: factor of the dot products.
        soft_cap: scores become cap * tanh(score / cap) after scaling and bias; None leaves them.
    """

    scale: float
    soft_cap: float | None = None


class Operands(NamedTuple):
    """The arrays of one attention; None where one is not used.

    Attributes:
        query: [B, N, H, D].
        key, value: [B, M, H, D] in the dtype of `query`.
        key_mask: bool [B, M], True where a key may be attended to.
        query_segments, key_segments: int32 [B, N], [B, M]; a query attends to the keys of its own segment. Both or neither.
        query_positions, key_positions: float32 [B, N, C], [B, M, C]; both or neither, and with `slopes`.
        slopes: float32 [H]; `-slopes[h] * ||p_i - p_j||_2` is added to the scaled scores.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    key_mask: jax.Array | None = None
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    query_positions: jax.Array | None = None
    key_positions: jax.Array | None = None
    slopes: jax.Array | None = None


def feature_names(options: Options, operands: Operands) -> str:
    """Which parts an attention uses, as the table of measured choices names them: "plain" or e.g. "mask+segments+positions+cap"."""
    used = {
        "mask": operands.key_mask is not None,
        "segments": operands.query_segments is not None,
        "positions": operands.slopes is not None,
        "cap": options.soft_cap is not None,
    }
    return "+".join(name for name, is_used in used.items() if is_used) or "plain"
