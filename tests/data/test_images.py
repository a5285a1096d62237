"""Decoding: headers, orientation, channels, damaged files, and crops without decoding everything."""

from __future__ import annotations

import io

import numpy as np
import pytest
from pictures import encode, smooth_image
from PIL import Image, ImageOps

from maskae.data.images import Box, Picture
from maskae.data.spec import BadRecord
from maskae.errors import UserError


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3])
def test_orientation_turns_sizes_crops_and_pixels(orientation: int, channels: int) -> None:
    data = encode(smooth_image(48, 80), orientation=orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("L" if channels == 1 else "RGB")
    wanted = np.asarray(upright).reshape(*upright.size[::-1], channels)
    picture = Picture(data, channels)
    assert picture.size == wanted.shape[:2]
    np.testing.assert_allclose(picture.read().astype(int), wanted, atol=6)
    np.testing.assert_allclose(picture.crop(Box(4, 8, 24, 16), 24, 16).astype(int), wanted[4:28, 8:24], atol=6)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_other_formats_are_read(form: str) -> None:
    image = np.repeat(smooth_image(20, 30)[..., :1] // 64 * 64, 3, axis=-1)
    np.testing.assert_array_equal(Picture(encode(image, form), 3).read(), image)


def test_grey_and_16_bit_and_transparent_files_become_what_is_asked_for() -> None:
    grey = smooth_image(8, 9)[..., 0]
    for channels in (1, 3):
        for data in (encode(grey, "PNG"), encode(grey.astype(np.uint16) * 257, "PNG")):
            np.testing.assert_array_equal(Picture(data, channels).read(), np.repeat(grey[..., None], channels, -1))
        np.testing.assert_allclose(Picture(encode(grey), channels).read().astype(int), np.repeat(grey[..., None], channels, -1), atol=4)
    transparent = np.concatenate([smooth_image(8, 9), np.full((8, 9, 1), 7, np.uint8)], axis=-1)
    np.testing.assert_array_equal(Picture(encode(transparent, "PNG"), 3).read(), transparent[..., :3])


def test_channels_that_cannot_be_made_are_a_clear_error() -> None:
    with pytest.raises(UserError, match="5 channels cannot be made one with 3"):
        Picture(np.zeros((4, 4, 5), np.uint8), 3).read()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"these are words, not pixels", "not an image file"),
        (b"", "not an image file"),
        (encode(smooth_image(64, 64))[:-700], "truncated JPEG: no end marker"),
        (encode(smooth_image(64, 64))[:100], "truncated JPEG: the header has no end"),
        (encode(smooth_image(64, 64), "PNG")[:-700], "truncated"),
        (b"\xff\xd8" + b"garbage" * 20, "damaged JPEG"),
    ],
)
def test_damaged_files_are_bad_records(data: bytes, reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        Picture(data, 3).read()


def test_a_thumbnail_does_not_hide_that_a_jpeg_is_truncated() -> None:
    whole = encode(smooth_image(64, 64))
    thumbnail = encode(smooth_image(8, 8))
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    assert Picture(whole[:2] + segment + whole[2:], 3).size == (64, 64)
    with pytest.raises(BadRecord, match="no end marker"):
        Picture((whole[:2] + segment + whole[2:])[:-400], 3).read()


@pytest.mark.parametrize(("box", "side"), [(Box(3, 5, 61, 67), 28), (Box(10, 21, 133, 131), 28), (Box(1, 2, 255, 301), 30)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_crop_decoded_small_equals_one_decoded_whole(box: Box, side: int, channels: int) -> None:
    picture = Picture(encode(smooth_image(257, 305)), channels)
    shrinks = []
    whole = Picture(picture.read(), channels).crop(box, side, side)
    read = picture.read
    picture.read = lambda shrink=1, bottom=None: shrinks.append(shrink) or read(shrink, bottom)  # type: ignore[method-assign,func-returns-value]
    small = picture.crop(box, side, side)
    assert shrinks == [min(s for s in (8, 4, 2, 1) if min(box.height, box.width) / side >= s and s * 2 > min(box.height, box.width) / side)]
    assert small.shape == (side, side, channels)
    difference = np.abs(small.astype(int) - whole)
    assert difference.mean() < 1.0
    assert difference.max() <= 10


def test_a_small_crop_is_decoded_at_full_size() -> None:
    image = smooth_image(100, 120)
    np.testing.assert_array_equal(Picture(image, 3).crop(Box(10, 20, 30, 40), 30, 40), image[10:40, 20:60])


def test_a_crop_does_not_look_beyond_its_box() -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    image[10:20, 10:20] = 200
    np.testing.assert_array_equal(Picture(image, 3).crop(Box(10, 10, 10, 10), 23, 17), np.full((23, 17, 3), 200))


def test_cmyk_files_are_read_as_pil_reads_them() -> None:
    target = io.BytesIO()
    Image.fromarray(smooth_image(40, 56)).convert("CMYK").save(target, "JPEG", quality=95)
    wanted = np.asarray(Image.open(target).convert("RGB"))
    np.testing.assert_array_equal(Picture(target.getvalue(), 3).read(), wanted)
