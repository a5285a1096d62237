"""MAE: what the card says has to hold, sizes, FLOPs, panels, and independence of the batch's order."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.losses.reconstruction import normalise_patches
from maskae.masking import draw_noise, random_mask
from maskae.nn.flops import block_flops
from maskae.nn.patches import patchify
from maskae.systems import SYSTEMS
from maskae.systems.contract import System
from maskae.systems.mae import Mae
from tests.drawn import drawn

SMALL: dict[str, Any] = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 2, "heads": 2}
SMALL |= {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}
MAE = Mae(**SMALL)
BATCH = {"image": jax.random.normal(jax.random.key(1), (3, 16, 16, 3)), "example": jnp.arange(3)}
PARAMS = drawn(MAE.init, jax.random.key(0), BATCH).params
NOISE = draw_noise(jax.random.key(2), BATCH["example"], 16)
SIZES: dict[str, dict[str, Any]] = {
    "base": {},
    "large": {"width": 1024, "depth": 24, "heads": 16},
    "huge": {"width": 1280, "depth": 32, "heads": 16, "patch_size": 14},
}


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_is_a_registered_system() -> None:
    assert SYSTEMS["mae"] is Mae
    assert isinstance(MAE, System)


@pytest.mark.parametrize(
    ("size", "trainable", "encoder"),
    [("base", 111_655_680, 85_647_360), ("large", 329_239_296, 303_099_904), ("huge", 656_613_964, 630_435_840)],
)
def test_parameter_counts_of_the_paper_sizes(size: str, trainable: int, encoder: int) -> None:
    params = jax.eval_shape(Mae(**SIZES[size]).init, jax.random.key(0), {}).params
    assert count(params) == trainable
    assert count(params["encoder"]) == encoder


@pytest.mark.parametrize(("size", "giga_macs"), [("base", 9.78), ("large", 20.76), ("huge", 48.56)])
def test_flops_of_the_paper_sizes(size: str, giga_macs: float) -> None:
    batch = {"image": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)}
    assert Mae(**SIZES[size]).forward_flops(batch) == pytest.approx(2e9 * giga_macs, rel=5e-4)


@pytest.mark.parametrize(("kept", "all_tokens", "ratio"), [(49, 196, 3.29), (50, 197, 3.25)])
def test_mask_tokens_in_the_encoder_cost_what_the_paper_says(kept: int, all_tokens: int, ratio: float) -> None:
    decoder = 8 * block_flops(all_tokens, 512)
    assert (24 * block_flops(all_tokens, 1024) + decoder) / (24 * block_flops(kept, 1024) + decoder) == pytest.approx(ratio, abs=5e-3)


def dot_flops(jaxpr: Any) -> float:
    """2 per multiply-add over every dot_general of a jaxpr and those inside it."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * np.prod(equation.outvars[0].aval.shape) * np.prod([left[axis] for axis in contracted])
        for value in equation.params.values():
            inner = value.jaxpr if hasattr(value, "jaxpr") else value
            if hasattr(inner, "eqns"):
                total += dot_flops(inner)
    return total


OBLONG: dict[str, Any] = {"mask_ratio": 0.5, "mlp_ratio": 3.0, "image_size": (8, 20), "decoder_depth": 2}
MASKED: dict[str, Any] = {"decoder_predicts": "masked"}
CROSS: dict[str, Any] = {"decoder_predicts": "masked", "decoder": "cross"}


@pytest.mark.parametrize("options", [{}, OBLONG, OBLONG | MASKED, OBLONG | CROSS, CROSS | {"decoder_predict_ratio": 0.4}])
def test_flops_by_formula_are_those_of_the_trace(options: dict[str, Any]) -> None:
    system = Mae(**(SMALL | options))
    rows, columns = system.grid
    batch = {"image": jnp.zeros((3, rows * 4, columns * 4, 3)), "example": jnp.arange(3)}
    params = jax.eval_shape(system.init, jax.random.key(0), batch).params
    trace = jax.make_jaxpr(lambda p: system.loss(p, {}, batch, jax.random.key(0), jnp.int32(0))[0])(params)
    assert dot_flops(trace.jaxpr) == pytest.approx(3 * system.forward_flops(batch), rel=1e-12)


def test_removed_pixels_have_exactly_no_influence_on_the_encoder() -> None:
    mask = random_mask(NOISE, 4).mask.reshape(3, 4, 4)
    removed = jnp.repeat(jnp.repeat(mask, 4, 1), 4, 2)[..., None]
    other = jnp.where(removed > 0, 100.0, BATCH["image"])
    encode = jax.jit(lambda images: MAE.forward(PARAMS, images, NOISE)["latent"])
    np.testing.assert_array_equal(encode(BATCH["image"]), encode(other))
    assert not np.array_equal(encode(BATCH["image"]), encode(other + (1 - removed)))


