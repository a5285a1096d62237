"""CROMA: sizes, biases, masks, losses, views and features are those of the paper and its code."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.data.spec import DataSpec
from maskae.errors import UserError
from maskae.interop.case import Case
from maskae.interop.croma import channel_first, channel_last, params_of, replay_forward, system_of
from maskae.interop.parity import compare
from maskae.losses.contrastive import info_nce
from maskae.masking import random_mask
from maskae.systems.contract import System
from maskae.systems.croma import Croma
from maskae.systems.croma_arguments import SENSORS
from tests.systems.test_mae import count, dot_flops

SMALL: dict[str, Any] = {"image_size": 16, "patch_size": 4, "optical_channels": 3, "width": 16, "depth": 2, "heads": 4}
SMALL |= {"decoder_width": 8, "decoder_heads": 2}
CROMA = Croma(**SMALL)
EXAMPLE = jnp.arange(4)


def images_of(side: int, batch: int = 4) -> dict[str, jax.Array]:
    return {s: jax.random.uniform(jax.random.key(i), (batch, side, side, CROMA.channels(s))) for i, s in enumerate(SENSORS)}


IMAGES = images_of(16)
BATCH = {f"sensor_{sensor}": x for sensor, x in IMAGES.items()} | {"example": EXAMPLE}
PARAMS = jax.jit(CROMA.init)(jax.random.key(0), BATCH).params
NOISE = jax.jit(CROMA.noise)(IMAGES, EXAMPLE, jax.random.key(5))


@pytest.fixture(scope="module")
def named() -> dict[str, Any]:
    """One masked forward pass."""
    return jax.jit(CROMA.forward)(PARAMS, IMAGES, NOISE)


def test_is_a_system() -> None:
    assert isinstance(CROMA, System)


@pytest.mark.parametrize(
    ("size", "released", "whole", "giga_flops"),
    [({}, 194_365_440, 199_552_385, 23.0), ({"width": 1024, "depth": 24}, 672_557_056, 678_793_089, 76.3)],
)
def test_sizes_of_the_paper(size: dict[str, int], released: int, whole: int, giga_flops: float) -> None:
    system = Croma(**size)
    params = jax.eval_shape(system.init, jax.random.key(0), {}).params
    assert count(params) == whole
    assert sum(count(params[name]) for name in (*SENSORS, "joint", "optical_head", "radar_head")) == released
    batch = {"sensor_optical": jax.ShapeDtypeStruct((1, 120, 120, 12), jnp.uint8)}
    assert system.forward_flops(batch) == pytest.approx(giga_flops * 1e9, rel=2e-3)
    assert system.kept("optical", 225) == 56


def test_flops_by_formula_are_those_of_the_trace() -> None:
    system = Croma(**SMALL, radar_mask_ratio=0.5)
    trace = jax.make_jaxpr(lambda p: system.forward(p, IMAGES, NOISE))(jax.eval_shape(system.init, jax.random.key(0), {}).params)
    assert dot_flops(trace.jaxpr) == pytest.approx(4 * system.forward_flops(BATCH), rel=1e-9)


def test_fresh_maps_are_uniform_by_fan_in_and_the_scale_is_that_of_the_paper() -> None:
    assert float(PARAMS["logit_scale"]) == pytest.approx(2.659260, rel=1e-6)
    for leaf, fan_in in (
        (PARAMS["optical"]["patch_embed"]["kernel"], 48),
        (PARAMS["optical"]["block_1"]["mlp"]["fc2"]["kernel"], 64),
        (PARAMS["joint"]["block_0"]["attention"]["out"]["kernel"], 16),
        (PARAMS["radar_projection"]["bias"], 16),
    ):
        assert 0.75 / math.sqrt(fan_in) < float(jnp.abs(leaf).max()) <= 1 / math.sqrt(fan_in)
    assert "bias" not in PARAMS["optical"]["block_0"]["attention"]["qkv"]


def test_masks_are_independent_and_joint_tokens_return_to_the_radar_places(named: dict[str, Any]) -> None:
    masks = named["masks"]
    for sensor in SENSORS:
        np.testing.assert_array_equal(masks[sensor].mask.sum(1), 12)
    assert not np.array_equal(masks["optical"].mask, masks["radar"].mask)
    restored = CROMA.decoder.apply({"params": PARAMS["decoder"]}, named["joint"], masks["radar"].restore, (4, 4), method="restore")
    moved = CROMA.decoder.apply({"params": PARAMS["decoder"]}, named["joint"] + 1.0, masks["radar"].restore, (4, 4), method="restore")
    np.testing.assert_array_equal(np.abs(np.asarray(moved - restored)).max(-1) > 0, masks["radar"].mask == 0)


def test_removed_pixels_have_exactly_no_influence(named: dict[str, Any]) -> None:
    removed = {s: jnp.repeat(jnp.repeat(named["masks"][s].mask.reshape(4, 4, 4), 4, 1), 4, 2)[..., None] for s in SENSORS}
    other = jax.jit(CROMA.forward)(PARAMS, {s: jnp.where(removed[s] > 0, 9.0, IMAGES[s]) for s in SENSORS}, NOISE)
    np.testing.assert_array_equal(other["prediction"], named["prediction"])
    np.testing.assert_array_equal(other["embedded"]["radar"], named["embedded"]["radar"])


def test_permuting_patches_with_their_places_permutes_the_output() -> None:
    order = jnp.asarray(np.stack([np.random.default_rng(i).permutation(16) for i in range(4)]))
    encode = jax.jit(lambda keep: CROMA.encode(PARAMS, "optical", IMAGES["optical"], keep))
    straight, permuted = encode(jnp.broadcast_to(jnp.arange(16), (4, 16))), encode(order)
    np.testing.assert_allclose(permuted.tokens, jnp.take_along_axis(straight.tokens, order[..., None], 1), atol=1e-5)


def test_zero_prediction_costs_what_the_unbiased_variance_says() -> None:
    target = CROMA.target(IMAGES)
    masks = {s: random_mask(NOISE[s], 4)._replace(mask=jnp.ones((4, 16))) for s in SENSORS}
    errors = CROMA.reconstruction(jnp.zeros_like(target), target, masks)
    assert float(3 / 5 * errors["optical"] + 2 / 5 * errors["radar"]) == pytest.approx(79 / 80, rel=1e-4)
    own = dataclasses.replace(CROMA, target_norm="per_sensor").target(IMAGES)
    np.testing.assert_allclose(own[..., 48:].mean(-1), 0, atol=1e-5)
    assert float(jnp.abs(target[..., 48:].mean(-1)).max()) > 0.01


def test_contrastive_loss_of_equal_features_and_of_keys_that_do_not_learn() -> None:
    same = jnp.ones((8, 4)) / 2
    assert float(info_nce(same, same, 14.0, stop_key_gradient=True)) == pytest.approx(math.log(8), rel=1e-6)
    optical, radar = (jax.random.normal(jax.random.key(i), (3, 4)) for i in (1, 2))

    def only_optical_queries(radar: jax.Array) -> jax.Array:
        return info_nce(optical, radar, 3.0, two_way=False, stop_key_gradient=True)

    np.testing.assert_array_equal(jax.grad(only_optical_queries)(radar), 0)


@pytest.mark.parametrize("stop", [True, False])
def test_the_option_decides_whether_keys_learn(stop: bool, named: dict[str, Any]) -> None:
    system = dataclasses.replace(CROMA, key_stop_gradient=stop)
    embedded, scale = named["embedded"], jnp.float32(14.0)
    gradient = jax.grad(lambda radar: system.contrast({"optical": embedded["optical"], "radar": radar}, scale))(embedded["radar"])
    # As a query alone: half the mean cross-entropy of its own row.
    shares = jax.nn.softmax(scale * embedded["radar"] @ embedded["optical"].T) - jnp.eye(4)
    as_query = scale * shares @ embedded["optical"] / 8
    assert np.allclose(gradient, as_query, atol=1e-5) == stop


def test_released_self_attention_bias_differs_with_masks_only(named: dict[str, Any]) -> None:
    released = dataclasses.replace(CROMA, joint_self_bias="cross")
    radar, optical = (named["encoded"][sensor] for sensor in ("radar", "optical"))
    look = [jax.jit(lambda at, s=s: s.look(PARAMS, radar, optical._replace(positions=at))) for s in (CROMA, released)]
    masked, whole = ([run(at) for run in look] for at in (optical.positions, radar.positions))
    assert float(jnp.abs(masked[0] - masked[1]).max()) > 1e-4
    np.testing.assert_allclose(*whole, atol=1e-6)


def test_other_grids_run_on_the_same_weights_and_a_missing_sensor_is_missed() -> None:
    larger = {f"sensor_{sensor}": x for sensor, x in images_of(24, 1).items()}
    system = dataclasses.replace(CROMA, feature_size=40)
    found = jax.jit(system.features)(PARAMS, {}, larger)
    assert found["tokens"].shape == (1, 100, 16)
    assert set(found) == {*SENSORS, "optical_embedding", "radar_embedding", "joint", "pooled", "tokens"}
    np.testing.assert_allclose(found["pooled"], found["tokens"].mean(1), atol=1e-6)
    alone = jax.jit(CROMA.features)(PARAMS, {}, {"sensor_optical": larger["sensor_optical"]})
    assert "joint" not in alone
    assert alone["tokens"].shape == (1, 36, 16)
    np.testing.assert_array_equal(alone["pooled"], alone["optical"])


def test_views_keep_the_sensors_on_each_other() -> None:
    system = dataclasses.replace(CROMA, optical_channels=2, crop_sides=(8, 20), flip=True, mixup_alpha=0.3)
    both = jax.random.randint(jax.random.key(3), (4, 20, 20, 2), 0, 255).astype(jnp.uint8)
    batch = {"sensor_optical": both, "sensor_radar": both, "example": EXAMPLE}
    views = jax.jit(system.views)(batch, jax.random.key(4))
    assert views["optical"].shape == (4, 16, 16, 2)
    np.testing.assert_array_equal(views["optical"], views["radar"])
    assert float(views["optical"].max()) <= 1


def test_bytes_become_fractions() -> None:
    found = CROMA.sensors({"sensor_radar": jnp.asarray([[[[0, 51]]]], jnp.uint8)})
    np.testing.assert_allclose(found["radar"], [[[[0, 0.2]]]], rtol=1e-6)


def test_pictures_are_a_sheet_per_sensor() -> None:
    spec = DataSpec("made", None, 0, (), ())
    sheets = CROMA.draw(PARAMS, {}, BATCH, jax.random.key(0), spec)
    assert set(sheets) == set(SENSORS)
    assert all(sheet.dtype == np.uint8 and sheet.shape[-1] == 3 for sheet in sheets.values())


def test_patch_numbers_go_there_and_back() -> None:
    values = np.random.default_rng(0).normal(size=(3, 4 * 5)).astype(np.float32)
    there = np.asarray(channel_first(values, 2, (3, 2)))
    np.testing.assert_array_equal(there[:, 4:8], values[:, 1:12:3])
    np.testing.assert_array_equal(channel_last(there, 2, (3, 2)), values)


def test_forward_pass_of_the_released_code(shared: Any) -> None:
    case = Case.read(shared / "goldens" / "croma" / "a")
    system = system_of(case)
    found = replay_forward(case, system, params_of(case, system))
    rows = [compare(name, case.outputs[name], found[name]) for name in found]
    assert len(rows) > 30
    assert [row for row in rows if not row.agrees] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "optcal"}, "unknown pool 'optcal' \\(did you mean 'optical'"),
        ({"joint_self_bias": "crss"}, "did you mean 'cross'"),
        ({"target_norm": "joined"}, "unknown target_norm 'joined'"),
        ({"heads": 3}, "width=16 is not a multiple of its 3 heads"),
        ({"mask_ratio": 0.99}, "keeps 0 of 16 patches"),
        ({"depth": 1}, "depth=1"),
        ({"joint_self_bias": "cross", "radar_mask_ratio": 0.5}, "needs as many kept patches"),
        ({"crop_sides": (9, 0)}, "crop_sides"),
    ],
)
def test_arguments_that_cannot_work_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Croma(**(SMALL | options))


def test_a_batch_without_sensors_is_named() -> None:
    with pytest.raises(UserError, match="sensor_optical"):
        CROMA.sensors({"image": IMAGES["optical"]})
    with pytest.raises(UserError, match="only radar"):
        CROMA.views({"sensor_radar": IMAGES["radar"]}, jax.random.key(0))
