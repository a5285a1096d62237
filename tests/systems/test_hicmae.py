"""HiCMAE: sizes, masks, targets, contrast, skips and fusion are those of the paper and its code."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.interop.case import Case
from maskae.interop.hicmae import layout_of, params_of, replay_forward, replay_tables, system_of
from maskae.interop.parity import compare
from maskae.masking import Split
from maskae.nn.patches import tubelets, untubelet
from maskae.paths import flatten_paths
from maskae.systems.contract import System
from maskae.systems.hicmae import Hicmae
from maskae.systems.hicmae_arguments import MODALITIES
from tests.drawn import drawn
from tests.systems.test_mae import count, dot_flops

SMALL: dict[str, Any] = {"image_size": 16, "frames": 4, "patch_size": 4, "spectrogram_size": (16, 8), "audio_patch_size": 4, "width": 16}
SMALL |= {"depth": 2, "heads": 2, "fusion_depth": 1, "decoder_width": 8, "decoder_depth": 3, "decoder_heads": 2, "levels": (1, 2)}
SMALL |= {"mask_ratio": 0.75, "audio_mask_ratio": 0.5}
HICMAE = Hicmae(**SMALL)
EXAMPLE = jnp.arange(4)
BATCH = {
    "video": jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 4, 16, 16, 3)), jnp.uint8),
    "spectrogram": jax.random.normal(jax.random.key(1), (4, 16, 8)),
    "example": EXAMPLE,
}
PARAMS = drawn(HICMAE.init, jax.random.key(0), BATCH).params
INPUTS = HICMAE.inputs(BATCH)
MASKS = jax.jit(HICMAE.masks)(EXAMPLE, jax.random.key(5))


@pytest.fixture(scope="module")
def named() -> dict[str, Any]:
    """One masked forward pass."""
    return jax.jit(HICMAE.forward)(PARAMS, INPUTS, MASKS)


def test_is_a_system() -> None:
    assert isinstance(HICMAE, System)


@pytest.mark.parametrize(
    ("size", "released"),
    [({}, 99_609_344), ({"width": 384, "heads": 6, "decoder_width": 192, "decoder_heads": 3}, 50_584_576)],
)
def test_sizes_of_the_paper(size: dict[str, int], released: int) -> None:
    system = Hicmae(**size)
    assert count(jax.eval_shape(system.init, jax.random.key(0), {}).params) == released
    counts = [(system.tokens(each), system.visible(each), system.tokens(each) - system.visible(each)) for each in MODALITIES]
    assert counts == [(800, 80, 720), (128, 26, 102)]


def test_flops_by_formula_are_those_of_the_trace() -> None:
    trace = jax.make_jaxpr(lambda p: HICMAE.forward(p, INPUTS, MASKS))(PARAMS)
    assert dot_flops(trace.jaxpr) == pytest.approx(4 * HICMAE.forward_flops(BATCH), rel=1e-9)
    assert Hicmae().forward_flops({}) == pytest.approx(30.2e9, rel=0.02)


def test_masks_hide_the_same_places_in_every_slot_and_as_many_of_every_sample() -> None:
    video = MASKS["video"].reshape(4, HICMAE.slots("video"), -1)
    np.testing.assert_array_equal(video, np.broadcast_to(video[:, :1], video.shape))
    np.testing.assert_array_equal(video.sum(-1), 12)
    np.testing.assert_array_equal(MASKS["audio"].sum(-1), 4)
    assert len({tuple(row) for row in np.asarray(video[:, 0])}) > 1


def test_zero_prediction_costs_what_the_unbiased_deviation_says() -> None:
    still = jnp.broadcast_to(INPUTS["video"][:, :1], INPUTS["video"].shape)
    values = 2 * 4 * 4
    differenced = HICMAE.target("video", still)
    assert float(jnp.square(differenced).mean()) == pytest.approx((values - 1) / values / 2, rel=1e-4)
    whole = dataclasses.replace(HICMAE, frame_difference=False).target("video", INPUTS["video"])
    assert float(jnp.square(whole).mean()) == pytest.approx((values - 1) / values, rel=1e-4)
    assert float(jnp.square(HICMAE.target("audio", INPUTS["audio"])).mean()) == pytest.approx(15 / 16, rel=1e-4)


def test_all_frames_of_a_group_but_its_first_are_differences_and_a_weight_parts_a_tubelets_two_frames() -> None:
    def frames(system: Hicmae) -> np.ndarray:
        return np.asarray(untubelet(system.target("video", INPUTS["video"]), (2, 4, 4), 4, 2))

    plain = frames(dataclasses.replace(HICMAE, frame_difference=False))
    for group in (1, 2, 4):
        expected = plain - np.where(np.arange(4) % group == 0, 0, 1)[:, None, None, None] * np.repeat(plain[:, ::group], group, 1)
        np.testing.assert_allclose(frames(dataclasses.replace(HICMAE, difference_group=group)), expected, atol=1e-6)
    weighted = dataclasses.replace(HICMAE, difference_weight=0.3)
    target = HICMAE.target("video", INPUTS["video"])
    first, second = (float(jnp.square(half).mean()) for half in jnp.split(target, 2, -1))
    errors = [float(each.reconstruction_error("video", jnp.zeros_like(target), target)) for each in (weighted, HICMAE)]
    assert errors == pytest.approx([0.7 * first + 0.3 * second, (first + second) / 2], rel=1e-5)


def test_layer_scale_and_missing_biases_have_the_released_names() -> None:
    system = dataclasses.replace(HICMAE, layer_scale=0.1, qkv_bias=False)
    shapes = flatten_paths(jax.eval_shape(system.init, jax.random.key(0), {}).params)
    layout = layout_of(system)
    names = {name for path in shapes for name in (layout.names(path) or ((f"no name for {path}",),))[0]}
    factors = {name for name in names if "gamma" in name}
    assert {"encoder.blocks.1.gamma_1", "encoder_fusion.blocks_audio.0.gamma_0", "decoder.blocks.0.gamma_2"} <= factors
    # Two of every plain block, three of every block that looks across.
    assert len(factors) == 2 * (2 * 2 + 2) + 3 * (2 + 2 * 2)
    assert not [name for name in names if "q_bias" in name or "v_bias" in name or name.startswith("no name")]


def test_tubelets_and_back() -> None:
    video = INPUTS["video"]
    boxes = tubelets(video, 4, 2)
    np.testing.assert_array_equal(boxes[1, 16 + 5].reshape(2, 4, 4, 3), video[1, 2:4, 4:8, 4:8])
    np.testing.assert_array_equal(untubelet(boxes, (2, 4, 4), 4, 2), video)


def test_contrast_of_equal_of_aligned_and_of_grouped_features() -> None:
    system = dataclasses.replace(HICMAE, group_size=40)
    same = jnp.ones((40, 4)) / 2
    assert float(system.contrast(same, same)) == pytest.approx(math.log(40), rel=1e-6)
    aligned = math.log1p(39 * math.exp(-1 / 0.07))
    assert float(system.contrast(jnp.eye(40), jnp.eye(40))) == pytest.approx(aligned, rel=0.05)  # float32: 14.3 + 2e-5 keeps one digit
    video, audio = (jax.random.normal(jax.random.key(i), (8, 4)) / 2 for i in (1, 2))
    whole = dataclasses.replace(HICMAE, group_size=4)
    parts = [float(whole.contrast(video[part], audio[part])) for part in (slice(0, 4), slice(4, 8))]
    assert float(whole.contrast(video, audio)) == pytest.approx(np.mean(parts), rel=1e-5)
    assert float(dataclasses.replace(whole, contrastive_scope="global").contrast(video, audio)) > np.mean(parts)
    with pytest.raises(UserError, match="group_size=3"):
        dataclasses.replace(HICMAE, group_size=3).contrast(video, audio)


def test_hidden_patches_have_exactly_no_influence(named: dict[str, Any]) -> None:
    hidden = untubelet(jnp.broadcast_to(MASKS["video"][..., None], (4, 32, 96)), (2, 4, 4), 4, 2)
    other = jax.jit(HICMAE.forward)(PARAMS, INPUTS | {"video": jnp.where(hidden > 0, 9.0, INPUTS["video"])}, MASKS)
    np.testing.assert_array_equal(other["decoded"]["video"].prediction, named["decoded"]["video"].prediction)


def test_the_decoder_knows_visible_tokens_by_their_places_and_looks_at_the_skipped_level(named: dict[str, Any]) -> None:
    encoded, split, fused = named["encoded"]["audio"], named["splits"]["audio"], named["fused"].audio
    decode = jax.jit(lambda fused, layers, split: HICMAE.decode(PARAMS, "audio", fused, layers, split).prediction)
    straight = decode(fused, encoded.layers, split)
    turned = decode(fused[:, ::-1], [x[:, ::-1] for x in encoded.layers], Split(split.seen[:, ::-1], split.hidden))
    np.testing.assert_allclose(turned, straight, atol=1e-5)
    for place in (0, 1):
        without = [jnp.zeros_like(x) if i == place else x for i, x in enumerate(encoded.layers)]
        assert float(jnp.abs(decode(fused, without, split) - straight).max()) > 1e-3


def test_fusion_is_simultaneous(named: dict[str, Any]) -> None:
    own = PARAMS["fusion"]
    other = {"video": "audio", "audio": "video"}
    swapped = {other[name[:5]] + name[5:]: value for name, value in own.items()}
    encoded = named["encoded"]
    turned = HICMAE.fuse({"fusion": swapped}, encoded["audio"].tokens, encoded["video"].tokens)
    np.testing.assert_allclose(turned.audio, named["fused"].video, atol=1e-5)
    np.testing.assert_allclose(turned.video, named["fused"].audio, atol=1e-5)


def test_sound_alone_has_features_and_no_loss() -> None:
    alone = {name: BATCH[name] for name in ("spectrogram", "example")}
    found = jax.eval_shape(lambda p: HICMAE.features(p, {}, alone), PARAMS)
    assert found["pooled"].shape == (4, 16) and "both" not in found
    with pytest.raises(UserError, match="only audio"):
        HICMAE.loss(PARAMS, {}, alone, jax.random.key(0), jnp.int32(0))


def test_mistakes_are_refused_early() -> None:
    for wrong, words in (
        ({"levels": (1, 5)}, "levels"),
        ({"decoder_depth": 4}, "skip to 3 levels"),
        ({"mask_ratio": 0.01}, "hides 0 of 16"),
        ({"contrastive_scope": "locl"}, "local"),
        ({"difference_group": 3}, "difference_group=3 do not tile a clip of 4"),
        ({"difference_weight": 0.5, "tubelet": 1}, "difference_weight weighs"),
        ({"mean": (0.5,)}, "3 channels"),
    ):
        with pytest.raises(UserError, match=words):
            dataclasses.replace(HICMAE, **wrong)


def test_the_reference_case(shared) -> None:
    """Forward pass, log-mel, tables and metrics; `tools/parity.py` also compares the gradients."""
    case = Case.read(shared / "goldens" / "hicmae" / "a")
    system = system_of(case)
    with jax.default_matmul_precision("highest"):
        found = replay_forward(case, system, params_of(case, system)) | replay_tables(case, system)
    rows = [compare(name, case.outputs[name], value) for name, value in found.items()]
    assert len(rows) >= 30 and [row for row in rows if not row.agrees] == []
