"""Class prompts that depend on a domain: learned embeddings among fixed words through a frozen text tower, or learned prototypes.

GM-DF, Lai et al., arXiv 2406.20078, equations 9 to 11: "A [domain] [class] face showing forgery clues". Row 0 of every table is that of an
unknown domain.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.nn.layers import Block, Dtype, LayerNorm
from maskae.nn.stack import run_blocks
from maskae.nn.vit import ACTIVATIONS

PROMPT_STD = 0.02


class PromptLearner(nn.Module):
    """`domain` [domains + 1, D], which gates and temperatures read too, and `class` [classes, D]."""

    domains: int
    classes: int
    width: int

    def setup(self) -> None:
        """Declare the tables."""
        draw = nn.initializers.normal(PROMPT_STD)
        self.domain = self.param("domain", draw, (self.domains + 1, self.width))
        self.class_table = self.param("class", draw, (self.classes, self.width))

    def __call__(self, words: jax.Array, place: int) -> jax.Array:
        """The fixed words' embeddings [L, D], with domain and class put in before word `place` -> [(domains + 1) * classes, L + 2, D]."""
        rows, classes, width = self.domains + 1, self.classes, self.width
        learned = jnp.stack(
            [
                jnp.broadcast_to(self.domain[:, None], (rows, classes, width)),
                jnp.broadcast_to(self.class_table[None], (rows, classes, width)),
            ],
            axis=2,
        ).reshape(rows * classes, 2, width)
        before, after = (jnp.broadcast_to(part, (rows * classes, *part.shape)) for part in (words[:place], words[place:]))
        return jnp.concatenate([before.astype(learned.dtype), learned, after.astype(learned.dtype)], axis=1)


class TextTower(nn.Module):
    """CLIP's text transformer from embeddings on: positions, causal pre-LN blocks with quick GELU, final norm, the last token's projection.

    Parameters: `word_position` [L, D], `block_{i}`, `norm`, `projection/kernel` [D, outputs].
    """

    length: int
    depth: int
    heads: int
    outputs: int
    scan: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, embeddings: jax.Array) -> jax.Array:
        """[K, L, D], the last token that of the end of the text -> [K, outputs], float32."""
        count, width = embeddings.shape[1:]
        position = self.param("word_position", nn.initializers.normal(0.01), (self.length, width))
        x = (embeddings + position[:count]).astype(self.dtype)
        options: dict[str, Any] = {"activation": ACTIVATIONS["quick_gelu"], "epsilon": 1e-5, "dtype": self.dtype}
        blocks = [Block(self.heads, **options, name=f"block_{i}") for i in range(self.depth)]
        causal = jnp.where(jnp.tril(jnp.ones((count, count), bool)), 0.0, -jnp.inf)[None, None]  # [1, 1, L, L]
        x, _ = run_blocks(self, blocks, x, beside=causal, scan=self.scan)
        last = LayerNorm(1e-5, jnp.float32, name="norm")(x)[:, -1]  # [K, D]
        return nn.Dense(self.outputs, use_bias=False, name="projection")(last)
