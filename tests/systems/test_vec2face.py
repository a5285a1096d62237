"""Vec2Face: rows, masks, losses, two networks' gradients, vectors, and the reference case."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.identity_vectors import sample_identities, vary
from maskae.interop import vec2face as interop
from maskae.interop.case import Case
from maskae.interop.parity import compare
from maskae.losses.adversarial import discriminator_loss
from maskae.losses.attributes import brightness, quality, slant
from maskae.losses.perceptual import map_distance, structural_similarity
from maskae.nn.dropout_block import Dropout
from maskae.nn.row_mask import MaskRate, mask_rows
from maskae.systems.identity_encoder import margin_logits
from maskae.systems.vec2face import Vec2Face
from tests.drawn import drawn

SMALL = {
    "image_size": 8,
    "channels": 1,
    "layers": (1,),
    "widths": (8,),
    "features_width": 16,
    "face_weights": "random",
    "grid": (4, 4),
    "width": 16,
    "depth": 1,
    "heads": 2,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "map_channels": 8,
    "paint_width": 8,
    "multipliers": (1, 1),
    "paint_blocks": 1,
    "groups": 4,
    "critic_widths": (8, 8),
    "perceptual": "identity",
    "adversarial_start": 5,
}
BATCH = 4


@pytest.fixture(scope="module")
def system() -> Vec2Face:
    return Vec2Face(**SMALL)


@pytest.fixture(scope="module")
def variables(system):
    return drawn(system.init, jax.random.key(0), {})


@pytest.fixture(scope="module")
def batch():
    image = jax.random.uniform(jax.random.key(1), (BATCH, 8, 8, 1))
    return {"image": image, "example": jnp.arange(BATCH), "index": jnp.arange(BATCH)}


@pytest.fixture(scope="module")
def gradient(system, variables, batch):
    """Gradients of the whole loss by step."""
    return jax.jit(jax.grad(lambda params, step: system.loss(params, variables.state, batch, jax.random.key(2), step)[0]))


@pytest.mark.parametrize(("rate", "filled"), [(0.5, 25), (0.7, 35), (1.0, 49)])
def test_the_cuts_are_nested_and_exact(rate, filled):
    noise = jax.random.uniform(jax.random.key(0), (3, 49))
    mask = jax.jit(mask_rows, static_argnums=1)(noise, MaskRate().dropped(49), jnp.ceil(49 * rate))
    assert mask.keep.shape == (3, 25), "the first token and 24 rows"
    np.testing.assert_array_equal(mask.filled.sum(1), filled)
    np.testing.assert_array_equal(mask.dropped.sum(1), 25)
    assert not (mask.dropped & ~mask.filled).any() and not mask.filled[:, 0].any()
    np.testing.assert_array_equal(mask.keep[:, 0], 0)
    kept = np.take_along_axis(np.asarray(mask.dropped), np.asarray(mask.keep), 1)
    assert not kept.any() and (np.diff(mask.keep, axis=1) > 0).all()


def test_the_mask_rate_is_the_truncated_normal():
    for law, mean in ((MaskRate(), 0.75), (MaskRate(0.15, 0.25, 0.1, 1.0), 0.32)):
        draws = law.quantile(jnp.linspace(0.0005, 0.9995, 1000))
        assert law.low <= float(draws.min()) and float(draws.max()) <= law.high
        np.testing.assert_allclose([draws.mean(), law.average()], mean, atol=4e-3)
    with pytest.raises(UserError, match="0 < low <= high <= 1"):
        MaskRate(low=0.8, high=0.7).check()


def test_rows_are_copies_of_one_vector_and_a_full_mask_hides_all_of_them(system, variables):
    vectors = jax.random.normal(jax.random.key(3), (BATCH, 16))
    mask = mask_rows(jax.random.uniform(jax.random.key(4), (BATCH, 16)), 8, 16)
    painted = jax.jit(system.paint)(variables.params, vectors, mask)
    assert painted.image.shape == (BATCH, 8, 8, 1)
    own = variables.params["generator"]
    copies = (painted.rows[:, 1:] - own["rows"]["bias"][:, None]) / own["rows"]["kernel"][0][:, None]
    np.testing.assert_allclose(copies, jnp.broadcast_to(painted.rows[:, :1], copies.shape), rtol=1e-3, atol=1e-4)
    seen = painted.named["decoder_input"] - own["decoder_position"]
    np.testing.assert_allclose(seen, jnp.broadcast_to(seen[:, :1], seen.shape), atol=1e-5)


def test_losses_vanish_where_the_images_are_equal(system, variables, batch):
    real = 2 * batch["image"] - 1
    mask = mask_rows(jnp.zeros((BATCH, 16)), 8, 8)

    @jax.jit
    def terms(params, state):
        vectors = system.recognise(state, real)[0]
        painted = system.paint(params, vectors, mask)._replace(image=real)
        return system.terms(state, painted, vectors, real), structural_similarity(batch["image"], 1 - batch["image"])

    equal, inverted = terms(*variables)
    np.testing.assert_allclose([equal[name] for name in ("pixel", "perceptual", "structural", "identity")], 0, atol=1e-6)
    assert float(inverted) < 0.5


# pytest -n 0 -m slow tests/systems/test_vec2face.py
@pytest.mark.slow
def test_faint_features_count_less():
    one, other = jnp.asarray([[[[3e-5, 4e-5]]]]), jnp.zeros((1, 1, 1, 2))
    np.testing.assert_allclose(map_distance([one], [other], [jnp.ones(2)]), [0.25], rtol=1e-5)
    np.testing.assert_allclose(map_distance([1e6 * one], [other], [jnp.ones(2)]), [1.0], rtol=1e-5)
    assert np.isfinite(jax.grad(lambda x: map_distance([x], [one], [jnp.ones(2)]).sum())(other)).all()


def test_the_discriminator_waits_and_each_network_gets_its_own_gradient(system, variables, batch, gradient):
    waiting, active = gradient(variables.params, 4), gradient(variables.params, 5)
    assert all(not leaf.any() for leaf in jax.tree.leaves(waiting["discriminator"]))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(active))
    real = 2 * batch["image"] - 1

    def both(params):
        return system.criticise(params, params["image"], real)

    params = variables.params | {"image": -real}
    of_generator = jax.jit(jax.grad(lambda p: -both(p).painted.mean()))(params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(of_generator["discriminator"])) and of_generator["image"].any()
    of_critic = jax.jit(jax.grad(lambda p: discriminator_loss(both(p).real, both(p).fake)))(params)
    assert not of_critic["image"].any() and any(leaf.any() for leaf in jax.tree.leaves(of_critic["discriminator"]))
    assert float(discriminator_loss(jnp.full(3, 0.5), jnp.full(3, 0.5))) == 0.25
    with pytest.raises(UserError, match="did you mean 'hinge'"):
        discriminator_loss(real, real, "hing")


def test_the_frozen_network_gives_gradients_to_images_alone(system, variables, batch):
    def identity(state, images):
        return system.recognise(state, images)[0].sum()

    of_state, of_images = jax.jit(jax.grad(identity, argnums=(0, 1)))(variables.state, batch["image"])
    assert all(not leaf.any() for leaf in jax.tree.leaves(of_state)) and of_images.any()


def test_dropout_depends_on_the_example_alone():
    draw = Dropout(0.5, jax.random.key(0), jnp.arange(4))(jnp.ones((4, 100)))
    np.testing.assert_array_equal(Dropout(0.5, jax.random.key(0), jnp.asarray([2]))(jnp.ones((1, 100)))[0], draw[2])
    assert set(np.unique(draw)) == {0.0, 2.0} and abs(float(draw.mean()) - 1) < 0.2


def test_rematerialised_blocks_take_dropout(system, variables, batch):
    other = replace(system, remat=True)

    def loss(params):
        return other.loss(params, variables.state, batch, jax.random.key(2), jnp.int32(0))[0]

    shapes = jax.eval_shape(jax.grad(loss), variables.params)
    assert jax.tree.map(jnp.shape, variables.params) == jax.tree.map(lambda leaf: leaf.shape, shapes)


@pytest.mark.parametrize(("deviation", "kept"), [(0.3, 0.958), (0.5, 0.894), (0.7, 0.819)])
def test_variations_keep_the_norm_and_turn_by_their_deviation(deviation, kept):
    vectors, noise = (jax.random.normal(jax.random.key(seed), (50, 512)) for seed in (0, 1))
    varied = vary(vectors, deviation * noise)
    np.testing.assert_allclose(jnp.linalg.norm(varied, axis=1), jnp.linalg.norm(vectors, axis=1), rtol=1e-5)
    cosines = (vectors * varied).sum(1) / jnp.square(vectors).sum(1)
    np.testing.assert_allclose(cosines.mean(), kept, atol=5e-3)


def test_sampled_identities_are_apart_or_the_reason_is_named():
    means = np.random.default_rng(0).standard_normal((40, 32))
    found = sample_identities(means, 20, components=32, largest_cosine=0.3)
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    assert found.shape == (20, 32) and (unit @ unit.T - np.eye(20)).max() <= 0.3 + 1e-6
    with pytest.raises(UserError, match="of 20 identities have cosines of at most -0.9"):
        sample_identities(means, 20, components=2, largest_cosine=-0.9)


def test_attributes_and_an_edit_towards_one(system, variables):
    line = jnp.full((1, 8, 8, 1), -1.0).at[0, jnp.arange(8), jnp.arange(8)[::-1], 0].set(1.0)
    nothing = jnp.zeros((1, 16))
    assert float(slant(line, nothing)[0]) > 0.5 and float(slant(line[:, :, ::-1], nothing)[0]) < -0.5
    np.testing.assert_allclose(quality(line, nothing + 1), 4.0)
    vectors = jax.random.normal(jax.random.key(5), (2, 16))
    paint, key = jax.jit(system.generate), jax.random.key(6)
    before = brightness(paint(variables.params, vectors, jnp.arange(2), key), vectors)
    moved = jax.jit(lambda v, goal: system.edit(variables.params, variables.state, v, {"brightness": goal}, key, 15))(vectors, before + 0.5)
    after = brightness(paint(variables.params, moved, jnp.arange(2), key), vectors)
    assert (after > before).all()
    with pytest.raises(UserError, match="unknown attribute 'age'"):
        system.edit(variables.params, variables.state, vectors, {"age": before}, key)


def test_the_margin_lowers_the_label_alone():
    cosines = jnp.asarray([[0.5, 0.2], [-0.99, 0.3]])
    logits = margin_logits(cosines, jnp.asarray([0, 0]), 0.5, 10.0)
    np.testing.assert_allclose(logits[:, 1], [2.0, 3.0], rtol=1e-6)
    np.testing.assert_allclose(logits[:, 0], [10 * np.cos(np.arccos(0.5) + 0.5), 10 * (-0.99 - 0.5 * np.sin(0.5))], rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_size": 16}, "paints 8 pixels; image_size=16"),
        ({"groups": 3}, "groups=3 do not divide 8 channels"),
        ({"critic_widths": (8, 8, 8)}, "leave 2 pixels, fewer than critic_window=4"),
        ({"perceptual": "vg"}, "did you mean 'vgg'"),
        ({"mask_rate": (0.75, 0.25, 0.0, 1.0)}, "a mask rate needs"),
    ],
)
def test_what_cannot_work_is_refused_by_name(given, message):
    with pytest.raises(UserError, match=message):
        Vec2Face(**SMALL | given)


def test_a_run_without_weights_for_its_frozen_networks_stops(variables):
    with pytest.raises(UserError, match="no identity network: give model.face_weights"):
        Vec2Face(**SMALL | {"face_weights": ""}).begin(variables, None)
    with pytest.raises(UserError, match="needs model.perceptual_weights"):
        Vec2Face(**SMALL | {"perceptual": "vgg"}).begin(variables, None)


def test_the_official_discriminator():
    critic = jax.eval_shape(Vec2Face().discriminator.init, jax.random.key(0), jnp.zeros((1, 112, 112, 3)))
    assert round(sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(critic)) / 1e6, 2) == 6.14


def test_the_reference_case_is_reproduced(shared):
    case = Case.read(shared / "goldens" / "vec2face" / "a")
    with jax.enable_x64(True):
        run = interop.Replay(case)
        # The gradients take a minute to compile: tools/parity.py compares them too.
        found = run.forward() | interop.replay_rates(case, run.system) | interop.replay_nearby(case) | interop.replay_schedule(case)
    # Rounded to float32 anywhere on the way, a rectifier's input next to 0 moves gradients by a hundredth.
    assert [name for name, value in found.items() if np.asarray(value.value).dtype == np.float32] == ["schedule/lr"]
    rows = [compare(name, case.outputs[name], value) for name, value in found.items() if name in case.outputs]
    assert len(rows) > 30 and all(row.agrees for row in rows), [row for row in rows if not row.agrees]


def test_parts_that_were_not_recorded_are_not_needed(shared, monkeypatch):
    case = Case.read(shared / "goldens" / "vec2face" / "a")
    listed = {name: about for name, about in case.record["tensors"]["outputs.safetensors"].items() if name.startswith(("rows", "loss/"))}
    partial = replace(
        case,
        record=case.record | {"tensors": case.record["tensors"] | {"outputs.safetensors": listed}},
        outputs={name: case.outputs[name] for name in listed},
        inputs={name: case.inputs[name] for name in ("feature", "image", "noise")},
    )
    assert interop.system_of(partial).generation_law == MaskRate(0.15, 0.25, 0.1, 1.0)
    monkeypatch.setattr(interop.Replay, "forward", lambda run: {})
    assert set(interop.replay(partial)) == {"mask_rate/mean", "mask_rate/generation_mean"}


@pytest.mark.parametrize("name, value", [("norm_eps", 1e-5), ("decoder_embed_dim", 32)])
def test_recorded_options_that_cannot_be_replayed_are_named(shared, name, value):
    case = Case.read(shared / "goldens" / "vec2face" / "a")
    config = case.record["config"]
    built = config["MaskedGenerativeEncoderViT"] | {name: value}
    with pytest.raises(UserError, match=name):
        interop.system_of(replace(case, record=case.record | {"config": config | {"MaskedGenerativeEncoderViT": built}}))
