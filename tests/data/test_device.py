"""The device transforms: normalisation, mixing and erasing against the reference case and against their definitions."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from maskae.data import device
from maskae.data.spec import DataSpec

SPEC = DataSpec("test", (8, 8, 3), 3, (0.1, 0.5, 0.9), (0.2, 0.25, 0.5))


@pytest.fixture(scope="module")
def case(shared: Path) -> dict[str, np.ndarray]:
    folder = shared / "goldens" / "mae" / "a"
    return {**load_file(folder / "inputs.safetensors"), **load_file(folder / "outputs.safetensors")}


def test_a_constant_image_is_normalised_by_its_channel() -> None:
    images = jnp.full((2, 4, 4, 3), 51, jnp.uint8)
    result = device.normalize(images, SPEC)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result[1, 2, 3], [(0.2 - 0.1) / 0.2, (0.2 - 0.5) / 0.25, (0.2 - 0.9) / 0.5], rtol=1e-6)


def test_max_value_scales_the_digits() -> None:
    spec = DataSpec("digits", (8, 8, 1), 1, (0.25,), (0.5,), max_value=16)
    np.testing.assert_allclose(device.normalize(jnp.full((1, 8, 8, 1), 16, jnp.uint8), spec), 1.5)


def test_flip_is_keyed_by_the_global_example() -> None:
    images = jnp.arange(64 * 2 * 3).reshape(64, 2, 3, 1)
    key, example = jax.random.key(0), jnp.arange(64)
    flipped = device.flip(images, example, key)
    mirrored = np.asarray((flipped[:, 0, 0] != images[:, 0, 0])[:, 0])
    np.testing.assert_array_equal(flipped, np.where(mirrored[:, None, None, None], images[:, :, ::-1], images))
    assert 15 < mirrored.sum() < 49
    np.testing.assert_array_equal(device.flip(images[32:], example[32:], key), flipped[32:])


def test_mixup_and_cutmix_equal_the_reference(case: dict[str, np.ndarray]) -> None:
    images = jnp.asarray(case["mix_imgs"].transpose(0, 2, 3, 1))
    mixed = device.mixup(images, float(case["mix_lam_mixup"]))
    np.testing.assert_allclose(mixed.transpose(0, 3, 1, 2), case["mix_imgs_mixup"], atol=1e-6)
    box = tuple(case["mix_bbox"].tolist())
    np.testing.assert_array_equal(device.cutmix(images, box).transpose(0, 3, 1, 2), case["mix_imgs_cutmix"])
    corrected = device.cutmix_share(box, *images.shape[1:3])
    np.testing.assert_allclose(corrected, case["mix_lam_corrected"], rtol=1e-6)
    for share, name in ((float(case["mix_lam_mixup"]), "mix_targets_mixup"), (corrected, "mix_targets_cutmix")):
        targets = device.mix_targets(jnp.asarray(case["mix_labels"]), share, case[name].shape[1], 0.1)
        np.testing.assert_allclose(targets, case[name], atol=1e-6)


def test_the_reference_box_follows_from_its_share(case: dict[str, np.ndarray]) -> None:
    height, width = case["mix_imgs"].shape[2:]
    share, wanted = float(case["mix_lam_cutmix"]), case["mix_bbox"].tolist()
    boxes = {tuple(int(e) for e in device.cutmix_box(share, r, c, height, width)) for r in range(height) for c in range(width)}
    assert tuple(wanted) in boxes


@pytest.mark.parametrize(("mixup_alpha", "cutmix_alpha"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_tell_what_the_mixed_images_hold(mixup_alpha: float, cutmix_alpha: float) -> None:
    labels = jnp.arange(4)
    images = jnp.broadcast_to(jax.nn.one_hot(labels, 4)[:, None, None, :], (4, 10, 12, 4))  # each image is the colour of its class

    @jax.jit
    def mix(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return device.mixup_cutmix(images, labels, key, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha, num_classes=4)

    shares = []
    for seed in range(12):
        mixed, targets = mix(jax.random.key(seed))
        np.testing.assert_allclose(mixed.mean((1, 2)), targets, atol=1e-5)
        shares.append((float(targets[0, 0]), bool(jnp.all((mixed == 0) | (mixed == 1)))))
    assert len({round(share, 4) for share, _ in shares}) > 5
    assert {sharp for _, sharp in shares} == {(False, True): {False}, (True, False): {True}}.get(
        (cutmix_alpha > 0, mixup_alpha > 0), {False, True}
    )


def test_without_mixing_only_the_labels_are_smoothed() -> None:
    images = jax.random.normal(jax.random.key(0), (4, 5, 5, 3))
    options = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "num_classes": 5, "probability": 0.0, "smoothing": 0.1}
    mixed, targets = jax.jit(partial(device.mixup_cutmix, **options))(images, jnp.arange(4), jax.random.key(1))
    np.testing.assert_array_equal(mixed, images)
    np.testing.assert_allclose(targets, np.eye(5)[:4] * 0.9 + 0.02, atol=1e-6)


def test_erase_boxes_equal_the_reference(case: dict[str, np.ndarray]) -> None:
    for area, log_aspect, top, left, height, width in case["erase_boxes"]:
        got_height, got_width, fits = device.erase_size(area, log_aspect, 20, 26)
        assert (int(got_height), int(got_width), bool(fits)) == (height, width, True)
        assert 0 <= top <= 20 - height
        assert 0 <= left <= 26 - width


def test_erase_replaces_the_box_and_nothing_else() -> None:
    result = device.erase(jnp.zeros((5, 6, 1)), (1, 2, 3, 2), jnp.ones((5, 6, 1)))[..., 0]
    wanted = np.zeros((5, 6))
    wanted[1:4, 2:4] = 1
    np.testing.assert_array_equal(result, wanted)


def test_random_erasing_draws_per_example_within_its_limits() -> None:
    images, example, key = jnp.full((256, 20, 26, 2), 7.0), jnp.arange(256), jax.random.key(0)
    erase = jax.jit(device.random_erasing)
    erased = erase(images, example, key)
    changed = np.asarray((erased != images).any(-1))  # [B, H, W]
    share = changed.mean((1, 2))
    assert 0.15 < (share > 0).mean() < 0.35
    assert 0.01 < share[share > 0].min() < 0.06
    assert 0.25 < share.max() < 0.37
    noise = np.asarray(erased)[changed]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    rows, columns = changed.any(2).sum(1), changed.any(1).sum(1)
    np.testing.assert_array_equal(changed.sum((1, 2)), rows * columns, err_msg="one box per image")
    np.testing.assert_allclose(erase(images, example[::-1], key), erased[::-1], rtol=1e-5, atol=1e-6)
