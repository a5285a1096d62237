"""Host transforms, named and put together: a config's tuple of (name, arguments) pairs becomes one callable."""

from __future__ import annotations

from typing import Any

import numpy as np


class Transform:
    """Steps applied in order to one image."""

    def __init__(self, steps: tuple[Any, ...] = ()):
        """`steps` are callables (uint8 [H, W, C], generator) -> uint8 [H', W', C']."""
        self.steps = steps

    def __call__(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        for step in self.steps:
            image = step(image, generator)
        return image


def make_transform(steps: tuple[tuple[str, dict[str, Any]], ...]) -> Transform:
    """The transform of a config's (name, arguments) pairs."""
    return Transform(())