def test_permuting_the_kept_tokens_permutes_the_outputs() -> None:
    keep = random_mask(NOISE, 4).keep_indices
    order = jnp.asarray([2, 0, 3, 1])
    encode = jax.jit(lambda indices: MAE.encoder.apply({"params": PARAMS["encoder"]}, BATCH["image"], indices))
    straight, permuted = encode(keep), encode(keep[:, order])
    np.testing.assert_allclose(permuted[:, 1:], straight[:, 1:][:, order], atol=1e-5)
    np.testing.assert_allclose(permuted[:, 0], straight[:, 0], atol=1e-5)


def test_loss_is_that_of_the_removed_patches_and_is_near_its_trivial_value_at_the_start() -> None:
    loss, outputs = jax.jit(lambda p: MAE.loss(p, {}, BATCH, jax.random.key(2), jnp.int32(0)))(PARAMS)
    named = jax.jit(MAE.forward)(PARAMS, BATCH["image"], NOISE)
    removed = np.asarray(named["mask"]) > 0
    expected = np.mean((np.asarray(named["pred"]) - np.asarray(MAE.target(BATCH["image"])))[removed] ** 2)
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(outputs.metrics["trivial_loss"]) == pytest.approx(47 / 48, rel=1e-4)
    assert outputs.state == {}


def test_loss_does_not_depend_on_the_order_of_the_batch() -> None:
    order = jnp.asarray([2, 0, 1])
    shuffled = {name: value[order] for name, value in BATCH.items()}
    loss = jax.jit(lambda batch: MAE.loss(PARAMS, {}, batch, jax.random.key(5), jnp.int32(0))[0])
    assert float(loss(BATCH)) == pytest.approx(float(loss(shuffled)), rel=1e-6)


def test_predicting_masked_patches_alone_changes_neither_loss_nor_gradients_nor_panels() -> None:
    masked = dataclasses.replace(MAE, **MASKED)
    key = jax.random.key(2)

    def run(system: Mae) -> tuple[Any, Any, Any]:
        value, gradients = jax.value_and_grad(lambda p: system.loss(p, {}, BATCH, key, jnp.int32(0))[0])(PARAMS)
        return value, gradients, system.reconstruct(PARAMS, {}, BATCH, key)

    everything, some = jax.jit(run, static_argnums=0)(MAE), jax.jit(run, static_argnums=0)(masked)
    assert float(everything[0]) == pytest.approx(float(some[0]), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), everything[1:], some[1:])
    assert masked.forward(PARAMS, BATCH["image"], NOISE)["pred"].shape == (3, 12, 48)


def test_the_cross_decoder_predicts_each_patch_by_itself() -> None:
    whole = Mae(**SMALL, **CROSS, scan=True)
    part = dataclasses.replace(whole, decoder_predict_ratio=0.5)
    params = jax.jit(lambda: whole.init(jax.random.key(0), BATCH).params)()

    def run(params: Any) -> tuple[Any, ...]:
        noise = whole.noise(BATCH["image"], BATCH["example"], jax.random.key(2))
        loss, to_params = jax.value_and_grad(lambda p: part.loss_given_noise(p, BATCH["image"], noise)[0])(params)
        named, some = (each.forward(params, BATCH["image"], noise) for each in (whole, part))
        return named, some, loss, to_params, part.reconstruct(params, {}, BATCH, jax.random.key(2))

    named, some, loss, to_params, panels = jax.tree.map(np.asarray, jax.jit(run)(params))
    assert named["pred"].shape == (3, 12, 48)
    np.testing.assert_allclose(named["pred"][:, :6], some["pred"], atol=1e-6)
    np.testing.assert_array_equal(np.take_along_axis(named["mask"], named["ids_predicted"], 1), 1)
    target = np.take_along_axis(np.asarray(whole.target(BATCH["image"])), some["ids_predicted"][:, :, None], 1)
    assert float(loss) == pytest.approx(float(np.mean((some["pred"] - target) ** 2)), rel=1e-5)
    assert all(leaf.any() for path, leaf in jax.tree_util.tree_leaves_with_path(to_params) if "bias" not in str(path))
    # The panels put every prediction where its patch was, also those that the loss leaves out.
    shown = normalise_patches(patchify(panels["prediction_with_patch_statistics"], 4))
    expected = normalise_patches(jnp.asarray(named["pred"]))
    np.testing.assert_allclose(np.take_along_axis(np.asarray(shown), named["ids_predicted"][:, :, None], 1), expected, atol=1e-3)


@pytest.mark.parametrize("masker", ["block", "grid"])
def test_the_ablations_maskers_run_in_the_loss(masker: str) -> None:
    loss, _ = dataclasses.replace(MAE, masker=masker).loss(PARAMS, {}, BATCH, jax.random.key(5), jnp.int32(0))
    assert 0.5 < float(loss) < 5


