"""Point-MAE, Point-CMAE and their classifier: what the card says has to hold, sizes, FLOPs, and the reference case."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from maskae.data.spec import DataSpec
from maskae.errors import UserError
from maskae.interop import point_cmae as interop
from maskae.interop.case import Case
from maskae.interop.parity import compare
from maskae.interop.point_layout import POINT_MAE
from maskae.masking import Mask, random_mask
from maskae.nn.batch_norm import STATISTICS
from maskae.nn.point_augmentations import random_rotation
from maskae.nn.points import Groups
from maskae.start import start_from
from maskae.systems import SYSTEMS
from maskae.systems.contract import System, Variables
from maskae.systems.point_classifier import PointClassifier
from maskae.systems.point_cmae import PointCmae
from maskae.systems.point_mae import PointMae

SMALL: dict[str, Any] = {"groups": 8, "group_size": 4, "width": 16, "depth": 1, "heads": 2, "token_widths": (8, 8, 8)}
SMALL_DECODER: dict[str, Any] = {"decoder_depth": 1, "decoder_heads": 2}
CMAE = PointCmae(**SMALL, **SMALL_DECODER)
BATCH = {"points": jax.random.normal(jax.random.key(1), (3, 32, 3)), "example": jnp.arange(3), "label": jnp.asarray([0, 1, 2])}


@cache
def variables() -> Variables:
    """Parameters with a tokenizer that tells groups apart, and statistics that differ from every batch's."""
    params, state = jax.jit(lambda: CMAE.init(jax.random.key(0), {}))()
    params["encoder"]["tokenizer"] = jax.tree.map(lambda leaf: 25 * leaf, params["encoder"]["tokenizer"])
    return Variables(params, jax.tree.map(lambda leaf: leaf + 0.3, state))


@cache
def evaluated() -> Any:
    """Groups and masks -> everything by name, in eval mode, jitted once."""
    return jax.jit(lambda params, groups, masks: CMAE.forward(params, variables().state, groups, masks, train=False))


@cache
def grouped() -> tuple[Groups, tuple[Mask, ...]]:
    """The batch's groups and two masks."""

    def make() -> tuple[Groups, tuple[Mask, ...]]:
        groups = CMAE.group(BATCH["points"])
        return groups, CMAE.masks(groups, BATCH["example"], jax.random.key(6))

    return jax.jit(make)()


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_are_registered_systems() -> None:
    assert [SYSTEMS[name] for name in ("point_mae", "point_cmae", "point_classifier")] == [PointMae, PointCmae, PointClassifier]
    assert isinstance(CMAE, System)


def test_parameter_counts_and_flops_of_the_paper() -> None:
    trees = {system: jax.eval_shape(system().init, jax.random.key(0), {}) for system in (PointMae, PointCmae, PointClassifier)}
    encoder, decoder = trees[PointMae].params["encoder"], trees[PointMae].params["decoder"]
    assert count(encoder["tokenizer"]) == 494_464
    assert count(encoder["position_embed"]) == count(decoder["position_embed"]) == 50_048
    assert count(encoder["block_0"]) == 1_773_312
    assert count([decoder[f"block_{i}"] for i in range(4)]) + count(decoder["norm"]) == 7_094_016
    assert count(decoder["head"]) == 36_960
    assert count(trees[PointMae].params) == pytest.approx(29.0e6, rel=1e-3)
    assert count(trees[PointCmae].params) == 36_354_240 - 164_864  # without the projection that feeds no loss
    assert count(trees[PointClassifier].params) == pytest.approx(22.1e6, rel=1e-3)
    assert PointCmae().forward_flops({}) == pytest.approx(2 * 3.1e9, rel=0.01)


def test_masks_have_their_counts_and_are_independent() -> None:
    system = PointCmae()
    example = jnp.arange(2000)
    centres = jnp.zeros((2000, 64, 3))
    first, second = (mask.mask for mask in jax.jit(lambda: system.masks(Groups(centres, centres, centres), example, jax.random.key(3)))())
    assert set(np.asarray(first.sum(1))) == set(np.asarray(second.sum(1))) == {38.0}
    overlap = np.asarray((first * second).sum(1))
    assert 12 <= overlap.min() <= overlap.max() <= 38
    assert overlap.mean() == pytest.approx(38**2 / 64, abs=0.2)


def test_block_masks_remove_the_groups_around_one_centre() -> None:
    system = PointMae(**SMALL, **SMALL_DECODER, masker="block")
    centres = jax.random.normal(jax.random.key(4), (5, 8, 3))
    (mask,) = jax.jit(lambda: system.masks(Groups(centres, centres, centres), jnp.arange(5), jax.random.key(5)))()
    for cloud, removed in zip(np.asarray(centres), np.asarray(mask.mask) > 0, strict=True):
        apart = np.linalg.norm(cloud[:, None] - cloud[None], axis=-1)
        assert any(set(np.flatnonzero(removed)) == set(np.argsort(row)[:4]) for row in apart)


