"""JPEG files: sizes from the header without decoding, and decoding by libjpeg-turbo (the `simplejpeg` wheel brings it).

Measured on one core for 500x375 at quality 90: 0.49 ms, OpenCV 0.52 ms, PIL 0.60 ms; and unlike OpenCV it is silent where rows below a
crop are left out. EXIF orientation is respected: sizes and arrays are of the upright image.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from maskae.data.spec import BadRecord

JPEG_START = b"\xff\xd8"
JPEG_END = b"\xff\xd9"
SHRINKS = (8, 4, 2, 1)

# Colours at half resolution are interpolated between rows: the last wanted row needs those of the next pair of (decoded) rows.
_ROWS_BELOW = 2
_SEQUENTIAL = (0xC0, 0xC1)  # Huffman-coded, from top to bottom


class JpegHeader(NamedTuple):
    """What a JPEG's markers say before its pixels; height and width are of the upright image."""

    height: int
    width: int
    orientation: int  # EXIF, 1..8; from 5 on the stored image lies on its side
    pixels: int  # offset of the first scan
    components: int  # 1 grey, 3 colour, 4 CMYK
    height_at: int  # offset of the two bytes of the stored height
    top_down: bool  # one scan holds all rows in order, so that the lower ones need not be decoded


def jpeg_header(data: bytes) -> JpegHeader:
    """Reads the markers up to the first scan. Raises BadRecord where they do not make a JPEG."""
    position, orientation, frame = 2, 1, None
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
            if frame is None or body >= len(data):
                raise BadRecord("damaged JPEG: pixels before the size")
            kind, at = frame
            return _header(data, kind, at, orientation, body)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and body + 6 <= len(data):
            frame = marker, body + 1
        elif marker == 0xE1 and data[body : body + 6] == b"Exif\0\0":
            orientation = _exif_orientation(data[body + 6 : position + 2 + length])
        position += 2 + length
    raise BadRecord("truncated JPEG: the header has no end")


def _header(data: bytes, kind: int, height_at: int, orientation: int, scan: int) -> JpegHeader:
    height, width, components = struct.unpack(">HHB", data[height_at : height_at + 5])
    if not 0 < height * width <= 2 * (Image.MAX_IMAGE_PIXELS or 2**28):
        raise BadRecord(f"damaged JPEG: {height} x {width} pixels")  # PIL's limit; a wrong header must not take all memory
    top_down = kind in _SEQUENTIAL and data[scan] == components
    upright = (height, width) if orientation < 5 else (width, height)
    return JpegHeader(*upright, orientation, scan, components, height_at, top_down)


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


def decode_jpeg(data: bytes, header: JpegHeader, grey: bool, shrink: int = 1, bottom: int | None = None) -> np.ndarray:
    """uint8 [H, W, 1 if grey else 3] of a JPEG that is not CMYK.

    Args:
      data: the whole file.
      header: of `jpeg_header`.
      grey: luma only, which is what grey files hold anyway.
      shrink: 1, 2, 4 or 8: decode at 1/shrink of the size, rounded up.
      bottom: only rows above this one of the full-size upright image are wanted; those below may be missing from the array. Saves their
        decoding in ordinary files; a crop's left, right and upper parts cannot be left out, since the code has no marks to start from.

    Raises BadRecord for a damaged file, and for one without an end, whose missing part decoders silently paint grey.
    """
    # In the pixels 0xFF is always followed by 0 or a restart number, so the end marker cannot occur there by chance.
    if data.rfind(JPEG_END, header.pixels) < 0:
        raise BadRecord("truncated JPEG: no end marker")
    stored = (header.height, header.width) if header.orientation < 5 else (header.width, header.height)
    rows, shortened = stored[0], None
    if bottom is not None and header.top_down and header.orientation == 1 and bottom + _ROWS_BELOW * shrink < rows:
        # The decoder stops after as many rows as the header names.
        rows = bottom + _ROWS_BELOW * shrink
        shortened = bytearray(data)
        shortened[header.height_at : header.height_at + 2] = rows.to_bytes(2, "big")
    try:
        image = simplejpeg.decode_jpeg(
            data if shortened is None else shortened,
            "GRAY" if grey else "RGB",
            min_height=-(-rows // shrink),
            min_width=-(-stored[1] // shrink),
            min_factor=shrink,
            strict=False,  # strict refuses files with stray bytes, which every viewer shows
        )
    except ValueError as error:
        raise BadRecord(f"damaged JPEG: {error}") from error
    return _upright(image, header.orientation)


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes EXIF orientation 1..8. uint8 [H, W, C], sides swapped from 5 on."""
    if orientation == 1:
        return image
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)