def test_sharded_loss_and_gradients_are_those_of_one_device() -> None:
    if jax.device_count() < 8:
        pytest.skip("needs eight simulated devices")
    batch = {"image": jax.random.normal(jax.random.key(1), (8, 16, 16, 3)), "example": jnp.arange(8)}
    run = jax.value_and_grad(lambda p, b: MAE.loss(p, {}, b, jax.random.key(5), jnp.int32(0))[0])
    alone = jax.jit(run)(PARAMS, batch)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
        together = jax.jit(run)(PARAMS, jax.device_put(batch, rows))
    assert float(alone[0]) == pytest.approx(float(together[0]), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone[1], together[1])


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_features_are_float32_pooled_as_asked_and_need_no_decoder(pool: str) -> None:
    system = dataclasses.replace(MAE, pool=pool, dtype="bfloat16")
    found = system.features({"encoder": PARAMS["encoder"]}, {}, BATCH)
    assert found["tokens"].shape == (3, 16, 16)
    assert {value.dtype for value in found.values()} == {jnp.dtype("float32")}
    np.testing.assert_allclose(found["pooled"], found["tokens"].mean(1) if pool == "mean" else found["cls"], atol=1e-6)


def test_other_and_oblong_sizes_work() -> None:
    batch = {"image": jnp.zeros((2, 8, 24, 3)), "example": jnp.arange(2)}
    assert jax.eval_shape(lambda: MAE.features(PARAMS, {}, batch))["tokens"].shape == (2, 12, 16)
    loss = jax.jit(lambda: MAE.loss(PARAMS, {}, batch, jax.random.key(0), jnp.int32(0))[0])
    assert bool(jnp.isfinite(loss()))
    oblong = Mae(**(SMALL | {"image_size": (8, 24)}))
    assert oblong.grid == (2, 6)
    assert jax.eval_shape(lambda: oblong.reconstruct(PARAMS, {}, batch, jax.random.key(0)))["prediction"].shape == (2, 8, 24, 3)


class Perfect(Mae):
    """Predicts the target."""

    def forward(self, params: Any, images: jax.Array, noise: jax.Array, collect: bool = False) -> dict[str, Any]:
        return super().forward(params, images, noise, collect) | {"pred": self.target(images)}


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_panels_are_what_their_labels_say(norm_pix_loss: bool) -> None:
    system = Perfect(**SMALL, norm_pix_loss=norm_pix_loss)
    panels = system.reconstruct(PARAMS, {}, BATCH, jax.random.key(2))
    assert set(panels) == set(system.panel_labels)
    mask = random_mask(NOISE, 4).mask.reshape(3, 4, 4)
    removed = np.asarray(jnp.repeat(jnp.repeat(mask, 4, 1), 4, 2)[..., None]) > 0
    image = np.asarray(BATCH["image"])
    np.testing.assert_array_equal(panels["original"], image)
    np.testing.assert_array_equal(panels["masked"], np.where(removed, 0, image))
    np.testing.assert_allclose(panels["prediction_with_patch_statistics"], image, atol=1e-4)
    np.testing.assert_array_equal(np.where(removed, image, panels["prediction"]), image)
    if norm_pix_loss:
        # The hidden patches' own brightness must not leak into the raw prediction.
        brighter = BATCH | {"image": BATCH["image"] + 50.0 * removed}
        np.testing.assert_allclose(
            np.where(removed, system.reconstruct(PARAMS, {}, brighter, jax.random.key(2))["prediction"], 0),
            np.where(removed, panels["prediction"], 0),
            atol=1e-3,
        )
        assert "mean statistics of the kept patches" in system.panel_labels["prediction"]
    else:
        np.testing.assert_allclose(panels["prediction"], image, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "meen"}, "unknown pool 'meen' \\(did you mean 'mean'"),
        ({"masker": "randm"}, "unknown masker 'randm' \\(did you mean 'random'"),
        ({"dtype": "bfloat"}, "unknown dtype 'bfloat' \\(did you mean 'bfloat16'"),
        ({"remat": "al"}, "unknown remat 'al'; there are none, dots, full, offload"),
        ({"heads": 3}, "width=16 is not a multiple of its 3 heads"),
        ({"decoder_heads": 3}, "decoder_width=8 is not a multiple of its 3 heads"),
        ({"image_size": 18}, "patch size 4 does not divide an image of 18 x 18"),
        ({"keep": 16}, "keep 1 to 15"),
        ({"mask_ratio": 0.99}, "keep 0 of 16 patches"),
        ({"decoder": "crss"}, "unknown decoder 'crss' .did you mean 'cross'"),
        ({"decoder": "cross"}, "set decoder_predicts='masked'"),
        ({"decoder_predicts": "maske"}, "did you mean 'masked'"),
        (MASKED | {"decoder_predict_ratio": 0.0}, "decoder_predict_ratio=0.0: must be above 0"),
        (MASKED | {"decoder_predict_ratio": 0.5, "masker": "grid"}, "needs decoder_predicts='masked' and masker='random'"),
    ],
)
def test_arguments_that_cannot_work_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mae(**(SMALL | options))
