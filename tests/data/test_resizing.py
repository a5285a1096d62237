"""Resizing has PIL's filters, in any number of channels, for the whole image and for a region of it."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from maskae.data import resizing
from maskae.data.resizing import INTERPOLATIONS, Region, resize
from maskae.errors import UserError


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """uint8 [375, 500, 3]."""
    return np.ascontiguousarray(load_sample_image("china.jpg")[20:395, 70:570])


def pil(image: np.ndarray, height: int, width: int, interpolation: str, region: Region | None = None) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), INTERPOLATIONS[interpolation], region))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("region", [None, (10.0, 20.0, 310.0, 320.0), (10.3, 20.6, 499.9, 374.7), (100.0, 100.0, 180.0, 190.0)])
def test_photographs_equal_pils(photograph: np.ndarray, interpolation: str, region: Region | None) -> None:
    difference = np.abs(resize(photograph, 224, 224, interpolation, region).astype(int) - pil(photograph, 224, 224, interpolation, region))
    assert difference.mean() < 0.3
    assert (difference <= 1).mean() > 0.995
    assert difference.max() <= 16


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_where_the_wheel_is_missing_pil_resizes(photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    image = np.concatenate([photograph, photograph], -1)[..., :channels]
    region = (10.3, 20.6, 499.9, 374.7)
    fast = resize(image, 60, 70, region=region)
    monkeypatch.setattr(resizing, "simd", None)
    slow = resize(image, 60, 70, region=region)
    assert slow.shape == fast.shape == (60, 70, channels)
    assert (np.abs(slow.astype(int) - fast) <= 1).mean() > 0.99
    if channels == 3:
        np.testing.assert_array_equal(slow, pil(image, 60, 70, "bicubic", region))


def test_nearest_takes_pils_pixels(photograph: np.ndarray) -> None:
    np.testing.assert_array_equal(resize(photograph, 50, 60, "nearest"), pil(photograph, 50, 60, "nearest"))


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_channels_do_not_touch_each_other(photograph: np.ndarray, channels: int) -> None:
    image = np.random.default_rng(0).permutation(np.concatenate([photograph, photograph], -1)[..., :channels], axis=1)
    wanted = np.concatenate([resize(image[..., c : c + 1], 31, 37) for c in range(channels)], axis=-1)
    np.testing.assert_allclose(resize(image, 31, 37).astype(int), wanted, atol=1)


def test_a_region_that_ends_at_the_border_in_floating_point() -> None:
    image = np.random.default_rng(0).integers(0, 256, (17, 29, 3), dtype=np.uint8)
    for denominator in range(2, 60):
        left, top = 29 / denominator, 17 / denominator
        assert resize(image, 5, 6, region=(left, top, left + (29 - left), top + (17 - top))).shape == (5, 6, 3)


def test_threads_do_not_share_buffers(photograph: np.ndarray) -> None:
    wanted = {side: resize(photograph, side, side) for side in (40, 90, 200)}
    wrong: list[int] = []

    def work(side: int) -> None:
        wrong.extend(side for _ in range(20) if not np.array_equal(resize(photograph, side, side), wanted[side]))

    threads = [threading.Thread(target=work, args=(side,)) for side in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_unchanged_size_keeps_the_pixels_and_unknown_filters_are_an_error(photograph: np.ndarray) -> None:
    assert resize(photograph, 375, 500) is photograph
    with pytest.raises(UserError, match=r"unknown interpolation 'bicubik' \(did you mean 'bicubic'\?\)"):
        resize(photograph, 8, 8, "bicubik")
