"""Decoding without the rows below a crop changes no pixel above, and headers that cannot be right are refused."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import simplejpeg
from pictures import encode, smooth_image
from PIL import Image

from maskae.data import jpeg
from maskae.data.jpeg import decode_jpeg, jpeg_header
from maskae.data.spec import BadRecord


def noisy(height: int = 210, width: int = 173) -> np.ndarray:
    """Pixels of which each matters: an error of one row shows."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(image: np.ndarray, **arguments: object) -> bytes:
    target = io.BytesIO()
    Image.fromarray(image).save(target, "JPEG", quality=90, **arguments)
    return target.getvalue()


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
@pytest.mark.parametrize("grey", [False, True])
def test_rows_above_the_bottom_are_those_of_the_whole_image(subsampling: str, shrink: int, grey: bool) -> None:
    data = simplejpeg.encode_jpeg(noisy(), quality=90, colorsubsampling=subsampling)
    header = jpeg_header(data)
    whole = decode_jpeg(data, header, grey, shrink)
    assert whole.shape == (-(-210 // shrink), -(-173 // shrink), 1 if grey else 3)
    for bottom in range(1, 211):
        part = decode_jpeg(data, header, grey, shrink, bottom)
        rows = -(-bottom // shrink)
        assert rows <= len(part) <= len(whole)
        np.testing.assert_array_equal(part[:rows], whole[:rows])
    assert len(decode_jpeg(data, header, grey, shrink, 50)) < 0.5 * len(whole), "the lower rows must be left out"


def test_files_whose_rows_do_not_come_in_order_are_decoded_whole(capfd: pytest.CaptureFixture[str]) -> None:
    progressive, turned = saved(noisy(), progressive=True), encode(noisy(), orientation=6)
    for data in (progressive, turned):
        header = jpeg_header(data)
        np.testing.assert_array_equal(decode_jpeg(data, header, False, 1, 20), decode_jpeg(data, header, False))
    plain = saved(noisy())
    assert len(decode_jpeg(plain, jpeg_header(plain), False, 1, 20)) < 100
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("height", "width"), [(0, 40), (40, 0), (65535, 65535)])
def test_sizes_that_cannot_be_right_are_damage(height: int, width: int) -> None:
    data = encode(smooth_image(40, 40))
    at = jpeg_header(data).height_at
    with pytest.raises(BadRecord, match=f"{height} x {width} pixels"):
        jpeg_header(data[:at] + struct.pack(">HH", height, width) + data[at + 4 :])


def test_damage_in_the_tables_is_named() -> None:
    data = encode(smooth_image(40, 40))
    at = data.index(b"\xff\xc4") + 4
    broken = data[:at] + bytes([0xFF] * 20) + data[at + 20 :]
    with pytest.raises(BadRecord, match="damaged JPEG"):
        decode_jpeg(broken, jpeg_header(broken), False)


def test_the_margin_below_the_crop_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(noisy(), subsampling="4:2:0")
    header = jpeg_header(data)
    monkeypatch.setattr(jpeg, "_ROWS_BELOW", 0)
    whole, part = decode_jpeg(data, header, False), decode_jpeg(data, header, False, 1, 64)
    assert not np.array_equal(part[:64], whole[:64]), "colours of the last row come from the next block"
