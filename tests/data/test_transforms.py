"""Crops, colour changes and how a config's names become a transform."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from pictures import encode, smooth_image
from PIL import Image
from safetensors.numpy import load_file

from maskae.data import augment, crops
from maskae.data.transforms import STEPS, make_transform
from maskae.errors import UserError


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_random_crops_keep_to_their_scale_and_ratio() -> None:
    draws, seen = generator(), []
    for _ in range(3000):
        top, left, height, width = crops.random_crop_box(draws, 300, 400, (0.2, 0.9), (3 / 4, 4 / 3))
        assert 0 <= top <= 300 - height
        assert 0 <= left <= 400 - width
        seen.append((height * width / (300 * 400), width / height))
    areas, ratios = np.transpose(seen)
    assert 0.195 < areas.min() < 0.22
    assert 0.7 < areas.max() < 0.91
    assert 0.74 < ratios.min() < 0.77
    assert 1.3 < ratios.max() < 1.345


@pytest.mark.parametrize(("size", "box"), [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10)), ((40, 44), (0, 0, 40, 44))])
def test_a_crop_that_never_fits_becomes_the_central_one(size: tuple[int, int], box: tuple[int, ...]) -> None:
    assert crops.central_crop_box(*size, (3 / 4, 4 / 3)) == box
    if size[0] != 40:
        assert crops.random_crop_box(generator(), *size, (0.9, 1.0), (3 / 4, 4 / 3)) == box


def test_probe_crops_equal_the_reference(shared: Path) -> None:
    for height, width, area, log_aspect, top, left, crop_height, crop_width in load_file(
        shared / "goldens" / "mae" / "a" / "outputs.safetensors"
    )["probe_crop_table"]:
        assert crops.probe_crop_size(area, log_aspect, int(height), int(width)) == (crop_height, crop_width)
        assert 0 <= top <= height - crop_height
        assert 0 <= left <= width - crop_width


def test_probe_crops_are_cut_to_the_image() -> None:
    boxes = [crops.probe_crop_box(generator(seed), 10, 100, (0.08, 1.0), (3 / 4, 4 / 3)) for seed in range(200)]
    assert sum(box.height == 10 for box in boxes) > 50
    assert len({box.width for box in boxes}) > 5


def test_rand_augment_operations_equal_the_reference(shared: Path) -> None:
    folder = shared / "goldens" / "mae" / "a"
    options = json.loads((folder / "case.json").read_text())["finetune"]["randaugment"]
    image = load_file(folder / "inputs.safetensors")["ra_image"]
    wanted = load_file(folder / "outputs.safetensors")["ra_outputs"]
    assert tuple(options["ops_in_order"]) == tuple(augment.OPERATIONS)
    for name, result in zip(options["ops_in_order"], wanted, strict=True):
        argument = next(iter(options["level_arguments"][name]), None)
        assert augment.operation_argument(name, options["magnitude"]) == (None if argument is None else pytest.approx(argument))
        np.testing.assert_array_equal(augment.apply_operation(image, name, argument, fill=options["fillcolor"]), result, err_msg=name)


def test_operations_turn_round_with_the_sign_and_grow_with_the_magnitude() -> None:
    assert augment.operation_argument("Rotate", 5, -1) == -15.0
    assert augment.operation_argument("ColorIncreasing", 10, -1) == pytest.approx(0.1)
    assert augment.operation_argument("PosterizeIncreasing", 0) == 4
    assert augment.operation_argument("SolarizeIncreasing", 10) == 0
    with pytest.raises(UserError, match=r"unknown RandAugment operation 'Rotat' \(did you mean 'Rotate'\?\)"):
        augment.operation_argument("Rotat", 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", sorted(augment.OPERATIONS))
def test_operations_keep_shape_and_type(name: str, channels: int) -> None:
    result = augment.apply_operation(smooth_image(9, 12)[..., :channels], name, augment.operation_argument(name, 10))
    assert (result.shape, result.dtype) == ((9, 12, channels), np.uint8)


def test_rand_augment_leaves_a_quarter_of_the_images_alone_and_changes_the_rest() -> None:
    image = np.random.default_rng(0).integers(40, 200, (12, 12, 3), dtype=np.uint8)
    draws = generator()
    same = np.mean([np.array_equal(augment.rand_augment(image, draws), image) for _ in range(300)])
    assert 0.17 < same < 0.33


def test_every_frame_of_a_clip_goes_through_the_same_draws() -> None:
    """A still clip stays still under every step that draws, and two clips are changed differently."""
    frame = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    still = np.broadcast_to(frame, (4, *frame.shape))
    steps = (
        ("rand_augment", {"operations": 4, "probability": 1.0}),
        ("random_resized_crop", {"size": 24, "scale": (0.08, 1.0)}),
        ("flip", {}),
        ("color_jitter", {"brightness": 0.4, "hue": 0.1}),
        ("gaussian_blur", {}),
    )
    transform = make_transform(steps)
    changed = [transform(still, generator(seed)) for seed in range(20)]
    for clip in changed:
        np.testing.assert_array_equal(clip, np.broadcast_to(clip[:1], clip.shape))
    assert len({clip.tobytes() for clip in changed}) == 20
    assert make_transform(())(still, generator()) is still


def test_a_clips_crops_keep_to_the_area_and_the_aspect() -> None:
    """Measured on frames whose colours are their coordinates."""
    rows, columns = np.meshgrid(np.arange(160), np.arange(160), indexing="ij")
    clip = np.stack([rows, columns, rows], -1).astype(np.uint8)[None].repeat(2, 0)
    transform = make_transform((("random_resized_crop", {"size": 160, "scale": (0.08, 1.0), "interpolation": "bilinear"}),))
    boxes = []
    for seed in range(150):
        out = transform(clip, generator(seed)).astype(int)
        np.testing.assert_array_equal(out[0], out[1])
        boxes.append([np.ptp(out[0, :, :, 0]) + 1, np.ptp(out[0, :, :, 1]) + 1])
    heights, widths = np.transpose(boxes)
    areas, aspects = heights * widths / 160**2, widths / heights
    assert 0.075 < areas.min() < 0.12 and 0.9 < areas.max() <= 1
    assert 0.73 < aspects.min() < 0.8 and 1.25 < aspects.max() < 1.37


def test_color_jitter_without_strength_changes_nothing_and_brightness_scales() -> None:
    image = smooth_image(8, 8) // 2
    np.testing.assert_array_equal(augment.color_jitter(image, generator()), image)
    means = [augment.color_jitter(image, generator(seed), brightness=0.4).mean() / image.mean() for seed in range(40)]
    assert 0.59 < min(means) < 0.7
    assert 1.3 < max(means) < 1.41


def test_hue_turns_the_colour_circle() -> None:
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 255
    green = augment.shift_hue(red, 1 / 3)
    assert (green[..., 1] > 250).all()
    assert (green[..., 0] < 12).all()
    np.testing.assert_allclose(augment.shift_hue(green, -1 / 3).astype(int), red, atol=6)


def test_small_colour_steps() -> None:
    image = smooth_image(16, 16)
    grey = augment.grayscale(image)
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
    np.testing.assert_allclose(grey[..., 0], image @ [0.299, 0.587, 0.114], atol=1)
    np.testing.assert_array_equal(augment.solarize(np.array([[[0, 127, 128]]], np.uint8)), [[[0, 127, 127]]])
    point = np.zeros((31, 31, 1), np.uint8)
    point[15, 15] = 255
    blurred = augment.gaussian_blur(point, 1.0)
    assert blurred.shape == point.shape
    assert blurred[15, 15, 0] == pytest.approx(255 / (2 * math.pi), abs=3)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (410, 300), (224, 224)])
def test_resize_center_crop_is_a_part_of_the_resized_image(height: int, width: int) -> None:
    image = smooth_image(height, width)
    scaled = (256, 256 * height // width) if width <= height else (256 * width // height, 256)
    whole = np.asarray(Image.fromarray(image).resize(scaled, Image.Resampling.BICUBIC))
    top, left = round((whole.shape[0] - 224) / 2), round((whole.shape[1] - 224) / 2)
    result = make_transform((("resize_center_crop", {"size": 224}),))(image, generator())
    np.testing.assert_allclose(result.astype(int), whole[top : top + 224, left : left + 224], atol=2)


def test_resize_center_crop_takes_everything_above_224() -> None:
    image = smooth_image(250, 250)
    result = make_transform((("resize_center_crop", {"size": 250}),))(image, generator())
    np.testing.assert_array_equal(result, image)


def test_a_pipeline_of_all_steps_reads_a_file_and_repeats_itself() -> None:
    steps = [
        (name, {"probability": 1.0} if name not in ("random_resized_crop",) else {"size": 20})
        for name in ("random_resized_crop", "flip", "color_jitter", "rand_augment", "grayscale", "gaussian_blur", "solarize")
    ]
    steps[2] = ("color_jitter", {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1})
    data = encode(smooth_image(60, 70))
    for channels in (1, 3):
        transform = make_transform(steps, channels)
        first, again, other = (transform(data, generator(seed)) for seed in (1, 1, 2))
        assert (first.shape, first.dtype) == ((20, 20, channels), np.uint8)
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)


def test_no_steps_decode_the_file() -> None:
    image = smooth_image(9, 7)
    np.testing.assert_array_equal(make_transform(())(encode(image, "PNG"), generator()), image)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((("random_resize_crop", {"size": 8}),), r"unknown transform 'random_resize_crop' \(did you mean 'random_resized_crop'\?\)"),
        ((("random_resized_crop", {"size": 8, "scales": (0.1, 1)}),), r"no argument 'scales' \(did you mean 'scale'\?\)"),
        ((("random_resized_crop", {}),), "'random_resized_crop' needs 'size'"),
        ((("random_resized_crop", {"size": 8, "scale": (1.0, 0.2)}),), "scale .* must be two growing numbers"),
        ((("random_resized_crop", {"size": 0}),), "size must be at least 1"),
        ((("flip", {"probability": 2}),), "probability must be within 0..1"),
        ((("resize_center_crop", {"size": 8, "resize": 4}),), "resize 4 must be at least size 8"),
        ((("rand_augment", {"magnitude": 11}),), "magnitude 11 must be within 0..10"),
    ],
)
def test_wrong_steps_are_clear_errors(steps: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_transform(steps)


def test_every_step_has_a_docstring() -> None:
    assert all(step.__doc__ for step in STEPS.values())
