"""Device views: what each does, Pillow's resizing, and draws that depend on the example's number alone."""

from __future__ import annotations

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maskae.errors import UserError
from maskae.nn import augmentations as views

KEY = jax.random.key(3)
EXAMPLE = jnp.arange(4)
IMAGES = jax.random.uniform(jax.random.key(0), (4, 16, 20, 3))


@pytest.mark.parametrize(
    ("method", "kind", "size"),
    [("bilinear", Image.Resampling.BILINEAR, (6, 7)), ("bicubic", Image.Resampling.BICUBIC, (9, 30))],
)
def test_a_crop_is_resized_as_pillow_does(method: str, kind: Image.Resampling, size: tuple[int, int]) -> None:
    boxes = jnp.asarray([[2, 3, 11, 13], [0, 0, 16, 20], [5, 4, 3, 9], [1, 1, 4, 4]])
    ours = np.asarray(views.resized_boxes(IMAGES, boxes, size, method))
    for image, box, found in zip(np.asarray(IMAGES), np.asarray(boxes), ours, strict=True):
        cut = image[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
        planes = [np.asarray(Image.fromarray(cut[..., c], mode="F").resize(size[::-1], kind)) for c in range(3)]
        np.testing.assert_allclose(found, np.stack(planes, -1), atol=2e-5)


def test_crop_boxes_lie_inside_with_the_wanted_area_and_aspect() -> None:
    boxes = np.asarray(jax.jit(views.draw_crop_boxes, static_argnums=(2, 3, 4))(jnp.arange(400), KEY, (50, 70), (0.2, 0.6), (0.5, 2.0)))
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 50).all() and (left + width <= 70).all()
    area = height * width / 3500
    assert 0.18 < area.min() < 0.25 and 0.55 < area.max() < 0.63
    assert 0.45 < (width / height).min() < 0.6 and 1.7 < (width / height).max() < 2.2
    impossible = np.asarray(views.draw_crop_boxes(EXAMPLE, KEY, (10, 100), (0.9, 1.0)))
    np.testing.assert_array_equal(impossible, [[0, 43, 10, 13]] * 4)  # torchvision's central crop


def test_draws_follow_the_number_of_the_example() -> None:
    order = jnp.asarray([2, 0, 3, 1])
    same = jnp.broadcast_to(IMAGES[:1], IMAGES.shape)

    def view(images: jax.Array, example: jax.Array) -> jax.Array:
        x = views.random_resized_crop(images, example, KEY, 12, (0.3, 1.0))
        x = views.color_jitter(x, example, KEY, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        return views.gaussian_noise(views.gaussian_blur(x, example, KEY, probability=1.0), example, KEY)

    jitted = jax.jit(view)
    straight = jitted(IMAGES, EXAMPLE)
    np.testing.assert_allclose(jitted(IMAGES[order], order), straight[order], atol=1e-6)
    once = np.asarray(jitted(same, jnp.zeros_like(EXAMPLE)))
    np.testing.assert_array_equal(once, once[:1].repeat(4, 0))
    assert np.abs(np.asarray(jitted(same, EXAMPLE))[0] - np.asarray(jitted(same, EXAMPLE))[1]).max() > 0.05


def test_jitter_steps_are_those_of_torchvision() -> None:
    half = jnp.full(4, 0.5)
    grey = np.asarray(IMAGES) @ np.asarray(views.LUMA)
    np.testing.assert_allclose(views.adjust(IMAGES, "brightness", half), IMAGES / 2, atol=1e-6)
    np.testing.assert_allclose(views.adjust(IMAGES, "saturation", 0 * half), np.repeat(grey[..., None], 3, -1), atol=1e-6)
    mean = grey.mean((1, 2))[:, None, None, None]
    np.testing.assert_allclose(views.adjust(IMAGES, "contrast", half), mean + (IMAGES - mean) / 2, atol=1e-6)
    turned = np.asarray(views.adjust(IMAGES, "hue", 0.3 * jnp.ones(4)))[0, 0]
    for rgb, found in zip(np.asarray(IMAGES)[0, 0], turned, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
        np.testing.assert_allclose(found, colorsys.hsv_to_rgb((hue + 0.3) % 1, saturation, value), atol=1e-5)


def test_jitter_without_strength_or_luck_changes_nothing() -> None:
    np.testing.assert_array_equal(views.color_jitter(IMAGES, EXAMPLE, KEY), IMAGES)
    never = views.color_jitter(IMAGES, EXAMPLE, KEY, brightness=0.8, hue=0.2, probability=0.0, order="fixed")
    np.testing.assert_array_equal(never, IMAGES)
    grey = IMAGES[..., :1]
    np.testing.assert_array_equal(views.color_jitter(grey, EXAMPLE, KEY, saturation=0.5, hue=0.2), grey)


def test_blur_keeps_constants_and_has_the_kernel_asked_for() -> None:
    np.testing.assert_allclose(views.gaussian_blur(jnp.ones((4, 9, 9, 1)), EXAMPLE, KEY, probability=1.0), 1, atol=1e-6)
    point = jnp.zeros((1, 9, 9, 1)).at[0, 4, 4, 0].set(1.0)
    found = views.gaussian_blur(point, jnp.zeros(1, jnp.int32), KEY, (1.5, 1.5), 5, 1.0)[0, :, :, 0]
    line = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 1.5**2))
    np.testing.assert_allclose(found[2:7, 2:7], np.outer(line, line) / line.sum() ** 2, atol=1e-6)


def test_turns_flips_grey_and_inversion() -> None:
    square = IMAGES[:, :, :16]
    many = np.tile(square, (4, 1, 1, 1))
    turned = np.asarray(views.rotate90(jnp.asarray(many), jnp.arange(16), KEY))
    assert {n for a, b in zip(many, turned, strict=True) for n in range(4) if (np.rot90(a, n) == b).all()} == {0, 1, 2, 3}
    np.testing.assert_array_equal(views.vertical_flip(IMAGES, EXAMPLE, KEY, 1.0), IMAGES[:, ::-1])
    np.testing.assert_allclose(views.rotate(IMAGES, EXAMPLE, KEY, degrees=0.0), IMAGES, atol=1e-5)
    half = jax.jit(views.rotate)(jnp.ones((64, 9, 9, 1)), jnp.arange(64), KEY)
    assert float(half[:, 4, 4].min()) > 0.999 and float(half[:, 0, 0].min()) == 0.0
    assert np.ptp(views.grayscale(IMAGES, EXAMPLE, KEY, 1.0), -1).max() == 0
    inverted = views.solarize(IMAGES, EXAMPLE, KEY, 0.5, 1.0)
    np.testing.assert_array_equal(inverted, np.where(np.asarray(IMAGES) >= 0.5, 1 - np.asarray(IMAGES), IMAGES))


def test_names_and_sizes_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserError, match="unknown resizing 'bilinar' \\(did you mean 'bilinear'"):
        views.random_resized_crop(IMAGES, EXAMPLE, KEY, 8, method="bilinar")
    with pytest.raises(UserError, match="unknown order 'fix'"):
        views.color_jitter(IMAGES, EXAMPLE, KEY, brightness=1.0, order="fix")
    with pytest.raises(UserError, match="square images"):
        views.rotate90(IMAGES, EXAMPLE, KEY)
    with pytest.raises(UserError, match="window=4 must be odd"):
        views.gaussian_blur(IMAGES, EXAMPLE, KEY, window=4)