def test_encoder_does_not_see_hidden_groups_nor_the_order_of_points() -> None:
    params, (groups, masks) = variables().params, grouped()
    named = evaluated()(params, groups, masks)
    hidden = masks[0].mask[:, :, None, None]
    other = evaluated()(params, groups._replace(offsets=groups.offsets + hidden), masks)
    np.testing.assert_array_equal(named["latent"][0], other["latent"][0])
    assert np.abs(named["latent"][1] - other["latent"][1]).max() > 1e-4  # the second view does see some of them
    turned = evaluated()(params, groups._replace(offsets=groups.offsets[:, :, ::-1]), masks)
    np.testing.assert_allclose(named["tokens"], turned["tokens"], atol=1e-6)


def test_permuting_groups_permutes_everything() -> None:
    params, order = variables().params, jax.random.permutation(jax.random.key(7), 8)
    groups, masks = grouped()
    moved = Groups(*(leaf[:, order] for leaf in groups))
    moved_masks = tuple(random_mask(mask.mask[:, order], CMAE.visible) for mask in masks)
    named, other = evaluated()(params, groups, masks), evaluated()(params, moved, moved_masks)
    np.testing.assert_allclose(named["features"][0][:, order], other["features"][0], atol=2e-5)


def test_equal_branches_agree_when_matched_and_not_when_all_are_compared() -> None:
    params = dict(variables().params)
    params["decoder_2"] = params["decoder"]
    cls = {name: jnp.broadcast_to(params["encoder"][name][:1], (2, 1, 16)) for name in ("cls_token", "cls_position")}
    params["encoder"] = params["encoder"] | cls
    groups, (mask, _) = grouped()
    named = evaluated()(params, groups, (mask, mask))
    assert CMAE.objective(named, (mask, mask))[1]["agreement"] == pytest.approx(0, abs=1e-6)
    # The stacked decoders start with small features; take away what they have in common to see the pairs apart.
    named["features"] = [x - x.mean(1, keepdims=True) for x in named["features"]]
    everyone = dataclasses.replace(CMAE, pairing="all")
    assert everyone.objective(named, (mask, mask))[1]["agreement"] > 0.1


def test_loss_is_the_weighted_sum_and_its_parts_add_up() -> None:
    params, state = variables()
    loss, outputs = jax.jit(CMAE.loss)(params, state, BATCH, jax.random.key(10), 0)
    parts = 1000 * 2 * float(outputs.metrics["chamfer"]) + float(outputs.metrics["agreement"])
    assert float(loss) == pytest.approx(parts, rel=1e-5)
    assert outputs.metrics["token_deviation"] > 0
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), outputs.state, state)
    assert min(jax.tree.leaves(moved)) > 1e-4


def test_scanned_blocks_give_the_same_features() -> None:
    params, state = variables()
    deep = {"encoder": {**params["encoder"], "block_1": params["encoder"]["block_0"]}}
    plain = dataclasses.replace(CMAE, depth=2)
    scanned = dataclasses.replace(plain, scan=True, remat="dots")
    one, other = (jax.jit(system.features)(deep, state, BATCH) for system in (plain, scanned))
    np.testing.assert_allclose(one["tokens"], other["tokens"], atol=1e-5)
    assert one["pooled"].shape == (3, 32)


def test_augmentation_depends_on_the_example_alone() -> None:
    key, points, example = jax.random.key(11), BATCH["points"], BATCH["example"]
    augment = jax.jit(CMAE.augment)
    whole = augment(points, example, key)
    np.testing.assert_array_equal(augment(points[::-1], example[::-1], key)[::-1], whole)
    factor = (whole - whole.mean(1, keepdims=True)).std(1) / points.std(1)
    assert (factor > 2 / 3 - 1e-5).all() and (factor < 3 / 2 + 1e-5).all()
    turned = jax.jit(random_rotation)(points, example, key)
    np.testing.assert_array_equal(turned[..., 1], points[..., 1])
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(points, axis=-1), rtol=1e-5)
    assert np.abs(turned - points).max() > 0.1


@pytest.mark.parametrize("frozen", [True, False])
def test_classifier_takes_the_encoder_with_its_statistics(frozen: bool) -> None:
    system = PointClassifier(**SMALL, num_classes=3, points=24, frozen=frozen)
    fresh = jax.jit(system.init)(jax.random.key(12), {})
    params, state = system.with_pretrained(fresh, variables())
    np.testing.assert_array_equal(jax.tree.leaves(state[STATISTICS]["encoder"])[0], jax.tree.leaves(variables().state)[0])
    np.testing.assert_array_equal(params["encoder"]["cls_token"], fresh.params["encoder"]["cls_token"])
    own = state["encoder"] if frozen else params["encoder"]
    np.testing.assert_array_equal(own["block_0"]["norm1"]["scale"], variables().params["encoder"]["block_0"]["norm1"]["scale"])

    (loss, outputs), grads = jax.jit(jax.value_and_grad(system.loss, has_aux=True))(params, state, BATCH, jax.random.key(13), 0)
    assert np.isfinite(loss)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads["head"]["fc3"])) > 0
    assert float(jnp.abs(grads["encoder"]["cls_token"]).max()) > 0
    assert (set(grads["encoder"]) == {"cls_token", "cls_position"}) == frozen
    same = jax.tree.map(np.array_equal, outputs.state[STATISTICS]["encoder"], state[STATISTICS]["encoder"])
    assert all(jax.tree.leaves(same)) == frozen


