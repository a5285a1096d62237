"""Vec2Face's masker of a feature map's rows: a mask rate per batch, two nested cuts per example (arXiv 2409.02979, released code)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maskae.errors import UserError


class MaskRate(NamedTuple):
    """The truncated normal law of the mask rate: `mean` and `std` before truncation to [`low`, `high`]."""

    mean: float = 0.75
    std: float = 0.25
    low: float = 0.5
    high: float = 1.0

    def check(self) -> MaskRate:
        """Itself. Raises UserError where it is no law of a share."""
        if not (0 < self.low <= self.high <= 1 and self.std > 0):
            raise UserError(f"a mask rate needs 0 < low <= high <= 1 and std > 0; given {', '.join(map(str, self))}")
        return self

    def _limits(self) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray((self.low - self.mean) / self.std), jnp.asarray((self.high - self.mean) / self.std)

    def quantile(self, share: jax.Array) -> jax.Array:
        """The rate that a `share` of draws lies below; any shape, in [0, 1]."""
        below, above = (jax.scipy.special.ndtr(limit) for limit in self._limits())
        rate = self.mean + self.std * jax.scipy.special.ndtri(below + share * (above - below))
        return jnp.clip(rate, self.low, self.high)

    def average(self) -> jax.Array:
        """The mean of the truncated law: 0.75 in training, 0.32 with the paper's settings for generation."""
        low, high = self._limits()
        density = [jnp.exp(-jnp.square(limit) / 2) / math.sqrt(2 * math.pi) for limit in (low, high)]
        return self.mean + self.std * (density[0] - density[1]) / (jax.scipy.special.ndtr(high) - jax.scipy.special.ndtr(low))

    def draw(self, key: jax.Array) -> jax.Array:
        """One rate, float32 scalar: of the whole batch, equal on all hosts because the key is."""
        return self.quantile(jax.random.uniform(key))

    def dropped(self, rows: int) -> int:
        """How many of `rows` never reach the encoder; static, so that its length is."""
        return math.ceil(rows * self.low)


class RowMask(NamedTuple):
    """`keep` int32 [B, 1 + n] positions that reach the encoder, ascending; `filled`, `dropped` bool [B, 1 + rows]; token 0 is never masked.

    A filled row shows the first token in place of its own value; a dropped one is left out besides.
    """

    keep: jax.Array
    filled: jax.Array
    dropped: jax.Array


def mask_rows(noise: jax.Array, dropped: int, filled: jax.Array | int) -> RowMask:
    """The `dropped` rows of smallest noise are dropped, the `filled` smallest filled.

    Args:
        noise: float [B, rows].
        dropped: static, below `rows` + 1.
        filled: scalar, may be traced; at least `dropped`.
    """
    order = jnp.argsort(noise, axis=1)
    rank = jnp.argsort(order, axis=1)  # [B, rows]
    first = ((0, 0), (1, 0))
    keep = jnp.pad(jnp.sort(order[:, dropped:], axis=1) + 1, first)  # [B, 1 + rows - dropped]
    return RowMask(keep, jnp.pad(rank < filled, first), jnp.pad(rank < dropped, first))
