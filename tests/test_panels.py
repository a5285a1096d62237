"""Panel sheets: the pixels that are shown, enlargement, titles, channel counts."""

from __future__ import annotations

import numpy as np
import pytest

from maskae.panels import GAP, MARGIN, SMALLEST_SIDE, TITLES, panel_sheet, to_pixels

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def normalised(pixels: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, 3] -> float32 as the model sees them."""
    return ((pixels / 255 - np.asarray(MEAN)) / np.asarray(STD)).astype(np.float32)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_normalisation_is_undone_exactly() -> None:
    pixels = noise(4, 16, 16, 3)
    np.testing.assert_array_equal(to_pixels(normalised(pixels), MEAN, STD), pixels)


def test_out_of_range_is_clipped_and_nan_is_black() -> None:
    images = np.asarray([-9.0, 9.0, np.nan, 0.0]).reshape(1, 1, 4, 1)
    assert to_pixels(images, (0.5,), (0.25,))[0, 0].tolist() == [[0] * 3, [255] * 3, [0] * 3, [128] * 3]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_every_channel_count_can_be_shown(channels: int) -> None:
    pixels = noise(2, 5, 5, channels)
    shown = to_pixels(pixels / 255, (0.0,) * channels, (1.0,) * channels)
    assert shown.shape == (2, 5, 5, 3) and shown.dtype == np.uint8
    if channels == 1:
        np.testing.assert_array_equal(shown, np.repeat(pixels, 3, axis=-1))
    else:
        kept = min(channels, 3)
        np.testing.assert_array_equal(shown[..., :kept], pixels[..., :kept])
        assert channels != 2 or not shown[..., 2].any()


def test_sheet_holds_each_picture_enlarged_pixel_by_pixel() -> None:
    columns = {name: noise(3, 8, 8, 3) for name in ("original", "masked")}
    columns["masked"] = columns["masked"][::-1]
    sheet = panel_sheet({name: normalised(pixels) for name, pixels in columns.items()}, mean=MEAN, std=STD, rows=2)
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3
    scale = SMALLEST_SIDE // 8
    side = 8 * scale
    bottom = sheet.shape[0] - MARGIN
    for column, pixels in enumerate(columns.values()):
        left = MARGIN + column * (side + GAP)
        for row in range(2):
            top = bottom - (2 - row) * side - (1 - row) * GAP
            expected = pixels[row].repeat(scale, axis=0).repeat(scale, axis=1)
            np.testing.assert_array_equal(sheet[top : top + side, left : left + side], expected)


def test_large_pictures_are_not_enlarged() -> None:
    sheet = panel_sheet({"original": np.zeros((1, 224, 224, 3))}, mean=MEAN, std=STD)
    assert sheet.shape[1] == 224 + 2 * MARGIN


def test_titles_and_caption_are_drawn() -> None:
    picture = np.zeros((1, 8, 8, 3))
    with_title = panel_sheet({"original": picture}, mean=MEAN, std=STD)
    without = panel_sheet({"": picture}, mean=MEAN, std=STD)
    band = slice(0, with_title.shape[0] - MARGIN - SMALLEST_SIDE)
    assert (without[band] == 255).all() and (with_title[band] < 128).any()
    captioned = panel_sheet({"original": picture}, mean=MEAN, std=STD, caption="a caption that is much too long for a line of this width")
    assert captioned.shape[0] > with_title.shape[0] and captioned.shape[1] == with_title.shape[1]


def test_prediction_with_the_hidden_statistics_is_labelled_as_such() -> None:
    assert "own mean/std" in TITLES["prediction_with_patch_statistics"] and "raw" in TITLES["prediction"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "one shape"),
        ({"a": np.zeros((1, 4, 4, 3)), "b": np.zeros((1, 4, 8, 3))}, "one shape"),
        ({"a": np.zeros((0, 4, 4, 3))}, "no example"),
        ({"a": np.zeros((4, 4, 3))}, r"\[B, H, W, C\]"),
        ({"a": np.zeros((1, 4, 4, 5))}, "5 channels, but 3 means"),
    ],
)
def test_wrong_shapes_are_refused(columns: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        panel_sheet(columns, mean=MEAN, std=STD)
