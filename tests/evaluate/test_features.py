"""Extraction keeps the real rows, all of them, in order, whatever the sharding; standardising uses training statistics alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.preprocessing import StandardScaler

from maskae.errors import UserError
from maskae.evaluate import extract, raw_pixels, standardise

ROWS, BATCH = 21, 8


def batches(rows: int = ROWS, batch: int = BATCH) -> list[dict[str, np.ndarray]]:
    images = np.random.default_rng(0).integers(0, 255, (rows, 2, 2, 3), dtype=np.uint8)
    result = []
    for start in range(0, rows, batch):
        index = np.arange(start, start + batch)
        valid = index < rows
        result.append(
            {
                "image": images[np.where(valid, index, 0)],
                "label": np.where(valid, index % 5, -1).astype(np.int32),
                "index": np.where(valid, index + 100, -1).astype(np.int32),
                "valid": valid,
            }
        )
    return result


def sums(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    x = jnp.asarray(batch["image"], jnp.float32).reshape(len(batch["image"]), -1)
    return {"pooled": x, "tokens": x.reshape(len(x), 4, 3), "total": x.sum(axis=1, keepdims=True)}


def test_padding_is_dropped_and_order_kept() -> None:
    features = extract(sums, batches(), ("pooled", "tokens"))
    images = np.concatenate([batch["image"] for batch in batches()])[:ROWS]
    assert set(features) == {"pooled", "tokens", "label", "index"}
    np.testing.assert_array_equal(features["pooled"], images.reshape(ROWS, -1))
    assert features["tokens"].shape == (ROWS, 4, 3)
    np.testing.assert_array_equal(features["label"], np.arange(ROWS) % 5)
    np.testing.assert_array_equal(features["index"], np.arange(ROWS) + 100)


def test_valid_rows_in_the_middle_of_a_batch() -> None:
    batch = batches(8)[0]
    batch["valid"] = np.arange(8) % 3 != 1
    np.testing.assert_array_equal(extract(sums, [batch])["index"], np.array([0, 2, 3, 5, 6]) + 100)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sharded_features_come_back_whole(dtype: jnp.dtype) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    spread = jax.jit(lambda batch: {"pooled": sums(batch)["pooled"].astype(dtype)}, out_shardings=sharding)
    placed = [jax.device_put(batch, sharding) for batch in batches()]
    features = extract(spread, placed)
    assert features["pooled"].dtype == np.float32
    expected = np.concatenate([batch["image"] for batch in batches()])[:ROWS].reshape(ROWS, -1)
    np.testing.assert_array_equal(features["pooled"], expected.astype(dtype).astype(np.float32))
    np.testing.assert_array_equal(features["index"], np.arange(ROWS) + 100)


def test_jitted_function_is_compiled_once() -> None:
    traces = []
    extract(jax.jit(lambda batch: traces.append(1) or sums(batch)), batches())
    assert len(traces) == 1


def test_batches_without_valid_or_label_count_whole() -> None:
    features = extract(sums, [{"image": batch["image"]} for batch in batches(16)])
    assert set(features) == {"pooled"}
    assert len(features["pooled"]) == 16


def test_raw_pixels_are_the_flattened_images() -> None:
    features = raw_pixels(batches())
    expected = np.concatenate([batch["image"] for batch in batches()])[:ROWS].reshape(ROWS, -1)
    assert features["pooled"].dtype == np.float32
    np.testing.assert_array_equal(features["pooled"], expected)


def test_errors_name_what_is_missing() -> None:
    with pytest.raises(UserError, match=r"no feature 'poled' \(did you mean 'pooled'\?\); it gives pooled, tokens, total"):
        extract(sums, batches(), ("poled",))
    with pytest.raises(UserError, match="no examples"):
        extract(sums, [])
    batch = batches(8)[0]
    with pytest.raises(UserError, match="no examples"):
        extract(sums, [{**batch, "valid": np.zeros(8, bool)}])
    with pytest.raises(ValueError, match="'pooled' has 4 rows where the batch has 8"):
        extract(lambda batch: {"pooled": sums(batch)["pooled"][:4]}, [batch])


def test_standardise_uses_training_statistics() -> None:
    generator = np.random.default_rng(1)
    train, val = generator.normal(3, 5, (50, 6)), generator.normal(1, 2, (20, 6))
    scaler = StandardScaler().fit(train)
    ours = standardise(train, val)
    np.testing.assert_allclose(ours[0], scaler.transform(train), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours[1], scaler.transform(val), rtol=1e-5, atol=1e-6)


def test_standardise_forgets_scale_offset_and_constant_channels() -> None:
    generator = np.random.default_rng(1)
    train, val = (generator.normal(size=(rows, 3, 4)).astype(np.float32) for rows in (50, 20))
    train[..., 2] = 7.3
    reference = standardise(train, val)
    assert not reference[0][..., 2].any() and not reference[1][..., 2].any()
    for scaled, expected in zip(standardise(train * 1e-8, val * 1e-8), reference, strict=True):
        np.testing.assert_allclose(scaled, expected, rtol=1e-4, atol=1e-5)
    for moved, expected in zip(standardise(train + 5, val + 5), reference, strict=True):
        np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-4)


def test_raw_pixels_of_large_images_are_averaged_down_to_16() -> None:
    image = np.repeat(np.repeat(np.arange(32, dtype=np.uint8)[None, :, None] * np.ones((32, 1, 3), np.uint8), 4, 0), 4, 1)  # [128, 128, 3]
    features = raw_pixels([{"image": image[None], "label": np.zeros(1, np.int32)}])
    assert features["pooled"].shape == (1, 16 * 16 * 3)
    np.testing.assert_allclose(features["pooled"].reshape(16, 16, 3)[5, 2:-2, 0], np.arange(4, 28, 2) + 0.5, atol=0.05)
