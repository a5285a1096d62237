"""SparK: what the card says has to hold, the paper's sizes, its panels, and its reference case."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.config import load_config
from maskae.errors import UserError
from maskae.experiment import build
from maskae.interop.case import Case, leading
from maskae.interop.parity import compare
from maskae.interop.spark_medical import replay_spark, spark_of
from maskae.masking import draw_noise
from maskae.nn.patches import patchify
from maskae.nn.sparse_conv import visible_at
from maskae.systems.contract import System, Variables
from maskae.systems.spark_medical import SparK

SMALL: dict[str, Any] = {"image_size": 32, "channels": 1, "network": "resnet18", "layers": (1, 1), "widths": (4, 6), "decoder_width": 8}
SMALL |= {"mean": (0.5,), "std": (0.25,)}
SPARK = SparK(**SMALL, drop_path=0.1)
BATCH = {"image": jax.random.uniform(jax.random.key(1), (3, 32, 32, 1)), "example": jnp.arange(3)}
VARIABLES: Variables = jax.jit(lambda: SPARK.init(jax.random.key(0), BATCH))()
VISIBLE = SPARK.visible(draw_noise(jax.random.key(2), BATCH["example"], 16), (4, 4))
IMAGES = SPARK.normalised(BATCH["image"])


@partial(jax.jit, static_argnums=2)
def forward(images: jax.Array, visible: jax.Array, train: bool = True) -> dict[str, Any]:
    named, _ = SPARK.forward(VARIABLES, images, visible, train=train)
    return named | {"loss": SPARK.reconstruction_loss(named["rec_image"], images, visible)[0]}


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_sizes_and_flops_of_the_paper() -> None:
    paper = SparK()
    assert isinstance(paper, System)
    params = jax.eval_shape(paper.init, jax.random.key(0), {}).params
    assert count(params["encoder"]) == 23_508_032
    densify = {name: part for name, part in params["decoder"].items() if name.startswith("densify")}
    assert count(densify) / 1e6 == pytest.approx(6.2, abs=0.05)
    assert (count(params["decoder"]) - count(densify)) / 1e6 == pytest.approx(23.2, abs=0.05)
    batch = {"image": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)}
    assert paper.forward_flops(batch) / 2e9 == pytest.approx(16.4, abs=0.05)
    assert paper.kept((7, 7)) == 20
    odd = jax.eval_shape(SparK(decoder_width=50).init, jax.random.key(0), {}).params["decoder"]
    assert [odd[f"block{i}"]["conv2"]["kernel"].shape[2:] for i in range(5)] == [(50, 25), (25, 12), (12, 6), (6, 3), (3, 1)]
    assert paper.decoder(False).densify_norm == "bn" and SparK(network="convnext_small").decoder(False).densify_norm == "ln"


@pytest.mark.parametrize(("word", "norm"), [("BN", "bn"), ("ln", "ln"), ("", "none"), ("identity", "none")])
def test_every_other_word_of_a_case_is_no_densify_norm(word: str, norm: str) -> None:
    options = {"encoder": "resnet", "block": "BasicBlock", "layers": [1, 1], "channels": [4, 6], "input_size": 32, "decoder_width": 8}
    assert spark_of(options | {"mask_ratio": 0.6, "densify_norm": word}, 3).densify_norm == norm


def test_as_many_cells_are_seen_in_every_image_and_hidden_pixels_have_no_influence() -> None:
    np.testing.assert_array_equal(VISIBLE.sum((1, 2)), 6)
    hidden = ~visible_at(VISIBLE, (32, 32))[..., None]
    mine, other = forward(IMAGES, VISIBLE), forward(jnp.where(hidden, 9.0, IMAGES), VISIBLE)
    for name in ("stem_conv", "stem_bn", "stem_pool", "feature1", "feature2"):
        covered = ~np.asarray(visible_at(VISIBLE, mine[name].shape[1:3]))
        assert np.abs(np.asarray(mine[name])[covered]).max() == 0, name
    np.testing.assert_array_equal(mine["rec_image"], other["rec_image"])
    assert mine["rec_image"].shape == (3, 32, 32, 1)


def test_with_everything_visible_the_encoder_is_the_dense_one() -> None:
    for train in (True, False):
        sparse = forward(IMAGES, jnp.ones_like(VISIBLE), train)
        dense, _ = SPARK.encode(VARIABLES.params["encoder"], VARIABLES.state["encoder"], IMAGES, train=train)
        for i, each in enumerate(dense.maps):
            np.testing.assert_allclose(sparse[f"feature{i + 1}"], each, atol=1e-5 * float(jnp.abs(each).max()))


def test_the_loss_is_that_of_hidden_cells_blind_to_brightness_and_zero_where_predicted() -> None:
    loss, trivial = SPARK.reconstruction_loss(IMAGES, IMAGES, VISIBLE)
    target, hidden = SPARK.reconstruction_loss, np.asarray(visible_at(VISIBLE, (32, 32)))[..., None]
    values = 64
    assert float(trivial) == pytest.approx((values - 1) / values, rel=1e-4)
    seen = target(jnp.where(hidden, 7.0, jnp.zeros_like(IMAGES)), IMAGES, VISIBLE)[0]
    assert float(seen) == pytest.approx(float(trivial), rel=1e-6)
    patches = patchify(IMAGES, 8)
    perfect = (patches - patches.mean(-1, keepdims=True)) / jnp.sqrt(patches.var(-1, keepdims=True, ddof=1) + 1e-6)
    back = perfect.reshape(3, 4, 4, 8, 8, 1).transpose(0, 1, 3, 2, 4, 5).reshape(3, 32, 32, 1)
    assert float(target(back, IMAGES, VISIBLE)[0]) < 1e-10
    assert float(target(back, 3 * IMAGES + 2, VISIBLE)[0]) < 1e-8
    flat = jnp.ones_like(IMAGES)
    assert float(target(jnp.zeros_like(flat), flat, VISIBLE)[1]) == 0 and float(loss) > 0


def test_loss_moves_statistics_and_its_draws_follow_the_examples() -> None:
    run = jax.jit(lambda batch: SPARK.loss(*VARIABLES, batch, jax.random.key(5), jnp.int32(0)))
    loss, outputs = run(BATCH)
    order = jnp.asarray([2, 0, 1])
    assert float(run({name: value[order] for name, value in BATCH.items()})[0]) == pytest.approx(float(loss), rel=1e-5)
    assert jax.tree.structure(outputs.state) == jax.tree.structure(VARIABLES.state)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), outputs.state, VARIABLES.state)
    assert all(jax.tree.leaves(moved))


def test_features_and_panels() -> None:
    found = SPARK.features(*VARIABLES, BATCH)
    assert found["pooled"].shape == (3, 6) and found["tokens"].shape == (3, 16, 6)
    panels = SPARK.reconstruct(*VARIABLES, BATCH, jax.random.key(2))
    assert set(panels) == set(SPARK.panel_labels)
    seen = np.asarray(visible_at(VISIBLE, (32, 32)))[..., None]
    for panel in panels.values():
        np.testing.assert_array_equal(np.where(seen, panel, 0), np.where(seen, BATCH["image"], 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "resnet19"}, "unknown network 'resnet19' \\(did you mean 'resnet18'"),
        ({"image_size": 36}, "image_size=36 is no multiple of 8"),
        ({"mask_ratio": 0.99}, "mask_ratio=0.99 keeps 0 of 16 cells"),
        ({"decoder_width": 6}, "decoder_width=6 does not halve 3 times"),
        ({"densify_norm": "bm"}, "unknown densify_norm 'bm'"),
        ({"mean": (0.1, 0.2)}, "mean has 2 values for images of 1 channels"),
        ({"drop_path": 1.0}, "drop_path=1.0: must be in \\[0, 1\\)"),
    ],
)
def test_arguments_that_cannot_work_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SparK(**(SMALL | options))


@pytest.mark.parametrize(
    ("variant", "override", "message"),
    [
        ("base", "model.dtype=float64", "float64 is for comparisons"),
        ("tiny", "data.channels=0", "model.channels=0: spark_medical reads pictures"),
    ],
)
def test_a_recipe_that_cannot_run_ends_in_one_line(variant: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(load_config(f"configs/spark_medical.py:{variant}", [override]))


def test_the_recorded_convnext_is_reproduced(shared: Path) -> None:
    case = Case.read(shared / "goldens" / "spark_medical" / "a")
    with jax.enable_x64(True):
        found = replay_spark(case, "convnext", "convnext.", whole=False)
    recorded = [name for name in found if name in case.outputs]
    assert len(recorded) > 25
    for name in recorded:
        stored = dataclasses.replace(found[name], value=leading(found[name].value, case.outputs[name]))
        row = compare(name, case.outputs[name], stored)
        assert row.agrees, row
