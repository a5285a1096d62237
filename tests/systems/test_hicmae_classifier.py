"""HiCMAE's classifier: its size, what it takes from pretraining, what is mixed, and what trains how fast."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.config import load_config
from maskae.data.transforms import RandAugment, RandomResizedCrop
from maskae.errors import UserError
from maskae.evaluate.emotion import Recall
from maskae.evaluation import Evaluation
from maskae.experiment import build
from maskae.optim import lr_scale_tree
from maskae.paths import flatten_paths
from maskae.run_sources import assumed_sources
from maskae.systems.contract import System, Variables
from maskae.systems.hicmae_classifier import HicmaeClassifier
from tests.drawn import drawn
from tests.systems.cases import ROOT
from tests.systems.test_hicmae import BATCH, PARAMS, SMALL
from tests.systems.test_mae import count, dot_flops

CLASSIFIER = HicmaeClassifier(**SMALL, num_classes=5)
LABELLED = BATCH | {"label": jnp.array([0, 1, 1, 4])}
QUIET: dict[str, Any] = {"flip": False, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0}


@pytest.fixture(scope="module")
def fresh() -> Variables:
    return drawn(CLASSIFIER.init, jax.random.key(5), BATCH)


def test_size_of_the_paper() -> None:
    system = HicmaeClassifier(num_classes=6)
    assert isinstance(system, System)
    assert count(jax.eval_shape(system.init, jax.random.key(0), {}).params) == 80_792_602


def test_it_takes_the_pretrained_encoders_and_nothing_else(fresh: Variables) -> None:
    taken = CLASSIFIER.with_pretrained(fresh, Variables(PARAMS, {})).params
    for part in ("video_encoder", "audio_encoder", "fusion"):
        jax.tree.map(np.testing.assert_array_equal, taken[part], PARAMS[part])
    assert set(taken) == {"video_encoder", "audio_encoder", "fusion", "video_sum", "audio_sum", "fc_norm", "head"}
    with pytest.raises(UserError, match="does not fit; .* leaves differ: audio_encoder/.* missing there"):
        CLASSIFIER.with_pretrained(fresh, Variables({"video_encoder": PARAMS["video_encoder"]}, {}))


def test_one_branch_is_the_plain_sum_of_its_layers(fresh: Variables) -> None:
    """Equal weights at first, so the sum is the mean that pretraining's features have."""
    heard = HicmaeClassifier(**SMALL, **QUIET, branches="audio")
    alone = {name: BATCH[name] for name in ("spectrogram", "example")}
    start = heard.init(jax.random.key(2), alone)
    assert set(start.params) == {"audio_encoder", "audio_sum", "fc_norm", "head"}
    found = jax.jit(heard.features)(start.params, {}, alone)
    layers = heard.encode(start.params, "audio", heard.inputs(alone)["audio"]).layers
    mean = np.asarray(jnp.stack([layer.mean(1) for layer in layers]).mean(0))
    normed = (mean - mean.mean(1, keepdims=True)) / np.sqrt(mean.var(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(found["pooled"], normed, atol=1e-4)
    assert found["logits"].shape == (4, 6)
    with pytest.raises(UserError, match="branches=both: the batch has no video"):
        CLASSIFIER.features(fresh.params, {}, alone)


def test_clips_are_mixed_and_sounds_are_not() -> None:
    inputs = CLASSIFIER.inputs(LABELLED)
    mixing = HicmaeClassifier(**SMALL, **QUIET | {"mixup": 0.8}, num_classes=5, label_smoothing=0.0)
    changed, soft = jax.jit(lambda rng: mixing.augmented(inputs, LABELLED, rng))(jax.random.key(0))
    share = float(soft[0, 0])
    assert 0 < share < 1
    np.testing.assert_allclose(soft[0], [share, 0, 0, 0, 1 - share], atol=1e-6)
    np.testing.assert_allclose(changed["video"], share * inputs["video"] + (1 - share) * inputs["video"][::-1], atol=1e-5)
    np.testing.assert_array_equal(changed["audio"], inputs["audio"])


def test_mirroring_and_erasing_are_alike_in_all_frames() -> None:
    still = LABELLED | {"video": jnp.broadcast_to(BATCH["video"][:, :1], BATCH["video"].shape)}
    inputs = CLASSIFIER.inputs(still)
    mirrored, soft = HicmaeClassifier(**SMALL, **QUIET | {"flip": True}).augmented(inputs, still, jax.random.key(1))
    assert soft is None
    np.testing.assert_array_equal(mirrored["video"], np.broadcast_to(mirrored["video"][:, :1], inputs["video"].shape))
    turned = [not np.array_equal(a, b) for a, b in zip(mirrored["video"], inputs["video"], strict=True)]
    assert 0 < sum(turned) < len(turned)
    erased, _ = HicmaeClassifier(**SMALL, **QUIET | {"erase": 0.99}).augmented(inputs, still, jax.random.key(1))
    places = np.asarray((erased["video"] != inputs["video"]).any(-1))
    np.testing.assert_array_equal(places, np.broadcast_to(places[:, :1], places.shape))
    assert 0 < places.mean() < 1


def test_the_loss_trains_every_part_and_stochastic_depth_changes_it(fresh: Variables) -> None:
    @jax.jit
    def of(params: Any) -> Any:
        return jax.value_and_grad(CLASSIFIER.loss, has_aux=True)(params, {}, LABELLED, jax.random.key(1), 0)

    (loss, _), grads = of(fresh.params)
    assert np.isfinite(loss)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) > 0
    dropping, whole = (HicmaeClassifier(**SMALL, **QUIET, num_classes=5, drop_path=rate) for rate in (0.9, 0.0))
    losses = [float(jax.jit(each.loss)(fresh.params, {}, LABELLED, jax.random.key(1), 0)[0]) for each in (dropping, whole)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_deeper_layers_learn_faster(fresh: Variables) -> None:
    scales = flatten_paths(lr_scale_tree(fresh.params, None, CLASSIFIER.layer_scales(0.5)))
    expected = {"video_encoder/patch_embed/kernel": 2**-4, "audio_encoder/block_0/mlp/fc1/kernel": 2**-3}
    expected |= {"video_encoder/block_1/norm1/scale": 2**-2, "fusion/audio_block_0/norm1/scale": 0.5}
    expected |= {"fusion/video_norm/scale": 1, "head/kernel": 1}
    assert {path: scales[path] for path in expected} == pytest.approx(expected)


def test_layer_decay_follows_the_models_depth() -> None:
    """The recipe's `optimizer.layer_decay` reaches the update rule, for one branch and another depth than the recipe's."""
    overrides = ["model.depth=4", "model.width=8", "model.heads=2", "data.source=audio:none@160,32", "data.examples=8"]
    config = load_config(str(ROOT / "configs" / "hicmae_classifier.py") + ":ravdess", overrides)
    experiment = build(config, assumed_sources(config))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), experiment.abstract_state["params"])
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = experiment.optimizer.update(ones, experiment.optimizer.init(params), params, 100)
    moved = {path: float(jnp.abs(leaf).max()) for path, leaf in flatten_paths(updates).items()}
    for path, layers in (("audio_encoder/patch_embed/kernel", 6), ("audio_encoder/block_3/mlp/fc1/kernel", 2), ("fc_norm/bias", 0)):
        assert moved[path] / moved["head/kernel"] == pytest.approx(0.75**layers), path


