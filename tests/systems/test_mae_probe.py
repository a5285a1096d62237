"""Linear probing: only the head trains, the batch norm follows the global batch, evaluation uses the running statistics."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maskae.errors import UserError
from maskae.optim import make_optimizer
from maskae.schedules import warmup_constant
from maskae.systems.contract import System, Variables
from maskae.systems.mae import Mae
from maskae.systems.mae_probe import LinearProbe, batch_norm

SIZE = {"image_size": 8, "channels": 1, "patch_size": 4, "width": 16, "depth": 1, "heads": 2}
tiny = partial(LinearProbe, **SIZE, num_classes=3)


def batch_of(count: int = 8) -> dict[str, jax.Array]:
    image = jnp.asarray(np.random.default_rng(0).normal(size=(count, 8, 8, 1)), jnp.float32)
    return {"image": image, "label": jnp.arange(count) % 3, "example": jnp.arange(count)}


@cache
def fresh(system: Any, seed: int = 0) -> Variables:
    """Initial variables; compiled at once and once, which is quicker than one operation at a time."""
    return jax.jit(system.init)(jax.random.key(seed), batch_of())


def test_contract_and_initial_values() -> None:
    system, batch = tiny(), batch_of()
    assert isinstance(system, System)
    params, state = fresh(system)
    assert set(params) == {"head"} and set(state) == {"encoder", "batch_norm"} and "norm" in state["encoder"]
    shapes = {name: value.shape for name, value in system.features(params, state, batch).items()}
    assert shapes == {"pooled": (8, 16), "cls": (8, 16), "tokens": (8, 4, 16), "logits": (8, 3)}
    wide = fresh(tiny(num_classes=1000)).params["head"]
    np.testing.assert_allclose(np.std(wide["kernel"]), 0.01, rtol=0.05)
    np.testing.assert_array_equal(wide["bias"], 0.0)


def test_batch_norm_against_numpy_over_steps() -> None:
    random = np.random.default_rng(0)
    statistics: dict[str, Any] = {"mean": jnp.zeros(4), "variance": jnp.ones(4)}
    mean, variance = np.zeros(4), np.ones(4)
    for _ in range(3):
        x = random.normal(2.0, 3.0, (5, 4))
        got, statistics = batch_norm(jnp.asarray(x, jnp.float32), statistics, train=True)
        np.testing.assert_allclose(got, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6), atol=1e-5)
        mean, variance = 0.9 * mean + 0.1 * x.mean(0), 0.9 * variance + 0.1 * x.var(0, ddof=1)
    np.testing.assert_allclose(statistics["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(statistics["variance"], variance, rtol=1e-5)
    x = random.normal(size=(2, 4))
    got, after = batch_norm(jnp.asarray(x, jnp.float32), statistics, train=False)
    np.testing.assert_allclose(got, (x - mean) / np.sqrt(variance + 1e-6), atol=1e-5)
    chex.assert_trees_all_equal(after, statistics)


def test_one_example_and_constant_features_stay_finite() -> None:
    statistics = {"mean": jnp.zeros(4), "variance": jnp.ones(4)}
    for x in (jnp.ones((1, 4)), jnp.full((6, 4), 3.0)):
        got, after = batch_norm(x, statistics, train=True)
        assert np.isfinite(got).all() and np.isfinite(after["variance"]).all()


def test_only_the_head_trains_and_the_encoder_stays() -> None:
    system, batch = tiny(), batch_of()
    params, state = fresh(system)

    def loss(params: Any, state: Any) -> tuple[jax.Array, Any]:
        return system.loss(params, state, batch, jax.random.key(1), 0)

    to_encoder, outputs = jax.grad(loss, argnums=1, has_aux=True)(params, state)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(to_encoder["encoder"]))
    chex.assert_trees_all_equal(outputs.state["encoder"], state["encoder"])
    assert (outputs.state["batch_norm"]["mean"] != 0).any()
    grads = jax.grad(loss, has_aux=True)(params, state)[0]
    assert jnp.abs(grads["head"]["kernel"]).max() > 1e-3


def test_training_separates_classes_and_evaluation_agrees() -> None:
    """Features whose class shows in their mean: LARS finds it, and the running statistics end near those of the batch."""
    system, batch = tiny(), batch_of(30)
    batch["image"] = 0.3 * batch["image"] + batch["label"][:, None, None, None] * jnp.ones((8, 8, 1)).at[4:].set(-1.0)
    params, state = fresh(system)
    optimizer = make_optimizer("lars", schedule=warmup_constant(20.0, 0))
    opt = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, opt: Any) -> tuple[Any, Any, Any, jax.Array]:
        (loss, outputs), grads = jax.value_and_grad(system.loss, has_aux=True)(params, state, batch, jax.random.key(1), 0)
        updates, opt = optimizer.update(grads, opt, params, 0)
        return jax.tree.map(jnp.add, params, updates), outputs.state, opt, loss

    losses = []
    for _ in range(100):
        params, state, opt, loss = step(params, state, opt)
        losses.append(float(loss))
    assert losses[0] > 0.9 and losses[-1] < 0.3
    assert (system.features(params, state, batch)["logits"].argmax(-1) == batch["label"]).mean() > 0.95


def test_statistics_are_those_of_the_global_batch_on_any_number_of_devices() -> None:
    system, batch = tiny(), batch_of()
    params, state = fresh(system)
    loss = jax.jit(lambda batch: system.loss(params, state, batch, jax.random.key(1), 0))
    one, outputs = loss(batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    many, spread_outputs = loss(spread)
    np.testing.assert_allclose(many, one, rtol=1e-5)
    chex.assert_trees_all_close(spread_outputs.state["batch_norm"], outputs.state["batch_norm"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_features_are_those_of_the_pretrained_encoder(pool: str) -> None:
    pretrained, batch = Mae(**SIZE, decoder_width=8, decoder_depth=1, decoder_heads=2, pool=pool), batch_of()
    given = fresh(replace(pretrained, pool="mean"), 5)
    system = tiny(pool=pool)
    params, state = system.with_encoder(fresh(tiny()), given.params["encoder"])
    expected = pretrained.features(given.params, {}, batch)
    got = system.features(params, state, batch)
    for name in ("pooled", "cls", "tokens"):
        np.testing.assert_allclose(got[name], expected[name], atol=1e-6, err_msg=name)


def test_flops_and_bad_arguments() -> None:
    shape = {"image": jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)}
    np.testing.assert_allclose(tiny().forward_flops(shape), 2 * (4 * 16 * 16 + 12 * 5 * 16**2 + 2 * 5**2 * 16 + 16 * 3))
    with pytest.raises(UserError, match=r"unknown pool 'clss' .did you mean 'cls'"):
        tiny(pool="clss")
    with pytest.raises(UserError, match="not a multiple of its 3 heads"):
        LinearProbe(**SIZE | {"heads": 3})
