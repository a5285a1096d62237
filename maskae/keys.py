"""Random keys by purpose."""

from __future__ import annotations

import zlib

import jax


def purpose_key(key: jax.Array, purpose: str) -> jax.Array:
    """An independent key for one named use of `key`; naming the use keeps it the same when other uses come and go."""
    return jax.random.fold_in(key, zlib.crc32(purpose.encode()))
