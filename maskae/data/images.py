"""Image files to arrays: headers first, then no more decoding than the crop needs.

JPEG files are decoded by OpenCV (a smaller decoding size where the crop allows it), everything else by PIL. Resizing is PIL's, which
smooths when it shrinks as the papers' transforms do; OpenCV's does not. EXIF orientation is respected: sizes and boxes are of the upright
image. A file that cannot be decoded to its end raises `BadRecord`.
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

from maskae.data.spec import BadRecord
from maskae.errors import UserError, nearest

# The pipeline has its own threads; OpenCV's would fight them for the same cores.
cv2.setNumThreads(0)

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")

_JPEG_START = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"
_REDUCED = {
    (3, 1): cv2.IMREAD_COLOR,
    (3, 2): cv2.IMREAD_REDUCED_COLOR_2,
    (3, 4): cv2.IMREAD_REDUCED_COLOR_4,
    (3, 8): cv2.IMREAD_REDUCED_COLOR_8,
    (1, 1): cv2.IMREAD_GRAYSCALE,
    (1, 2): cv2.IMREAD_REDUCED_GRAYSCALE_2,
    (1, 4): cv2.IMREAD_REDUCED_GRAYSCALE_4,
    (1, 8): cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


Region = tuple[float, float, float, float]  # left, top, right, bottom in pixels, fractions allowed


class Box(NamedTuple):
    """A rectangle in pixels of the upright image."""

    top: int
    left: int
    height: int
    width: int


class JpegHeader(NamedTuple):
    """What a JPEG's markers say before its pixels; height and width are of the upright image."""

    height: int
    width: int
    orientation: int  # EXIF, 1..8; from 5 on the stored image lies on its side
    pixels: int  # offset of the first scan


def interpolation_filter(name: str) -> Image.Resampling:
    """PIL's filter of that name. Raises UserError for an unknown one."""
    if name not in INTERPOLATIONS:
        raise UserError(f"unknown interpolation '{name}'{nearest(name, INTERPOLATIONS)}; there are {', '.join(INTERPOLATIONS)}")
    return INTERPOLATIONS[name]


