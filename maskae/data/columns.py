"""The columns of a table whose rows are float32 [N]: codes 0, 1, ... of the categorical columns first, then continuous values."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Columns:
    """`cardinalities`: of the categorical columns, which come first; `continuous`: how many columns follow."""

    cardinalities: tuple[int, ...]
    continuous: int

    @property
    def categorical(self) -> int:
        """Number of categorical columns."""
        return len(self.cardinalities)

    @property
    def count(self) -> int:
        """Number of all columns."""
        return self.categorical + self.continuous

    @property
    def values(self) -> int:
        """Number of the categorical columns' values, all columns together."""
        return sum(self.cardinalities)

    @property
    def offsets(self) -> np.ndarray:
        """int32 [categorical]: where each column's values begin among all columns' values."""
        return np.cumsum((0, *self.cardinalities))[: self.categorical].astype(np.int32)

    def codes(self, table: jax.Array) -> jax.Array:
        """Rows [B, N] -> int32 [B, categorical], each cell's value among all columns' values."""
        return table[:, : self.categorical].astype(jnp.int32) + self.offsets
