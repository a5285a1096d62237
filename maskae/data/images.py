"""Image files to arrays: headers first, then no more decoding than the crop needs.

JPEG files are decoded by libjpeg-turbo (at a smaller size where the crop allows it, without the rows below the crop), everything else by
PIL. EXIF orientation is respected: sizes and boxes are of the upright image. A file that cannot be decoded to its end raises `BadRecord`.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from maskae.data.jpeg import JPEG_START, SHRINKS, decode_jpeg, jpeg_header
from maskae.data.resizing import Region, resize
from maskae.data.spec import BadRecord
from maskae.errors import UserError

# The pipeline has its own threads; OpenCV's would fight them for the same cores.
cv2.setNumThreads(0)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")

CMYK_COMPONENTS = 4


class Box(NamedTuple):
    """A rectangle in pixels of the upright image."""

    top: int
    left: int
    height: int
    width: int


def to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [H, W, c] -> [H, W, channels]: grey to RGB by repeating, RGB to grey by luma, alpha dropped. Raises UserError for others."""
    have = image.shape[-1]
    if have in (2, 4) and channels in (1, 3):
        image, have = image[..., : have - 1], have - 1
    if have == channels:
        return image
    if (have, channels) == (1, 3):
        return np.repeat(image, 3, axis=-1)
    if (have, channels) == (3, 1):
        return cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)[..., None]
    raise UserError(f"an image with {have} channels cannot be made one with {channels}")


@dataclass
class Picture:
    """An image that is decoded when a step knows which part of it is needed, and at which size.

    Attributes:
      data: the bytes of an image file, or uint8 [H, W, c].
      channels: what every array read from it has.
    """

    data: bytes | np.ndarray
    channels: int

    def __post_init__(self) -> None:
        self._jpeg = jpeg_header(self.data) if isinstance(self.data, bytes) and self.data[:2] == JPEG_START else None
        if self._jpeg is not None and self._jpeg.components == CMYK_COMPONENTS:
            self._jpeg = None  # rare; PIL knows how they are turned into RGB
        if isinstance(self.data, bytes) and self._jpeg is None:
            self.data = _decode_with_pil(self.data, self.channels)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the upright image; for a JPEG without decoding it."""
        if self._jpeg is not None:
            return self._jpeg.height, self._jpeg.width
        assert isinstance(self.data, np.ndarray)
        return self.data.shape[0], self.data.shape[1]

    def read(self, shrink: int = 1, bottom: int | None = None) -> np.ndarray:
        """uint8 [H, W, channels]; a JPEG at 1/shrink of its size (1, 2, 4 or 8; rounded up), anything else always at full size.

        Rows from `bottom` of the full size on may be missing.
        """
        if isinstance(self.data, np.ndarray):
            return to_channels(self.data, self.channels)
        assert self._jpeg is not None
        return to_channels(decode_jpeg(self.data, self._jpeg, self.channels == 1, shrink, bottom), self.channels)

    def crop(self, box: Box, height: int, width: int, interpolation: str = "bicubic") -> np.ndarray:
        """The box cut out and resized to uint8 [height, width, channels]; a JPEG is decoded at 1/2, 1/4 or 1/8 where that is enough."""
        image, shrink = self._decode_for(min(box.height / height, box.width / width), box.top + box.height)
        top, left = box.top / shrink, box.left / shrink
        bottom, right = (box.top + box.height) / shrink, (box.left + box.width) / shrink
        # Cut at whole pixels around the box first: the filter must not look at pixels that a crop has removed.
        y, x = int(top), int(left)
        part = image[y : math.ceil(bottom), x : math.ceil(right)]
        return resize(part, height, width, interpolation, (left - x, top - y, right - x, bottom - y))

    def window(self, region: Region, height: int, width: int, interpolation: str = "bicubic") -> np.ndarray:
        """The region resized to uint8 [height, width, channels]: the same as a part of the whole image resized."""
        image, shrink = self._decode_for(min((region[3] - region[1]) / height, (region[2] - region[0]) / width), None)
        left, top, right, bottom = (edge / shrink for edge in region)
        return resize(image, height, width, interpolation, (left, top, right, bottom))

    def _decode_for(self, excess: float, bottom: int | None) -> tuple[np.ndarray, int]:
        """(image, shrink): decoded as small as it may be where `excess` times more pixels are stored than wanted, along a side."""
        shrink = next(s for s in SHRINKS if excess >= s or s == 1) if self._jpeg is not None else 1
        return self.read(shrink, bottom), shrink


def _decode_with_pil(data: bytes, channels: int) -> np.ndarray:
    """uint8 [H, W, channels] of any file PIL reads; 16-bit grey is scaled to 8. Raises BadRecord."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as opened:
            warnings.simplefilter("ignore")  # notes on odd metadata, one per file
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I") or image.mode == "F":
                values: np.ndarray = np.asarray(image, np.float64)
                scale = 257 if float(np.max(values, initial=0.0)) > 255 else 1
                return to_channels(np.clip(values / scale, 0, 255).astype(np.uint8)[..., None], channels)
            array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except UnidentifiedImageError as error:
        raise BadRecord("not an image file") from error
    # PIL reports damaged files by any of these, depending on the format.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise BadRecord(str(error) or type(error).__name__) from error
    return to_channels(array[..., None] if array.ndim == 2 else array, channels)