def jpeg_header(data: bytes) -> JpegHeader:
    """Reads the markers up to the first scan. Raises BadRecord where they do not make a JPEG."""
    position, orientation, size = 2, 1, None
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            raise BadRecord(f"damaged JPEG: no marker at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        body = position + 4
        if marker == 0xDA:
            if size is None:
                raise BadRecord("damaged JPEG: pixels before the size")
            height, width = size if orientation < 5 else size[::-1]
            return JpegHeader(height, width, orientation, body)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and body + 5 <= len(data):
            size = struct.unpack(">HH", data[body + 1 : body + 5])
        elif marker == 0xE1 and data[body : body + 6] == b"Exif\0\0":
            orientation = _exif_orientation(data[body + 6 : position + 2 + length])
        position += 2 + length
    raise BadRecord("truncated JPEG: the header has no end")


def _exif_orientation(block: bytes) -> int:
    """Tag 0x0112 of the first directory, 1 where there is none or the block is damaged (as image viewers do)."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None or len(block) < 8:
        return 1
    (start,) = struct.unpack(order + "I", block[4:8])
    if start + 2 > len(block):
        return 1
    (count,) = struct.unpack(order + "H", block[start : start + 2])
    for entry in range(start + 2, min(start + 2 + 12 * count, len(block) - 11), 12):
        tag, _, _, value = struct.unpack(order + "HHIH", block[entry : entry + 10])
        if tag == 0x0112:
            return value if 1 <= value <= 8 else 1
    return 1


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


def resize(image: np.ndarray, height: int, width: int, interpolation: str = "bicubic", region: Region | None = None) -> np.ndarray:
    """uint8 [H, W, C] -> [height, width, C], smoothed where it shrinks.

    `region` is what to scale instead of the whole image. Pixels beyond it still enter the filter at its border, so the result equals the
    same part of the whole image resized.
    """
    chosen = interpolation_filter(interpolation)
    if image.shape[:2] == (height, width) and region in (None, (0, 0, width, height)):
        return image
    if image.shape[-1] == 3:
        return np.asarray(Image.fromarray(image).resize((width, height), chosen, region))
    # One by one: PIL knows no other channel counts, and would weight four channels by the last one.
    planes = [Image.fromarray(image[..., c]).resize((width, height), chosen, region) for c in range(image.shape[-1])]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


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
        self._jpeg = jpeg_header(self.data) if isinstance(self.data, bytes) and self.data[:2] == _JPEG_START else None
        if isinstance(self.data, bytes) and self._jpeg is None:
            self.data = _decode_with_pil(self.data, self.channels)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the upright image; for a JPEG without decoding it."""
        if self._jpeg is not None:
            return self._jpeg.height, self._jpeg.width
        assert isinstance(self.data, np.ndarray)
        return self.data.shape[0], self.data.shape[1]

    def read(self, shrink: int = 1) -> np.ndarray:
        """uint8 [H, W, channels]; a JPEG at 1/shrink of its size (1, 2, 4 or 8; rounded up), anything else always at full size."""
        if isinstance(self.data, np.ndarray):
            return to_channels(self.data, self.channels)
        assert self._jpeg is not None
        return _decode_jpeg(self.data, self._jpeg, self.channels, shrink)

    def crop(self, box: Box, height: int, width: int, interpolation: str = "bicubic") -> np.ndarray:
        """The box cut out and resized to uint8 [height, width, channels]; a JPEG is decoded at 1/2, 1/4 or 1/8 where that is enough."""
        image, shrink = self._decode_for(min(box.height / height, box.width / width))
        top, left = box.top / shrink, box.left / shrink
        bottom, right = (box.top + box.height) / shrink, (box.left + box.width) / shrink
        # Cut at whole pixels around the box first: the filter must not look at pixels that a crop has removed.
        y, x = int(top), int(left)
        part = np.ascontiguousarray(image[y : math.ceil(bottom), x : math.ceil(right)])
        return resize(part, height, width, interpolation, (left - x, top - y, right - x, bottom - y))

    def window(self, region: Region, height: int, width: int, interpolation: str = "bicubic") -> np.ndarray:
        """The region resized to uint8 [height, width, channels]: the same as a part of the whole image resized."""
        image, shrink = self._decode_for(min((region[3] - region[1]) / height, (region[2] - region[0]) / width))
        left, top, right, bottom = (edge / shrink for edge in region)
        return resize(image, height, width, interpolation, (left, top, right, bottom))

    def _decode_for(self, excess: float) -> tuple[np.ndarray, int]:
        """(image, shrink): decoded as small as it may be where `excess` times more pixels are stored than wanted, along a side."""
        shrink = next(s for s in (8, 4, 2, 1) if excess >= s or s == 1) if self._jpeg is not None else 1
        return self.read(shrink), shrink


def _decode_jpeg(data: bytes, header: JpegHeader, channels: int, shrink: int) -> np.ndarray:
    """uint8 [H, W, channels]. Raises BadRecord for a file without an end, whose missing part decoders silently paint grey."""
    # In the pixels 0xFF is always followed by 0 or a restart number, so the end marker cannot occur there by chance.
    if data.find(_JPEG_END, header.pixels) < 0:
        raise BadRecord("truncated JPEG: no end marker")
    wanted = 1 if channels == 1 else 3
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _REDUCED[wanted, shrink])
    except cv2.error as error:
        raise BadRecord(f"damaged JPEG: {error.err}") from error
    if image is None:
        raise BadRecord("damaged JPEG")
    if wanted == 1:
        return image[..., None]
    return to_channels(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), channels)


def _decode_with_pil(data: bytes, channels: int) -> np.ndarray:
    """uint8 [H, W, channels] of any file PIL reads; 16-bit grey is scaled to 8. Raises BadRecord."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as opened:
            warnings.simplefilter("ignore")  # notes on odd metadata, one per file
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I") or image.mode == "F":
                values = np.asarray(image, np.float64)
                scale = 257 if values.max(initial=0) > 255 else 1
                return to_channels(np.clip(values / scale, 0, 255).astype(np.uint8)[..., None], channels)
            array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except UnidentifiedImageError as error:
        raise BadRecord("not an image file") from error
    # PIL reports damaged files by any of these, depending on the format.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise BadRecord(str(error) or type(error).__name__) from error
    return to_channels(array[..., None] if array.ndim == 2 else array, channels)
