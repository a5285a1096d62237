"""G-SimCLR and its denoising autoencoder: sizes of the card, closed forms, and guided batches in a run of all stages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae import train
from maskae.checkpoint import Checkpointer
from maskae.config import build_from, load_config
from maskae.errors import UserError
from maskae.experiment import Experiment
from maskae.losses.contrastive import nt_xent
from maskae.merging import stage_config
from maskae.mesh import make_mesh
from maskae.monitor import read_metrics
from maskae.nn.augmentations import color_jitter
from maskae.run_sources import assumed_sources
from maskae.schedules import make_schedule
from maskae.systems import SYSTEMS
from maskae.systems.contract import System
from maskae.systems.denoising_autoencoder import DenoisingAutoencoder
from maskae.systems.g_simclr import GSimClr, equal_pairs, principal_plane
from maskae.vectors import unit

CONFIG = str(Path(__file__).parents[2] / "configs" / "g_simclr.py")
KEY = jax.random.key(7)
BATCH = {
    "image": jax.random.uniform(jax.random.key(1), (6, 8, 8, 3)),
    "example": jnp.arange(6),
    "label": jnp.asarray([0, 0, 1, 2, 0, -1]),
    "index": jnp.arange(6),
}
NET: dict[str, Any] = {"image_size": 8, "network": "resnet18", "layers": (1,), "widths": (4,), "stem": "small", "style": "keras_small"}
NET |= {"mean": (0.0,), "std": (1.0,), "views": "guided_cifar", "head_widths": (6, 5, 3), "records": 6, "clusters": 6}
GUIDED = GSimClr(**NET)
VARIABLES = jax.jit(GUIDED.init)(KEY, {})


def system_of(variant: str, stage: str) -> Any:
    config = stage_config(load_config(f"{CONFIG}:{variant}"), stage)
    return build_from(SYSTEMS, config.system, config.model.to_dict(), "system")


def numbers(*trees: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trees))


def sizes(variant: str, stage: str) -> Any:
    return jax.eval_shape(lambda key: system_of(variant, stage).init(key, {}), KEY)


def test_networks_have_the_papers_sizes() -> None:
    small, deep = sizes("base", "autoencoder"), sizes("imagenet_subset", "autoencoder")
    assert numbers(small) == 335_747 and numbers(small.params["encoder"], small.state["encoder"]) == 94_144
    assert numbers(deep) == 61_059_843 and numbers(deep.params["encoder"], deep.state["encoder"]) == 17_422_720
    cifar, resnet50 = sizes("base", "contrast"), sizes("imagenet_subset", "contrast")
    assert numbers(cifar.params["encoder"], cifar.state["encoder"]) == 1_121_344
    assert numbers(cifar.params, cifar.state["encoder"]) == 1_226_482
    assert numbers(resnet50.params["encoder"], resnet50.state["encoder"]) == 23_587_712
    assert system_of("base", "autoencoder").forward_flops({}) / 2 == pytest.approx(58.4e6, rel=1e-3)
    assert system_of("base", "contrast").encoder_flops((32, 32)) / 2 == pytest.approx(136e6, rel=1e-3)


def test_the_autoencoder_keeps_to_its_shapes_and_without_noise_is_a_plain_one() -> None:
    system = DenoisingAutoencoder(widths=(4, 4, 4))
    assert isinstance(system, System)
    batch = {"image": jax.random.uniform(KEY, (2, 32, 32, 3)), "example": jnp.arange(2)}
    variables = jax.jit(system.init)(KEY, {})
    pixels, moved = jax.jit(system.run)(*variables, batch["image"])
    assert pixels.shape == (2, 32, 32, 3) and float(pixels.min()) > 0 and float(pixels.max()) < 1
    assert jax.tree.structure(moved) == jax.tree.structure(variables.state)
    found = jax.jit(system.features)(*variables, batch)
    assert found["tokens"].shape == (2, 16, 4) and found["pooled"].shape == (2, 4)
    np.testing.assert_allclose(found["pooled"], found["tokens"].mean(1), rtol=1e-6)
    plain = DenoisingAutoencoder(widths=(4, 4, 4), noise=0.0)
    np.testing.assert_array_equal(plain.noisy(batch, KEY), batch["image"])
    loss, _ = jax.jit(plain.loss)(*variables, batch, KEY, jnp.int32(0))
    assert float(loss) == pytest.approx(float(jnp.square(pixels - batch["image"]).mean()))
    assert float((system.noisy(batch, KEY) - batch["image"]).std()) == pytest.approx(0.01, rel=0.05)
    for wrong, line in (({"image_size": 28}, "halved 3 times"), ({"window": 2}, "odd"), ({"noise": -1.0}, "negative")):
        with pytest.raises(UserError, match=line):
            DenoisingAutoencoder(**wrong)


def test_nt_xent_has_the_cards_values() -> None:
    both = jax.jit(jax.value_and_grad(lambda x, second: nt_xent(unit(x), second, 10.0)))
    same = jnp.ones((64, 64)) / 8
    assert float(both(same, same)[0]) == pytest.approx(math.log(127), rel=1e-6)
    apart = jnp.eye(64)
    assert float(both(apart, apart)[0]) == pytest.approx(math.log(1 + 126 * math.exp(-10)), rel=1e-4)
    first, second = (unit(jnp.asarray(np.random.default_rng(seed).normal(size=(64, 64)))) for seed in (1, 2))
    loss, gradient = both(3 * first, second)
    turn = np.random.default_rng(3).permutation(64)
    assert float(both(second, first)[0]) == pytest.approx(float(loss), rel=1e-6)
    assert float(both(first[turn], second[turn])[0]) == pytest.approx(float(loss), rel=1e-6)
    np.testing.assert_allclose((gradient * first).sum(1), 0.0, atol=1e-6)


def test_cosines_with_restarts() -> None:
    rate = make_schedule("cosine_restarts", peak=0.1, total_steps=11_715, period=1000.0, growth=2.0)
    for step, value in ((0, 0.1), (500, 0.05), (999, 0.0), (1000, 0.1), (2000, 0.05), (3000, 0.1), (7000, 0.1), (11_000, 0.05)):
        assert float(rate(step)) == pytest.approx(value, abs=1e-6), step
    plain = make_schedule("cosine", peak=0.1, total_steps=1000)
    assert [float(plain(step)) for step in (1000, 3800)] == [0.0, 0.0]
    with pytest.raises(UserError, match="growth >= 1"):
        make_schedule("cosine_restarts", peak=0.1, total_steps=10, period=2.0, growth=0.5)


def test_the_recipes_reach_their_schedules() -> None:
    def schedule(variant: str, **changed: Any) -> Any:
        overrides = [f"stage.contrast.optimizer.schedule_arguments={changed}"] if changed else []
        config = stage_config(load_config(f"{CONFIG}:{variant}", overrides), "contrast")
        return Experiment(config, make_mesh(config.mesh.to_dict()), GUIDED, *assumed_sources(config)).optimizer.schedule

    cifar, subset = schedule("base"), schedule("imagenet_subset")
    assert [round(float(cifar(step)), 6) for step in (0, 500, 1000, 3000)] == [0.1, 0.05, 0.1, 0.1]
    assert [round(float(subset(step)), 6) for step in (0, 500, 1000)] == [0.1, 0.05, 0.0]
    assert float(schedule("base", period=500.0)(500)) == pytest.approx(0.1)
    with pytest.raises(UserError, match="schedule_arguments has no argument 'perod' .did you mean 'period'"):
        schedule("base", perod=500.0)


def test_features_are_the_three_that_the_paper_probes() -> None:
    assert isinstance(GUIDED, System)
    found = jax.jit(GUIDED.features)(*VARIABLES, BATCH)
    assert {name: found[name].shape for name in ("pooled", "p2", "p1")} == {"pooled": (6, 4), "p2": (6, 6), "p1": (6, 5)}
    assert min(float(found["p2"].min()), float(found["p1"].min())) == 0.0, "both are after a ReLU"
    layer = VARIABLES.params["projector"]["layer_1"]
    np.testing.assert_allclose(found["p1"], jax.nn.relu(found["p2"] @ layer["kernel"] + layer["bias"]), rtol=1e-5, atol=1e-6)


def test_pairs_of_a_batch_are_counted() -> None:
    state = {**VARIABLES.state, "clusters": jnp.asarray([5, 4, 3, 2, 1, 5])}
    loss, outputs = jax.jit(GUIDED.loss)(VARIABLES.params, state, BATCH, KEY, jnp.int32(0))
    assert np.isfinite(loss) and float(outputs.metrics["same_class_pairs"]) == 3 and float(outputs.metrics["same_cluster_pairs"]) == 1
    np.testing.assert_array_equal(outputs.state["clusters"], state["clusters"])
    assert float(equal_pairs(jnp.full(6, -1))) == 0


def test_views_change_by_image_or_by_batch() -> None:
    twins = {**BATCH, "image": jnp.broadcast_to(BATCH["image"][:1], (6, 8, 8, 3))}
    per_batch, gray = (GSimClr(**NET, **option) for option in ({"augment_per_batch": True}, {"gray": 1.0}))

    @jax.jit
    def made() -> list[jax.Array]:
        added = color_jitter(jnp.full((6, 2, 2, 3), 0.5), jnp.arange(6), KEY, brightness=0.3, additive=True) - 0.5
        return [per_batch.view(twins, KEY, 0), GUIDED.view(twins, KEY, 0), gray.view(BATCH, KEY, 0), added]

    by_batch, by_image, grays, added = (np.asarray(each) for each in made())
    np.testing.assert_allclose(by_batch, np.broadcast_to(by_batch[:1], by_batch.shape), atol=1e-6)
    assert not np.allclose(by_image, by_image[:1])
    np.testing.assert_allclose(grays, np.broadcast_to(grays[..., :1], grays.shape), atol=1e-6)
    assert np.ptp(by_image, axis=-1).max() > 0.1, "CIFAR's recipe has no grey"
    assert 0.2 < np.abs(added).max() <= 0.3, "a factor would change 0.5 by 0.15 at most"


def test_what_does_not_fit_is_refused() -> None:
    for wrong, line in (
        ({"batching": "guided"}, "unknown batching"),
        ({"clusters": 7}, "clusters=7 must be between 1 and records=6"),
        ({"head_widths": (4, 2)}, "at least three widths"),
        ({"style": "kears"}, "did you mean 'keras'"),
    ):
        with pytest.raises(UserError, match=line):
            GSimClr(**(NET | wrong))
    assert GSimClr(**(NET | {"batching": "random", "records": 0})).order(None, 4, 0) is None
    assert principal_plane(np.ones((3, 1), np.float32)).shape == (3, 2)


# The smallest run of all stages, on digits at 8 pixels; its guide is a system of another kind.
TINY = ["data.source=digits", "data.image_size=8", "data.channels=1", "data.train_transform=()", "data.val_transform=()"]
TINY += ["data.max_examples=48", "data.threads=0", "train.batch_size=8", "log.every_steps=1", "log.tensorboard=false"]
TINY += ["evaluate.baselines=false", "evaluate.evaluators={}", "evaluate.panels=0", "evaluate.every_steps=0"]
TINY += ["stage.autoencoder.evaluate.evaluators={}", "stage.autoencoder.evaluate.map_examples=0", "stage.autoencoder.train.total_steps=2"]
MODEL = {"image_size": 8, "channels": 1, "network": "resnet18", "layers": "(1,)", "widths": "(4,)", "outer_widths": "(8,)"}
MODEL |= {"stem_width": 4, "head_widths": "(6,5,3)", "records": 48, "clusters": 12, "views": "crop_flip"}
TINY += [f"stage.contrast.model.{key}={value}" for key, value in MODEL.items()] + ["stage.contrast.log.every_steps=1"]
STEPS = 11


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of both stages that was stopped and resumed at step 5 of the second."""
    folder = tmp_path_factory.mktemp("g_simclr") / "run"
    for steps in (5, STEPS):
        config = load_config(f"{CONFIG}:tiny", [*TINY, f"stage.contrast.train.total_steps={steps}"])
        with config.unlocked():
            config.stage.autoencoder.system = "autoencoder"
            config.stage.autoencoder.model = {"field": "image", "hidden": (4,), "latent": 3}
        assert train.run(config, folder) == 0
    return folder / "2_contrast"


def test_no_batch_of_a_run_holds_a_pseudo_label_twice(finished) -> None:
    rows = [row for row in read_metrics(finished / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    # Counted on the device, from the records that the loop really served, before and after the resume.
    assert [row["same_cluster_pairs"] for row in rows] == [0.0] * STEPS
    with Checkpointer(str(finished / "checkpoints"), keep_last=1) as checkpointer:
        state = checkpointer.restore_raw(checkpointer.latest_step(), "state")
    assert set(state["clusters"]) == set(range(12)) and state["map"].shape == (48, 2)
    assert len(state["clusters"]) == 48 and np.ptp(state["map"]) > 0
