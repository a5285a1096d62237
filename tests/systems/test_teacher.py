"""The frozen teacher: where its weights come from, what it sees, and where it looks."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from maskae.data.spec import IMAGENET_MEAN, IMAGENET_STD
from maskae.errors import UserError
from maskae.interop.layout import Geometry, to_foreign
from maskae.interop.vit import LAYOUTS
from maskae.masking import draw_exponentials, random_mask, weighted_noise
from maskae.nn.layers import Block
from maskae.paths import flatten_paths
from maskae.systems.contract import Variables
from maskae.systems.teacher import CLIP_MEAN, CLIP_STD, Teacher, make_teacher

SIZES: dict[str, Any] = {"patch_size": 4, "width": 16, "depth": 2, "heads": 2}
TEACHER = Teacher((4, 4), **SIZES)
PARAMS = jax.jit(TEACHER.init)(jax.random.key(0))
IMAGES = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
SEEN = jax.jit(TEACHER.look)(PARAMS, IMAGES)


def test_hidden_states_are_those_after_every_block() -> None:
    assert len(SEEN.hidden) == 2
    apply: Any = Block(2).apply
    np.testing.assert_allclose(apply({"params": PARAMS["block_0"]}, SEEN.first), SEEN.hidden[0], atol=1e-6)
    np.testing.assert_allclose(apply({"params": PARAMS["block_1"]}, SEEN.hidden[0]), SEEN.hidden[1], atol=1e-6)
    assert "norm" not in PARAMS


def test_attention_is_what_the_block_mixes_by() -> None:
    # With values and output map the identity on one head, attention's output is weights times normed input.
    single = Teacher((4, 4), **(SIZES | {"heads": 1, "depth": 1}))
    params = jax.jit(single.init)(jax.random.key(2))
    eye = jnp.eye(16)
    own = params["block_0"]["attention"]
    own["qkv"]["kernel"] = (3 * own["qkv"]["kernel"]).at[:, 2, 0].set(eye)
    own["out"]["kernel"] = eye[None]
    seen = jax.jit(single.look)(params, IMAGES)
    weights = single.attention_of(params, seen)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    apply: Any = Block(1).apply
    zero = jax.tree.map(jnp.zeros_like, params["block_0"]["mlp"])
    mixed = apply({"params": params["block_0"] | {"mlp": zero}}, seen.first) - seen.first
    centred = seen.first - seen.first.mean(-1, keepdims=True)
    normed = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(weights[:, 0] @ normed, mixed, atol=1e-5)
    np.testing.assert_allclose(single.importance(params, seen), weights[:, 0, 0, 1:], rtol=1e-5)


def test_no_gradient_reaches_the_teacher() -> None:
    def looked(params: Any) -> jax.Array:
        seen = TEACHER.look(params, IMAGES)
        return sum(each.sum() for each in seen.hidden) + TEACHER.importance(params, seen).sum()

    assert all((leaf == 0).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(looked))(PARAMS)))


def test_images_are_resized_and_renormalised() -> None:
    clip = Teacher((4, 4), architecture="clip", statistics="clip", **(SIZES | {"patch_size": 3}))
    assert clip.view(IMAGES).shape == (2, 12, 12, 3)
    grey = (jnp.full((1, 16, 16, 3), 0.5) - jnp.asarray(IMAGENET_MEAN)) / jnp.asarray(IMAGENET_STD)
    expected = (0.5 - np.asarray(CLIP_MEAN)) / np.asarray(CLIP_STD)
    np.testing.assert_allclose(clip.view(grey)[0, 5, 5], expected, atol=1e-5)


@pytest.mark.parametrize(("architecture", "layout"), [("clip", "clip"), ("vit", "huggingface"), ("vit", "timm")])
def test_weights_are_read_from_a_file(architecture: str, layout: str, tmp_path: Path) -> None:
    teacher = Teacher((4, 4), architecture=architecture, weights=str(tmp_path / "w.safetensors"), **SIZES)
    given = jax.tree.map(lambda x: x + 0.01, jax.jit(teacher.init)(jax.random.key(3)))
    if architecture == "clip":
        given["patch_embed"]["bias"] = jnp.zeros(16)
    named, _ = to_foreign(flatten_paths({"encoder": given}), LAYOUTS[layout], Geometry(4, (4, 4)))
    tensors = {name: np.ascontiguousarray(value) for name, value in named.items()}
    save_file(tensors, teacher.weights)
    read = teacher.read(jax.tree.map(jnp.zeros_like, given), None)
    for path, leaf in flatten_paths(read).items():
        np.testing.assert_array_equal(leaf, flatten_paths(given)[path], err_msg=path)
    smaller = dataclasses.replace(teacher, mlp_ratio=2.0)
    with pytest.raises(UserError, match="does not fit the teacher"):
        smaller.read(jax.eval_shape(smaller.init, jax.random.key(4)), None)


def test_weights_come_from_a_stage_with_fixed_positions() -> None:
    from maskae.systems.mae import Mae

    mae = Mae(image_size=16, **SIZES, decoder_width=8, decoder_depth=1, decoder_heads=2)
    variables = jax.jit(lambda key: mae.init(key, {}))(jax.random.key(5))
    stage = SimpleNamespace(earlier=lambda name: (mae, variables))
    teacher = dataclasses.replace(TEACHER, weights="stage:mae")
    read = teacher.read(PARAMS, stage)

    @jax.jit
    def last_block(encoder: Any) -> jax.Array:
        apply: Any = partial(mae.encoder.apply, {"params": encoder})
        return apply(apply(IMAGES, method="embed"), collect=True, method="encode").blocks[-1]

    expected = last_block(variables.params["encoder"])
    np.testing.assert_allclose(jax.jit(teacher.look)(read, IMAGES).hidden[-1], expected, atol=1e-6)
    headless = SimpleNamespace(earlier=lambda name: (mae, Variables({"head": {}}, {})))
    with pytest.raises(UserError, match="has no encoder to teach; it has head"):
        teacher.read(PARAMS, headless)


def test_what_cannot_teach_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the teacher has no weights"):
        TEACHER.read(PARAMS, None)
    with pytest.raises(UserError, match="is a folder"):
        dataclasses.replace(TEACHER, weights=str(tmp_path)).read(PARAMS, None)
    with pytest.raises(UserError, match="no argument 'widht' \\(did you mean 'width'"):
        make_teacher({"widht": 16}, (4, 4), 3)
    with pytest.raises(UserError, match="there is no block 2"):
        TEACHER.attention_of(PARAMS, SEEN, block=2)
    with pytest.raises(UserError, match="are of 3 channels; the images have 1"):
        Teacher((4, 4), 1, statistics="clip", **SIZES)


def test_patches_are_drawn_in_proportion_to_attention() -> None:
    draws = draw_exponentials(jax.random.key(6), jnp.arange(5000), 12)
    uniform = random_mask(weighted_noise(draws, jnp.full((5000, 12), 0.01)), 3)
    np.testing.assert_allclose(1 - uniform.mask.mean(0), 0.25, atol=0.02)
    three_to_one = random_mask(weighted_noise(draws[:, :2], jnp.asarray([[3.0, 1.0]])), 1).keep_indices
    assert float((three_to_one == 0).mean()) == pytest.approx(0.75, abs=0.02)
    certain = jnp.zeros((5000, 12)).at[:, 7].set(0.3)
    assert (random_mask(weighted_noise(draws, certain), 1).keep_indices == 7).all()
