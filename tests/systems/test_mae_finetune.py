"""Fine-tuning: what the head sees, what stochastic depth and soft targets do, how a pretrained encoder comes in."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maskae.errors import UserError
from maskae.optim import decay_mask, layer_decay_scales, make_optimizer
from maskae.paths import flatten_paths
from maskae.schedules import warmup_constant
from maskae.systems.contract import System, Variables
from maskae.systems.mae import Mae
from maskae.systems.mae_finetune import FineTune

SIZE = {"image_size": 8, "channels": 1, "patch_size": 4, "width": 16, "depth": 2, "heads": 2}
tiny = partial(FineTune, **SIZE, num_classes=3)


def batch_of(count: int = 6, size: int = 8) -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    return {
        "image": jnp.asarray(random.normal(size=(count, size, size, 1)), jnp.float32),
        "label": jnp.arange(count) % 3,
        "example": jnp.arange(count),
    }


@cache
def fresh(system: Any, seed: int = 0, size: int = 8) -> Variables:
    """Initial variables; compiled at once and once, which is quicker than one operation at a time."""
    return jax.jit(system.init)(jax.random.key(seed), batch_of(size=size))


def trained_head(params: dict[str, Any]) -> dict[str, Any]:
    """A head of ordinary size: the initial one, of deviation 2e-5, hides every effect."""
    kernel = jax.random.normal(jax.random.key(9), params["head"]["kernel"].shape)
    return params | {"head": {"kernel": kernel, "bias": jnp.ones(3)}}


def test_contract_shapes_and_initial_values() -> None:
    system, batch = tiny(), batch_of()
    assert isinstance(system, System)
    variables = fresh(system)
    assert set(variables.params) == {"encoder", "fc_norm", "head"} and variables.state == {}
    assert "norm" not in variables.params["encoder"] and variables.params["encoder"]["position"].shape == (1, 5, 16)
    features = system.features(variables.params, {}, batch)
    shapes = {name: value.shape for name, value in features.items()}
    assert shapes == {"pooled": (6, 16), "cls": (6, 16), "tokens": (6, 4, 16), "logits": (6, 3)}
    loss, outputs = system.loss(variables.params, {}, batch, jax.random.key(1), 0)
    # The head starts near zero: every class is equally likely.
    np.testing.assert_allclose(loss, np.log(3), atol=1e-3)
    assert set(outputs.metrics) == {"accuracy"} and loss.dtype == jnp.float32
    wide = fresh(tiny(num_classes=1000)).params["head"]
    np.testing.assert_allclose(np.std(wide["kernel"]), 2e-5, rtol=0.05)
    np.testing.assert_array_equal(wide["bias"], 0.0)


def test_the_head_sees_the_norm_of_the_mean_patch_token() -> None:
    system, batch = tiny(), batch_of()
    params = trained_head(fresh(tiny()).params)
    params["fc_norm"] = {"scale": jnp.linspace(0.5, 2.0, 16), "bias": jnp.linspace(-1.0, 1.0, 16)}
    features = system.features(params, {}, batch)
    mean = np.asarray(features["tokens"], np.float64).mean(1)
    normed = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
    pooled = normed * np.asarray(params["fc_norm"]["scale"]) + np.asarray(params["fc_norm"]["bias"])
    np.testing.assert_allclose(features["pooled"], pooled, atol=1e-5)
    np.testing.assert_allclose(features["logits"], pooled @ np.asarray(params["head"]["kernel"]) + 1, atol=1e-4)


def test_class_token_pooling_keeps_the_encoders_norm() -> None:
    system, batch = tiny(pool="cls"), batch_of()
    params = fresh(system).params
    assert set(params) == {"encoder", "head"} and "norm" in params["encoder"]
    features = system.features(params, {}, batch)
    np.testing.assert_array_equal(features["pooled"], features["cls"])


def test_loss_of_labels_and_of_soft_targets() -> None:
    system, batch = tiny(drop_path=0.0, label_smoothing=0.1), batch_of()
    params = trained_head(fresh(tiny()).params)
    log_p = np.asarray(jax.nn.log_softmax(system.features(params, {}, batch)["logits"]), np.float64)
    labels = np.asarray(batch["label"])
    hard, _ = system.loss(params, {}, batch, jax.random.key(1), 0)
    expected = -(0.9 * log_p[np.arange(6), labels] + 0.1 * log_p.mean(1)).mean()
    np.testing.assert_allclose(hard, expected, rtol=1e-5)
    soft_label = np.random.default_rng(1).dirichlet(np.ones(3), 6).astype(np.float32)
    soft, outputs = system.loss(params, {}, batch | {"soft_label": jnp.asarray(soft_label)}, jax.random.key(1), 0)
    np.testing.assert_allclose(soft, -(soft_label * log_p).sum(1).mean(), rtol=1e-5)
    np.testing.assert_allclose(outputs.metrics["accuracy"], (log_p.argmax(1) == labels).mean())


def test_drop_path_depends_on_key_and_example_alone_and_is_off_in_features() -> None:
    system, batch = tiny(drop_path=0.7), batch_of()
    params = trained_head(fresh(tiny()).params)
    loss = jax.jit(lambda params, batch, key: system.loss(params, {}, batch, key, 0)[0])
    one = loss(params, batch, jax.random.key(1))
    assert one != loss(params, batch, jax.random.key(2))
    assert one == loss(params, batch, jax.random.key(1))
    order = jnp.array([3, 1, 5, 0, 2, 4])
    np.testing.assert_allclose(loss(params, {name: value[order] for name, value in batch.items()}, jax.random.key(1)), one, rtol=1e-5)
    dropped = system.forward(params, batch["image"], jnp.zeros((2, 2, 6)))["logits"]
    kept = tiny(drop_path=0.0).forward(params, batch["image"])["logits"]
    np.testing.assert_array_equal(system.features(params, {}, batch)["logits"], kept)
    assert jnp.abs(dropped - kept).max() > 1e-3


def test_layer_decay_and_masks_reach_the_parameters_of_this_system() -> None:
    params = fresh(tiny()).params
    scales = flatten_paths(layer_decay_scales(params, 0.5))
    assert scales["encoder/position"] == scales["encoder/patch_embed/kernel"] == 0.125
    assert scales["encoder/block_0/norm1/scale"] == 0.25 and scales["encoder/block_1/norm1/scale"] == 0.5
    assert scales["fc_norm/scale"] == scales["head/kernel"] == 1.0
    mask = flatten_paths(decay_mask(params, ("vectors", "cls_token", "position")))
    assert sorted(path for path, decays in mask.items() if decays and "block_1" not in path) == [
        "encoder/block_0/attention/out/kernel",
        "encoder/block_0/attention/qkv/kernel",
        "encoder/block_0/mlp/fc1/kernel",
        "encoder/block_0/mlp/fc2/kernel",
        "encoder/patch_embed/kernel",
        "head/kernel",
    ]


def test_a_pretrained_mae_encoder_comes_in_and_another_resolution_works() -> None:
    pretrained = Mae(**SIZE, decoder_width=8, decoder_depth=1, decoder_heads=2)
    given = fresh(pretrained, 5).params["encoder"]
    system, batch = tiny(), batch_of()
    variables = system.with_encoder(fresh(system), given)
    expected = pretrained.encoder.clone(final_norm=False).apply({"params": given}, batch["image"])
    np.testing.assert_allclose(system.features(variables.params, {}, batch)["tokens"], expected[:, 1:], atol=1e-6)
    chex.assert_trees_all_equal(variables.params["head"], fresh(system).params["head"])
    larger, big_batch = tiny(image_size=16), batch_of(size=16)
    variables = larger.with_encoder(fresh(larger, size=16), given, grid=(2, 2))
    assert variables.params["encoder"]["position"].shape == (1, 17, 16)
    assert np.isfinite(larger.loss(variables.params, {}, big_batch, jax.random.key(1), 0)[0])


def test_it_overfits_a_batch() -> None:
    system, batch = tiny(label_smoothing=0.0), batch_of()
    params = fresh(tiny()).params
    optimizer = make_optimizer("adamw", schedule=warmup_constant(3e-3, 0), layer_decay=0.75, weight_decay=0.05)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, count: jax.Array) -> tuple[Any, Any, jax.Array]:
        key = jax.random.fold_in(jax.random.key(1), count)
        loss, grads = jax.value_and_grad(lambda params: system.loss(params, {}, batch, key, count)[0])(params)
        updates, state = optimizer.update(grads, state, params, count)
        return optax.apply_updates(params, updates), state, loss

    for count in range(80):
        params, state, loss = step(params, state, jnp.int32(count))
    assert loss < 0.1
    assert (system.features(params, {}, batch)["logits"].argmax(-1) == batch["label"]).all()


def test_low_precision_keeps_float32_where_it_matters() -> None:
    system, batch = tiny(dtype="bfloat16"), batch_of()
    params = fresh(tiny()).params
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    features = system.features(params, {}, batch)
    assert all(value.dtype == jnp.float32 for value in features.values())
    exact = tiny().features(params, {}, batch)
    np.testing.assert_allclose(features["tokens"], exact["tokens"], atol=0.1)


def test_flops_of_vit_b_and_sizes_of_the_paper() -> None:
    shape = {"image": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)}
    # 0.116 G of patch projection, 12 blocks at 197 tokens, 0.77 M of head: multiply-adds, counted twice.
    blocks = 12 * (12 * 197 * 768**2 + 2 * 197**2 * 768)
    np.testing.assert_allclose(FineTune().forward_flops(shape), 2 * (196 * 768 * 768 + blocks + 768 * 1000))
    shapes = jax.eval_shape(FineTune().init, jax.random.key(0), shape)
    # The released code's count of ViT-B with 1000 classes, which includes the position table.
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes.params)) == 86_567_656


def test_bad_arguments_are_named() -> None:
    with pytest.raises(UserError, match=r"unknown pool 'men' .did you mean 'mean'"):
        tiny(pool="men")
    with pytest.raises(UserError, match="drop_path=1"):
        tiny(drop_path=1.0)
    with pytest.raises(UserError, match="not a multiple of its 3 heads"):
        FineTune(**SIZE | {"heads": 3})
