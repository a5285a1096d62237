"""MaskAlign: what the card says has to hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.interop import mask_align as interop
from maskae.interop.case import Case
from maskae.interop.parity import compare
from maskae.systems import SYSTEMS
from maskae.systems.contract import System, Variables
from maskae.systems.mask_align import MaskAlign, layer_weights

SIZES: dict[str, Any] = {"patch_size": 4, "width": 16, "depth": 3, "heads": 2}
ALIGN = MaskAlign(image_size=16, **SIZES, teacher={"weights": "random", **SIZES, "width": 24}, layer_weights="top2", drop_path=0.0)
BATCH = {"image": jax.random.normal(jax.random.key(1), (3, 16, 16, 3)), "example": jnp.arange(3)}
VARIABLES = jax.jit(ALIGN.init)(jax.random.key(0), BATCH)
DRAWS = ALIGN.draws(BATCH["image"], BATCH["example"], jax.random.key(2))


def loss_of(system: MaskAlign, params: Any, state: Any, draws: jax.Array) -> jax.Array:
    return interop.loss_of(system, params, state, BATCH["image"], draws)


@pytest.fixture(scope="module")
def gradients() -> Variables:
    """Of the loss, with respect to parameters and state."""
    return Variables(*jax.jit(jax.grad(lambda p, s: loss_of(ALIGN, p, s, DRAWS), argnums=(0, 1)))(*VARIABLES))


def test_is_a_registered_system() -> None:
    assert SYSTEMS["mask_align"] is MaskAlign
    assert isinstance(ALIGN, System)


def test_sizes_and_flops_of_the_paper() -> None:
    paper = MaskAlign(teacher={"architecture": "clip"})
    params = jax.eval_shape(paper.init, jax.random.key(0), {}).params
    count = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()}
    assert count == {"encoder": 85_647_360, "fusion": 144} | {f"adaptor_{layer}": 768 * 769 for layer in range(7, 12)}
    batch: Any = {"image": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)}
    assert paper.forward_flops(batch) == pytest.approx(2e9 * (5.19 + 0.17 + 17.56), rel=1e-3)
    assert paper.train_flops(batch) == pytest.approx(67.3e9, rel=2e-3)
    assert paper.kept(paper.grid) == 58


def test_a_student_equal_to_its_teacher_has_no_loss() -> None:
    twin = dataclasses.replace(
        ALIGN, teacher={"weights": "random", **SIZES}, masker="random", keep=16, fusion="simple", target="none", layer_weights="mean"
    )
    params, state = jax.jit(twin.init)(jax.random.key(0), BATCH)
    position = state["teacher"]["position"]
    state = {"teacher": {name: leaf for name, leaf in params["encoder"].items() if name != "norm"} | {"position": position}}
    adaptors = {f"adaptor_{layer}": {"out": {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}} for layer in range(3)}
    # Patches in raster order: sums over tokens round alike.
    raster = jnp.broadcast_to(jnp.arange(16.0), (3, 16))
    whitened = dataclasses.replace(twin, target="whiten")
    losses = jax.jit(lambda p: [loss_of(system, p, state, raster) for system in (twin, whitened)])(params | adaptors)
    assert float(losses[0]) == pytest.approx(0.0, abs=1e-10)
    assert float(losses[1]) > 0.01


def test_fusion_starts_near_its_own_layer_or_at_the_mean() -> None:
    mix = VARIABLES.params["fusion"]["scale"]
    np.testing.assert_allclose(mix, np.eye(3) + 0.01, rtol=1e-6)
    summed = dataclasses.replace(ALIGN, fusion="sum", depth=2)
    np.testing.assert_array_equal(
        jax.jit(lambda key: summed.init(key, BATCH).params["fusion"]["scale"])(jax.random.key(0)), np.full((3, 2), 0.5)
    )


def test_gradients_go_where_they_should(gradients: Variables) -> None:
    assert set(VARIABLES.params) == {"encoder", "fusion", "adaptor_1", "adaptor_2"}
    mix = gradients.params["fusion"]["scale"]
    assert (mix[0] == 0).all()
    assert (mix[1:] != 0).all()
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients.params["encoder"]["norm"]))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients.state))
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradients.params["adaptor_1"]))


def test_the_order_of_kept_patches_does_not_matter() -> None:
    keep = ALIGN.kept(ALIGN.grid)
    chance = dataclasses.replace(ALIGN, masker="random")
    noise = jnp.argsort(jnp.argsort(DRAWS, axis=1), axis=1)
    reversed_order = jnp.where(noise < keep, keep - 1 - noise, noise)
    run = jax.jit(lambda n: loss_of(chance, VARIABLES.params, VARIABLES.state, n))
    assert float(run(reversed_order)) == pytest.approx(float(run(noise)), rel=1e-5)
    assert float(run(-noise)) != pytest.approx(float(run(noise)), rel=1e-5)


def test_zero_adaptors_give_the_trivial_loss() -> None:
    silent = VARIABLES.params | {f"adaptor_{i}": jax.tree.map(jnp.zeros_like, VARIABLES.params["adaptor_1"]) for i in (1, 2)}
    square = dataclasses.replace(ALIGN, distance="l2", drop_path=0.5)
    loss, outputs = jax.jit(square.loss)(silent, VARIABLES.state, BATCH, jax.random.key(3), 0)
    assert float(loss) == pytest.approx(1.0, abs=1e-3)
    assert float(outputs.metrics["trivial_loss"]) == pytest.approx(float(loss), rel=1e-6)


def test_layer_weights() -> None:
    assert layer_weights("mean", 4) == (0.25,) * 4
    assert layer_weights("out", 3) == (0, 0, 1)
    assert layer_weights("top2", 4) == (0, 0, 0.5, 0.5)
    assert layer_weights("mid1", 4) == (0, 1, 0, 0)
    np.testing.assert_allclose(layer_weights("linear_decay", 4), np.arange(4) / 6)
    for wrong in ("top0", "top5", "mid4"):
        with pytest.raises(UserError, match="the teacher has 4 layers"):
            layer_weights(wrong, 4)
    with pytest.raises(UserError, match="unknown layer_weights 'top'"):
        layer_weights("top", 4)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="2 student and 3 teacher layers; take fusion='sum'"):
        dataclasses.replace(ALIGN, depth=2)
    with pytest.raises(UserError, match="unknown adaptor 'mpl'"):
        dataclasses.replace(ALIGN, adaptor="mpl")
    with pytest.raises(UserError, match="keep 0 of 16 patches"):
        dataclasses.replace(ALIGN, mask_ratio=0.99)
    with pytest.raises(UserError, match="the teacher has no weights"):
        dataclasses.replace(ALIGN, teacher=SIZES).begin(VARIABLES, SimpleNamespace())


def test_panels_show_what_the_teacher_looks_at() -> None:
    panels = jax.jit(ALIGN.reconstruct)(*VARIABLES, BATCH, jax.random.key(4))
    assert set(panels) == set(ALIGN.panel_labels)
    cells = np.asarray(panels["kept"]).reshape(3, 4, 4, 4, 4, 3)
    assert ((cells != 0).any((2, 4, 5)).sum((1, 2)) == ALIGN.kept(ALIGN.grid)).all()
    np.testing.assert_array_equal(panels["original"], BATCH["image"])


def test_the_papers_code_gives_the_same_features_and_losses(shared: Path) -> None:
    case = Case.read(shared / "goldens" / "mask_align" / "a")
    system = interop.system_of(case)
    variables = Variables(interop.student_of(case, system), interop.recorded_teacher(case, system))
    found = interop.replay_forward(case, system, variables)
    rows = [compare(name, case.outputs[name], value) for name, value in found.items()]
    assert len(rows) >= 11
    assert [row for row in rows if not row.agrees] == []


def test_a_recorded_teacher_has_the_recorded_sizes() -> None:
    record = {"hidden_act": "gelu", "patch_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "layer_norm_eps": 1e-12}
    for width, hidden in ((44, 60), (52, 120), (32, 96)):
        teacher = interop.teacher_of(record | {"hidden_size": width, "intermediate_size": hidden}, "vit")
        assert int(width * teacher["mlp_ratio"]) == hidden


def test_a_recorded_teacher_may_lack_biases(shared: Path) -> None:
    case = Case.read(shared / "goldens" / "mask_align" / "a")
    dino = dataclasses.replace(interop.system_of(case), teacher=interop.teacher_of(case.record["dino_teacher"], "vit"))
    parts = tuple(f"attention.attention.{part}.bias" for part in ("query", "key", "value"))
    bare = dataclasses.replace(case, weights={name: leaf for name, leaf in case.weights.items() if not name.endswith(parts)})
    with pytest.raises(UserError, match="attention/qkv/bias"):
        interop.recorded_teacher(bare, dino)
    told = dataclasses.replace(bare, record=case.record | {"dino_teacher": case.record["dino_teacher"] | {"qkv_bias": False}})
    assert not np.any(interop.recorded_teacher(told, dino)["teacher"]["block_0"]["attention"]["qkv"]["bias"])


def test_training_draws_are_named_and_a_single_block_drops_nothing(shared: Path) -> None:
    case = Case.read(shared / "goldens" / "mask_align" / "a")
    system = dataclasses.replace(interop.system_of(case), drop_path=0.2)
    assert interop.training_draws(case, system).shape == case.inputs["train_exp_noise"].shape
    with pytest.raises(UserError, match="mask_type=random needs the recorded draws train_noise"):
        interop.training_draws(case, dataclasses.replace(system, masker="random"))
    drops = interop.recorded_drops(case, system)
    assert drops.shape[1] == system.depth and not drops[:, 0].any()
    single = dataclasses.replace(system, depth=1, fusion="sum")
    assert interop.recorded_drops(dataclasses.replace(case, inputs={}), single) is None
