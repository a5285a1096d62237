"""Small image files to read."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def smooth_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3] with structure that survives JPEG: a few waves of colour."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 64.0
    waves = [np.sin(generator.uniform(1, 4) * x + generator.uniform(1, 4) * y + generator.uniform(0, 6)) for _ in range(3)]
    return (np.stack(waves, axis=-1) * 110 + 128).astype(np.uint8)


def encode(image: np.ndarray, form: str = "JPEG", orientation: int | None = None) -> bytes:
    """The bytes of an image file, with an EXIF orientation where one is given."""
    target = io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    arguments = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(form, {})
    Image.fromarray(image).save(target, form, exif=exif, **arguments)
    return target.getvalue()