def test_classifier_samples_spread_points_and_refuses_what_does_not_fit() -> None:
    system = PointClassifier(**SMALL, num_classes=3, points=24)
    kept = jax.jit(system.sample)(BATCH["points"])
    assert kept.shape == (3, 24, 3)
    for cloud, whole in zip(kept, BATCH["points"], strict=True):
        assert len(np.unique(cloud, axis=0)) == 24 and set(map(bytes, np.asarray(cloud))) <= set(map(bytes, np.asarray(whole)))
    drawn = jax.jit(system.sample)(BATCH["points"], BATCH["example"], jax.random.key(14))
    assert drawn.shape == (3, 24, 3) and not np.array_equal(drawn, kept)
    with pytest.raises(UserError, match="fewer than points=24"):
        system.sample(BATCH["points"][:, :20])
    with pytest.raises(UserError, match="tokenizer/group1/kernel"):
        other = dataclasses.replace(system, token_widths=(8, 8, 16))
        other.with_pretrained(jax.eval_shape(other.init, jax.random.key(0), {}), variables())


def test_pictures_and_raw_features() -> None:
    params, state = variables()
    spec = DataSpec("clouds", None, 0, (), ())
    picture = CMAE.draw(params, state, BATCH, jax.random.key(15), spec)["reconstruction"]
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.std() > 5
    raw = CMAE.raw_features(BATCH)["pooled"]
    assert raw.shape == (3, 64) and (np.diff(raw, axis=1) >= 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_ratio": 0.01}, "visible"),
        ({"masker": "blocks"}, "did you mean 'block'"),
        ({"width": 15}, "multiple"),
        ({"chamfer": "l3"}, "unknown chamfer"),
        ({"pairing": "every"}, "unknown pairing"),
        ({"scale": (1.0, 0.5)}, "scale"),
        ({"token_widths": (8, 8)}, "token_widths"),
    ],
)
def test_what_cannot_work_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PointCmae(**(SMALL | SMALL_DECODER | arguments))


def test_data_without_points_or_with_too_few_is_refused() -> None:
    with pytest.raises(UserError, match="no 'points'"):
        CMAE.points_of({"image": BATCH["points"]})
    with pytest.raises(UserError, match="too few"):
        CMAE.points_of({"points": BATCH["points"][:, :7]})


def test_forward_of_the_reference_case(shared: Path) -> None:
    case = Case.read(shared / "goldens" / "point_cmae" / "a")
    with jax.enable_x64(True):
        system = interop.system_of(case)
        tensors = {name: value for name, value in case.weights.items() if not name.startswith("finetune/")}
        loaded = interop.load(tensors, system, interop.POINT_CMAE)
        found = interop.replay_forward(case, system, loaded) | interop.replay_chamfer(case)
    found |= interop.replay_schedule(case) | interop.replay_counts(loaded)
    rows = [compare(name, case.outputs[name], value) for name, value in found.items() if name in case.outputs]
    assert len(rows) > 25
    assert not [row for row in rows if not row.agrees]


def test_point_mae_layout_names_every_parameter_and_classifiers_start_from_its_files(tmp_path: Path) -> None:
    system = PointMae(**SMALL, **SMALL_DECODER)
    generator = np.random.default_rng(0)
    shapes = jax.eval_shape(system.init, jax.random.key(0), {})
    fresh = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), shapes)
    names = interop.official_names({**fresh.params, **fresh.state}, POINT_MAE)
    assert "MAE_encoder.blocks.blocks.0.attn.qkv.weight" in names and "decoder_pos_embed.0.weight" in names
    again = interop.load(names, system, POINT_MAE)
    jax.tree.map(np.testing.assert_array_equal, tuple(again), tuple(fresh))
    save_file(names, tmp_path / "official.safetensors")
    classifier = PointClassifier(**SMALL, num_classes=3, points=24, frozen=True)
    own = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(classifier.init, jax.random.key(0), {}))
    started = start_from(classifier, own, tmp_path / "official.safetensors")
    np.testing.assert_array_equal(started.state["encoder"]["norm"]["scale"], fresh.params["encoder"]["norm"]["scale"])
    given = fresh.state[STATISTICS]["encoder"]["tokenizer"]["local_norm"]["mean"]
    np.testing.assert_array_equal(started.state[STATISTICS]["encoder"]["tokenizer"]["local_norm"]["mean"], given)
