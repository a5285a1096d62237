"""Packed samples are found again, rows are filled as planned, and a packed encoder gives what it gives sample by sample."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskae.errors import UserError
from maskae.nn.packing import Packed, pack, plan_packing, plan_packing_on_device, pool_segments, unpack
from maskae.nn.patches import patchify
from maskae.nn.vit import ViTEncoder

ROW, ROWS, SAMPLES = 12, 8, 6
LENGTHS = st.lists(st.integers(1, 9), min_size=SAMPLES, max_size=SAMPLES)


@settings(max_examples=15, deadline=None)
@given(LENGTHS)
def test_every_token_lies_in_one_place_and_comes_back(lengths: list[int]) -> None:
    plan = plan_packing(lengths, ROW)
    on_device = jax.jit(plan_packing_on_device, static_argnums=(1, 2))(jnp.asarray(lengths), ROW, ROWS)
    np.testing.assert_array_equal(plan.row, on_device.row)
    np.testing.assert_array_equal(plan.start, on_device.start)
    tokens = np.random.default_rng(0).normal(size=(SAMPLES, 9, 3)).astype(np.float32)
    packed = jax.tree.map(np.asarray, jax.jit(pack, static_argnums=(3, 4))(tokens, jnp.asarray(lengths), plan, ROW, ROWS))
    inside = np.arange(9) < np.asarray(lengths)[:, None]
    assert np.sum(packed.segments >= 0) == sum(lengths)
    for sample, length in enumerate(lengths):
        own = packed.segments == sample
        assert len(set(np.nonzero(own)[0])) == 1
        np.testing.assert_array_equal(packed.positions[own], np.arange(length))
        np.testing.assert_array_equal(packed.tokens[own], tokens[sample, :length])
    back = jax.jit(unpack, static_argnums=3)(packed.tokens, jnp.asarray(lengths), plan, 9)
    np.testing.assert_array_equal(back, np.where(inside[:, :, None], tokens, 0))
    means = [tokens[sample, 1:length].mean(0) if length > 1 else np.zeros(3) for sample, length in enumerate(lengths)]
    np.testing.assert_allclose(pool_segments(packed, SAMPLES, skip=1), means, atol=1e-6)


def test_the_plan_is_first_fit_decreasing() -> None:
    plan = plan_packing([3, 7, 5, 5, 2], 10)
    assert plan.row.tolist() == [0, 0, 1, 1, 2]
    assert plan.start.tolist() == [7, 0, 0, 5, 0]


@pytest.mark.parametrize(
    ("lengths", "rows", "message"),
    [
        ([3, 11], None, "sample 1 of 11 tokens into rows of 10"),
        ([0], None, "sample 0 of 0 tokens"),
        ([6, 6, 6], 2, "3 samples of 18 tokens need 3 rows of 10, and there are 2"),
    ],
)
def test_what_cannot_be_packed_is_named(lengths: list[int], rows: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_packing(lengths, 10, rows)


def test_samples_without_a_place_are_left_out_on_the_device() -> None:
    lengths = jnp.asarray([6, 6, 0, 4, 11])
    plan = plan_packing_on_device(lengths, 10, 1)
    assert plan.row.tolist() == [0, -1, -1, 0, -1]
    packed = pack(jnp.ones((5, 11, 2)), lengths, plan, 10, 1)
    assert sorted(set(np.asarray(packed.segments).ravel().tolist())) == [0, 3]
    np.testing.assert_array_equal(unpack(packed.tokens, lengths, plan, 11).any((1, 2)), [True, False, False, True, False])


ENCODER = ViTEncoder(4, 16, 2, 2, (4, 4))
SIZES = ((8, 16), (12, 4), (4, 4), (8, 8))
IMAGES = [jax.random.normal(jax.random.key(index), (1, *size, 3)) for index, size in enumerate(SIZES)]
GRIDS = [(height // 4, width // 4) for height, width in SIZES]


def one_by_one(params: Any) -> tuple[jax.Array, Any]:
    encoded: list[Any] = [ENCODER.apply({"params": params}, image)[0] for image in IMAGES]
    return sum((jnp.sin(each) * (1 + index)).sum() for index, each in enumerate(encoded)), encoded


def all_packed(params: Any) -> tuple[jax.Array, Any]:
    """Images of four aspects: patches padded to the longest, then two rows without padding between samples."""
    lengths, longest = [rows * columns for rows, columns in GRIDS], 8
    patches = jnp.stack([jnp.pad(patchify(image, 4)[0], ((0, longest - image[..., 0].size // 16), (0, 0))) for image in IMAGES])
    places = [np.stack(np.divmod(np.arange(longest), columns), -1) for _, columns in GRIDS]
    tokens = ENCODER.apply({"params": params}, patches, jnp.asarray(np.stack(places)), method="embed_patches")
    with_cls: Any = ENCODER.apply({"params": params}, tokens, method="prepend_cls")
    counts = np.asarray(lengths) + 1
    plan = plan_packing(counts.tolist(), 14, rows=2)
    packed = pack(with_cls, jnp.asarray(counts), plan, 14, 2)
    encoded: Any = ENCODER.apply({"params": params}, packed.tokens, packed.segments, method="encode_packed")
    samples = unpack(encoded.tokens, jnp.asarray(counts), plan, 1 + longest)
    pooled = pool_segments(Packed(encoded.tokens, packed.segments, packed.positions), 4, skip=1)
    separate = [samples[index, :count] for index, count in enumerate(counts)]
    return sum((jnp.sin(each) * (1 + index)).sum() for index, each in enumerate(separate)), (separate, pooled)


def test_images_of_native_aspect_packed_equal_each_alone() -> None:
    params = ENCODER.init(jax.random.key(9), jnp.zeros((1, 16, 16, 3)))["params"]
    (_, alone), to_alone = jax.jit(jax.value_and_grad(one_by_one, has_aux=True))(params)
    (_, (packed, pooled)), to_packed = jax.jit(jax.value_and_grad(all_packed, has_aux=True))(params)
    for one, other, mean in zip(alone, packed, pooled, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
        np.testing.assert_allclose(mean, one[1:].mean(0), atol=1e-5)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5), to_alone, to_packed)


def test_a_trainable_table_has_no_coordinates() -> None:
    encoder = ViTEncoder(4, 16, 1, 2, (1, 1), trainable_position=True)
    params = encoder.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    with pytest.raises(UserError, match="belongs to one grid"):
        encoder.apply(params, jnp.zeros((1, 1, 48)), jnp.zeros((1, 1, 2)), method="embed_patches")