def test_flops_by_formula_are_those_of_the_trace(fresh: Variables) -> None:
    trace = jax.make_jaxpr(lambda p: CLASSIFIER.classify(p, CLASSIFIER.inputs(BATCH)))(fresh.params)
    # The sum over layers is 2 * D * layers of each modality, which the formula leaves out.
    sums = 4 * 2 * 2 * CLASSIFIER.width * CLASSIFIER.depth
    assert dot_flops(trace.jaxpr) == pytest.approx(4 * CLASSIFIER.forward_flops(BATCH) + sums, rel=1e-9)


def config_of(variant: str, *overrides: str) -> Any:
    return load_config(f"{ROOT}/configs/hicmae_classifier.py:{variant}", list(overrides))


def test_the_base_recipe_is_the_papers() -> None:
    """rand-m7-n4-mstd0.5-inc1 in grey before crops of 0.08 to 1 that are resized linearly, at the clips' own size; two segments."""
    config = config_of("base")
    experiment = build(config, assumed_sources(config))
    augment, crop = experiment.transform(config.data.train_transform).steps
    assert augment == RandAugment(4, 7.0, 0.5, 0.5, (128, 128, 128), "bicubic")
    assert crop == RandomResizedCrop(160, (0.08, 1.0), (3 / 4, 4 / 3), "bilinear")
    assert experiment.batch_shapes()["clip"].shape == (56,)
    (recall,) = Evaluation(experiment, None).evaluators.values()
    assert recall == Recall(segments=2) and config.data.source.endswith(",2")


@pytest.mark.parametrize("variant", ["tiny", "ravdess"])
def test_the_small_recipes_transform_nothing(variant: str) -> None:
    config = config_of(variant)
    assert config.data.train_transform == () and config.evaluate.evaluators.to_dict() == {"recall": {}}


def test_what_the_data_cannot_serve_is_refused() -> None:
    absent = ["data.source=audio:none@160,32", "data.examples=8"]
    config = config_of("ravdess", *absent, "data.train_transform=(('flip', {}),)")
    with pytest.raises(UserError, match="data.train_transform: audio:none@160,32 has neither images nor clips"):
        build(config, assumed_sources(config))
    config = config_of("ravdess", *absent, "evaluate.evaluators={'recall': {'segments': 2}}")
    with pytest.raises(UserError, match=r"evaluators.recall: Recall\(segments=2\) reads the field 'clip', which audio:none@160,32 lacks"):
        Evaluation(build(config, assumed_sources(config)), None)


def test_mistakes_are_refused_early() -> None:
    for wrong, words in (({"branches": "sound"}, "audio"), ({"drop_path": 1.0}, "drop_path"), ({"branches": "audio"}, "there are none")):
        with pytest.raises(UserError, match=words):
            HicmaeClassifier(**SMALL, **wrong)
