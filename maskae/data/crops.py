"""Which part of an image to take: pure functions of sizes and draws, and the torchvision and MAE rules for the draws."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from maskae.data.images import Box

CROP_ATTEMPTS = 10


def crop_size(area_fraction: float, log_aspect: float, height: int, width: int) -> tuple[int, int]:
    """(height, width) of the crop with that share of the area and that log(width / height), rounded; it may be larger than the image."""
    area, aspect = height * width * area_fraction, math.exp(log_aspect)
    return round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))


def probe_crop_size(area_fraction: float, log_aspect: float, height: int, width: int) -> tuple[int, int]:
    """The crop of MAE's linear probe: one draw, cut to the image instead of drawn again. Returns (height, width)."""
    crop_height, crop_width = crop_size(area_fraction, log_aspect, height, width)
    return min(crop_height, height), min(crop_width, width)


def draw_area_and_aspect(generator: np.random.Generator, scale: Sequence[float], ratio: Sequence[float]) -> tuple[float, float]:
    """(share of the area, uniform in `scale`; log(width / height), uniform between the logarithms of `ratio`)."""
    return generator.uniform(scale[0], scale[1]), generator.uniform(math.log(ratio[0]), math.log(ratio[1]))


def place(generator: np.random.Generator, size: tuple[int, int], height: int, width: int) -> Box:
    """A box of that size anywhere inside the image, all places equally likely."""
    return Box(int(generator.integers(height - size[0] + 1)), int(generator.integers(width - size[1] + 1)), *size)


def central_crop_box(height: int, width: int, ratio: Sequence[float]) -> Box:
    """The largest central box whose width / height lies within `ratio`."""
    size = (height, width)
    if width / height < ratio[0]:
        size = (round(width / ratio[0]), width)
    elif width / height > ratio[1]:
        size = (height, round(height * ratio[1]))
    return Box((height - size[0]) // 2, (width - size[1]) // 2, *size)


def random_crop_box(generator: np.random.Generator, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]) -> Box:
    """torchvision's RandomResizedCrop: up to ten draws until a box fits into the image, then the central crop."""
    for _ in range(CROP_ATTEMPTS):
        size = crop_size(*draw_area_and_aspect(generator, scale, ratio), height, width)
        if 0 < size[0] <= height and 0 < size[1] <= width:
            return place(generator, size, height, width)
    return central_crop_box(height, width, ratio)


def probe_crop_box(generator: np.random.Generator, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]) -> Box:
    """The linear probe's crop: `probe_crop_size` of one draw, placed at random; at least one pixel."""
    size = probe_crop_size(*draw_area_and_aspect(generator, scale, ratio), height, width)
    return place(generator, (max(size[0], 1), max(size[1], 1)), height, width)
