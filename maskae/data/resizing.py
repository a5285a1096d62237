"""Resizing that smooths where it shrinks, with PIL's filters: the arithmetic of the papers' transforms, at a fifth of PIL's time.

The `cykooz_resizer` wheel (the Rust crate fast_image_resize, written with SIMD and free of the interpreter lock) has PIL's filters and
8-bit intermediate values, but filters rows and columns in the other order. On photographs 87 % of the values equal PIL's, 99.9 % are
within 1 of 255, and the mean difference is 0.13. OpenCV is no replacement: its bilinear and bicubic do not smooth, its area mode is a box.
The wheel is not made for Linux on Arm; where it is missing, PIL itself resizes.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
from PIL import Image

from maskae.errors import check_choice

try:
    import cykooz_resizer as simd
except ImportError:
    simd = None

Region = tuple[float, float, float, float]  # left, top, right, bottom in pixels, fractions allowed

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_FILTERS = {"bilinear": "bilinear", "bicubic": "catmull_rom", "lanczos": "lanczos3"}  # a = -0.5 and 3 lobes, as PIL's
_PIXELS = {1: "U8", 2: "U8x2", 3: "U8x3", 4: "U8x4"}

# A resizer keeps its buffers from call to call, so threads must not share one.
_thread = threading.local()


def interpolation_filter(name: str) -> Image.Resampling:
    """PIL's filter of that name. Raises UserError for an unknown one."""
    check_choice("interpolation", name, INTERPOLATIONS)
    return INTERPOLATIONS[name]


def resize(image: np.ndarray, height: int, width: int, interpolation: str = "bicubic", region: Region | None = None) -> np.ndarray:
    """uint8 [H, W, C] -> [height, width, C], smoothed where it shrinks; read-only where it is not the image itself.

    `region` is what to scale instead of the whole image. Pixels beyond it still enter the filter at its border, so the result equals the
    same part of the whole image resized. Raises UserError for an unknown interpolation.
    """
    interpolation_filter(interpolation)
    if region == (0, 0, image.shape[1], image.shape[0]):
        region = None
    if image.shape[:2] == (height, width) and region is None:
        return image
    channels = image.shape[-1]
    if simd is None or channels not in _PIXELS:
        return _resize_with_pil(image, height, width, interpolation, region)
    pixels = simd.PixelType[_PIXELS[channels]]
    box = None if region is None else _crop_box(region, image.shape[0], image.shape[1])
    name = _FILTERS.get(interpolation)
    algorithm = simd.ResizeAlg.convolution(simd.FilterType[name]) if name else simd.ResizeAlg.nearest()
    if not hasattr(_thread, "resizer"):
        _thread.resizer = simd.Resizer()
    source, target = simd.ImageData(image.shape[1], image.shape[0], pixels, image.tobytes()), simd.ImageData(width, height, pixels)
    # Without use_alpha=False four channels would be weighted by the last one.
    _thread.resizer.resize(source, target, simd.ResizeOptions(algorithm, use_alpha=False, crop_box=box))
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(height, width, channels)


def _resize_with_pil(image: np.ndarray, height: int, width: int, interpolation: str, region: Region | None) -> np.ndarray:
    """Channel by channel where there are not three: PIL knows no other counts, and would weight four channels by the last one."""
    parts = [image] if image.shape[-1] == 3 else [image[..., c] for c in range(image.shape[-1])]
    chosen = INTERPOLATIONS[interpolation]
    resized = [np.asarray(Image.fromarray(np.ascontiguousarray(part)).resize((width, height), chosen, region)) for part in parts]
    return resized[0] if image.shape[-1] == 3 else np.stack(resized, axis=-1)


def _crop_box(region: Region, height: int, width: int) -> Any:
    """The region as a place and a size that, added up in floating point, do not reach past the image (which is an error)."""
    left, top, right, bottom = region
    wide, tall = right - left, bottom - top
    while left + wide > width and wide > 0:
        wide = math.nextafter(min(wide, width - left), 0)
    while top + tall > height and tall > 0:
        tall = math.nextafter(min(tall, height - top), 0)
    return simd.CropBox(left, top, wide, tall)
