"""MR-MAE on both backbones, and the masked-convolution backbone: what the card says has to hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.interop import mr_mae as interop
from maskae.interop.case import Case
from maskae.interop.parity import compare
from maskae.masking import draw_noise, random_mask
from maskae.optim import layer_decay_scales
from maskae.paths import flatten_paths
from maskae.systems import SYSTEMS
from maskae.systems.contract import System
from maskae.systems.mae import Mae
from maskae.systems.mc_mae import McFineTune, McMae
from maskae.systems.mr_mae import MrMae, MrMcMae
from tests.drawn import drawn

SIZES: dict[str, Any] = {"patch_size": 4, "width": 16, "depth": 2, "heads": 2}
DECODER: dict[str, Any] = {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}
STAGES: dict[str, Any] = {"strides": (1, 2, 2), "conv_widths": (4, 8), "conv_depths": (1, 1)}
TEACHERS = {"one": {"weights": "random", **SIZES}, "two": {"weights": "random", **SIZES, "width": 24, "depth": 1}}
MIMIC = MrMae(image_size=16, **SIZES, **DECODER, teachers=TEACHERS, focus="random", mimic_layers=(1, 2))
MCMAE = McMae(image_size=16, **SIZES, **DECODER, **STAGES)
BATCH = {"image": jax.random.normal(jax.random.key(1), (3, 16, 16, 3)), "example": jnp.arange(3)}
VARIABLES = drawn(MIMIC.init, jax.random.key(0), BATCH)
RNG = jax.random.key(2)
CONV = drawn(MCMAE.init, jax.random.key(0), BATCH).params
MASK = random_mask(draw_noise(RNG, BATCH["example"], 16), 4)


def largest(tree: Any) -> float:
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def gradient(system: Any, params: Any, state: Any) -> tuple[jax.Array, Any]:
    return jax.jit(jax.value_and_grad(lambda p: system.loss(p, state, BATCH, RNG, 0)[0]))(params)


def test_they_are_registered_systems() -> None:
    for name, kind in {"mr_mae": MrMae, "mr_mc_mae": MrMcMae, "mc_mae": McMae, "mc_mae_finetune": McFineTune}.items():
        assert SYSTEMS[name] is kind
    assert isinstance(MIMIC, System)


def test_without_mimicry_it_is_mae() -> None:
    mae = Mae(image_size=16, **SIZES, **DECODER)
    own = {name: VARIABLES.params[name] for name in ("encoder", "decoder")}
    expected, expected_grads = gradient(mae, own, {})
    loss, grads = gradient(dataclasses.replace(MIMIC, mimic_weight=0.0), *VARIABLES)
    assert loss == expected
    for path, leaf in flatten_paths(expected_grads).items():
        np.testing.assert_allclose(flatten_paths(grads)[path], leaf, atol=1e-7, err_msg=path)
    assert largest(grads["mimic"]) == 0


def test_mimicry_alone_does_not_touch_the_decoder() -> None:
    _, grads = gradient(dataclasses.replace(MIMIC, reconstruction_weight=0.0), *VARIABLES)
    assert largest(grads["decoder"]) == 0
    assert largest(grads["encoder"]) > 0
    assert all(largest(tap) > 0 for head in grads["mimic"].values() for tap in head.values())


def test_a_zero_map_has_a_mimic_loss_of_1_per_teacher() -> None:
    silent = VARIABLES.params | {"mimic": jax.tree.map(jnp.zeros_like, VARIABLES.params["mimic"])}
    _, outputs = jax.jit(MIMIC.loss)(silent, VARIABLES.state, BATCH, RNG, 0)
    assert float(outputs.metrics["mimic_loss"]) == pytest.approx(2.0, abs=1e-3)


def test_a_student_equal_to_its_teacher_mimics_it_exactly() -> None:
    twin = MrMae(image_size=16, **SIZES, **DECODER, teachers={"one": TEACHERS["one"]}, keep=15, mimic_layers=(2,), whiten=False)
    params, state = jax.jit(twin.init)(jax.random.key(0), BATCH)
    teacher = {name: leaf for name, leaf in params["encoder"].items() if name != "norm"}
    teacher["position"] = state["teacher"]["one"]["position"]
    params["mimic"]["one"]["tap_2"]["out"] = {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}
    # `forward` removes at least one patch, so all of them are encoded here.
    everything = random_mask(jnp.broadcast_to(jnp.arange(16.0), (3, 16)), 16)

    @jax.jit
    def mimic(params: Any, teacher: Any) -> tuple[jax.Array, jax.Array]:
        seen = twin.look({"teacher": {"one": teacher}}, BATCH["image"])
        named = twin.encode(params["encoder"], BATCH["image"], everything, collect=True) | {"ids_keep": everything.keep_indices}
        return twin.mimic_loss(params["mimic"], named, seen)

    loss, trivial = mimic(params, teacher)
    assert float(loss) == pytest.approx(0.0, abs=1e-9)
    assert float(trivial) > 0.01


def test_the_order_of_visible_tokens_does_not_matter() -> None:
    seen = jax.jit(MIMIC.look)(VARIABLES.state, BATCH["image"])
    noise = jnp.argsort(jnp.argsort(draw_noise(RNG, BATCH["example"], 16), axis=1), axis=1)
    turned = jnp.where(noise < 4, 3 - noise, noise)
    run = jax.jit(lambda n: MIMIC.loss_given_seen(VARIABLES.params, seen, BATCH["image"], n)[1])
    for name in ("reconstruction_loss", "mimic_loss"):
        assert float(run(turned)[name]) == pytest.approx(float(run(noise)[name]), rel=1e-5)


def test_kept_tokens_of_the_convolutions_do_not_see_removed_patches() -> None:
    removed = jnp.repeat(jnp.repeat(MASK.mask.reshape(3, 4, 4, 1), 4, 1), 4, 2)
    other = BATCH["image"] + removed * 5
    encode = jax.jit(lambda images: MCMAE.encode(CONV["encoder"], images, MASK)["latent"])
    np.testing.assert_array_equal(encode(other), encode(BATCH["image"]))

    @jax.jit
    def unmasked(images: jax.Array) -> jax.Array:
        stem: Any = MCMAE.encoder.apply({"params": CONV["encoder"]}, images)["tokens"]
        return jnp.take_along_axis(stem, MASK.keep_indices[:, :, None], axis=1)

    assert float(jnp.abs(unmasked(other) - unmasked(BATCH["image"])).max()) > 1e-3


def test_everything_kept_is_the_unmasked_network() -> None:
    everything = random_mask(jnp.broadcast_to(jnp.arange(16.0), (3, 16)), 16)
    encode = jax.jit(
        lambda params: (MCMAE.encode(params["encoder"], BATCH["image"], everything)["latent"], MCMAE.features(params, {}, BATCH))
    )
    masked, features = encode(CONV)
    np.testing.assert_allclose(features["tokens"], masked, atol=1e-6)


def test_mimicry_goes_with_the_convolutional_backbone() -> None:
    system = MrMcMae(image_size=16, **SIZES, **DECODER, **STAGES, teachers={"one": TEACHERS["one"]})
    shapes = jax.eval_shape(system.init, jax.random.key(0), BATCH)
    # Traced, not compiled: gradients of these convolutions compile slowly on CPUs, and the reference case holds them.
    (loss, outputs), grads = jax.eval_shape(jax.value_and_grad(system.loss, has_aux=True), *shapes, BATCH, RNG, 0)
    assert loss.shape == ()
    assert {"mimic_loss", "reconstruction_loss", "trivial_loss"} == set(outputs.metrics)
    assert set(flatten_paths(grads)) == set(flatten_paths(shapes.params))
    panels = jax.eval_shape(system.reconstruct, *shapes, BATCH, RNG)
    assert set(panels) == set(system.panel_labels)
    assert {panel.shape for panel in panels.values()} == {(3, 16, 16, 3)}


def test_sizes_of_the_released_backbone() -> None:
    params = jax.eval_shape(McMae(patch_size=16).init, jax.random.key(0), {}).params
    count = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()}
    fusion = sum(leaf.size for path, leaf in flatten_paths(params["encoder"]).items() if path.startswith("fusion"))
    assert (count["encoder"] - fusion, fusion, count["decoder"]) == (84_455_296, 4_326_912, 26_008_320)
    batch: Any = {"image": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)}
    assert McMae().forward_flops(batch) == pytest.approx(2e9 * 17.2, rel=0.02)
    whole = jax.eval_shape(McFineTune().init, jax.random.key(0), {}).params
    assert sum(leaf.size for leaf in jax.tree.leaves(whole)) == 85_374_824


def test_fine_tuning_takes_the_backbone_and_decays_layers_as_released() -> None:
    tune = McFineTune(image_size=16, **SIZES, **STAGES, num_classes=5, drop_path=0.3)
    variables = tune.with_encoder(drawn(tune.init, jax.random.key(3), BATCH, seed=3), CONV["encoder"])
    taken, given = flatten_paths(variables.params["encoder"]), flatten_paths(CONV["encoder"])
    assert all((leaf == given[path]).all() for path, leaf in taken.items() if path != "position")
    loss, _ = jax.eval_shape(tune.loss, *variables, BATCH | {"label": jnp.asarray([0, 1, 2])}, RNG, 0)
    assert loss.shape == ()
    scales = flatten_paths(layer_decay_scales(variables.params, 0.65))
    assert scales["encoder/patch_embed/stage2_block_0/conv1/kernel"] == pytest.approx(0.65**3)
    assert scales["encoder/position"] == pytest.approx(0.65**3)
    assert scales["encoder/block_0/norm1/scale"] == pytest.approx(0.65**2)
    assert scales["head/kernel"] == 1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="there is nobody to mimic"):
        dataclasses.replace(MIMIC, teachers={})
    with pytest.raises(UserError, match="the encoder has the blocks 1 to 2"):
        dataclasses.replace(MIMIC, mimic_layers=(3,))
    with pytest.raises(UserError, match="three whose product is patch_size=4"):
        dataclasses.replace(MCMAE, strides=(2, 2, 2))
    with pytest.raises(UserError, match="has no CLS token"):
        dataclasses.replace(MCMAE, pool="cls")


def test_the_papers_code_gives_the_same_backbone(shared: Path) -> None:
    case = Case.read(shared / "goldens" / "mr_mae" / "a")
    system = interop.system_of(case)
    found = interop.replay_forward(case, system, interop.params_of(case, system, case.weights))
    rows = [compare(name, case.outputs[name], value) for name, value in found.items()]
    assert len(rows) >= 15
    assert [row for row in rows if not row.agrees] == []


def test_the_classifier_without_global_pool_looks_at_the_first_patch(shared: Path) -> None:
    case = Case.read(shared / "goldens" / "mr_mae" / "a")
    record = case.record | {"finetune": case.record["finetune"] | {"global_pool": False}}
    kernel = "ft_grad/blocks1.0.conv1.weight"
    changed = dataclasses.replace(case, record=record, outputs=case.outputs | {kernel: np.zeros((12, 12, 1, 1))})
    found = interop.replay_finetune(changed)
    features = np.asarray(found["ft_features"].value)
    scale, bias = case.weights["norm.weight"], case.weights["norm.bias"]
    plain = (features - bias) / scale
    np.testing.assert_allclose(plain.mean(-1), 0, atol=1e-4)
    assert not compare("ft_features", case.outputs["ft_features"], found["ft_features"]).agrees
    # Kernels are of four axes, as maps are, but stand in the record as they are.
    assert found[kernel].value.shape == (12, 12, 1, 1)
