"""Optimizers against a plain numpy float64 twin, masks and scales on a MAE-shaped tree, clipping, averaging, skipped steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maskae import optim
from maskae.errors import UserError
from maskae.paths import flatten_paths, unflatten_paths
from maskae.schedules import warmup_constant, warmup_cosine

STEPS = 5


def mae_tree(depth: int = 3, width: int = 4) -> dict[str, Any]:
    """Parameters named and shaped as those of the fine-tuned ViT, of random values."""
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder/patch_embed/kernel": (12, width),
        "encoder/patch_embed/bias": (width,),
        "encoder/cls_token": (1, 1, width),
        "encoder/position": (1, 5, width),
    }
    for j in range(depth):
        block = f"encoder/block_{j}"
        shapes |= {f"{block}/{norm}/{leaf}": (width,) for norm in ("norm1", "norm2") for leaf in ("scale", "bias")}
        shapes |= {f"{block}/attention/qkv/kernel": (width, 3, 2, 2), f"{block}/attention/qkv/bias": (3, 2, 2)}
        shapes |= {f"{block}/attention/out/kernel": (2, 2, width), f"{block}/attention/out/bias": (width,)}
        shapes |= {f"{block}/mlp/fc1/kernel": (width, 8), f"{block}/mlp/fc1/bias": (8,)}
        shapes |= {f"{block}/mlp/fc2/kernel": (8, width), f"{block}/mlp/fc2/bias": (width,)}
    shapes |= {"fc_norm/scale": (width,), "fc_norm/bias": (width,), "head/kernel": (width, 10), "head/bias": (10,)}
    return unflatten_paths({path: random.normal(size=shape).astype(np.float32) for path, shape in shapes.items()})


def gradients(params: dict[str, Any], step: int) -> dict[str, Any]:
    random = np.random.default_rng(100 + step)
    return jax.tree.map(lambda leaf: (0.3 * random.normal(size=leaf.shape)).astype(np.float32), params)


def run(optimizer: optim.Optimizer, params: dict[str, Any], steps: int = STEPS) -> tuple[dict[str, Any], Any]:
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(gradients(params, step), state, params, step)
        params = optax.apply_updates(params, updates)
    return params, state


def twin(rule: Callable[..., np.ndarray], params: dict[str, Any], schedule: Any) -> dict[str, np.ndarray]:
    """Every leaf taken through `rule(path, w, g, memory, lr, t)`, which returns the new weights, in float64."""
    result = {path: leaf.astype(np.float64) for path, leaf in flatten_paths(params).items()}
    memory: dict[str, dict[str, np.ndarray]] = {path: {} for path in result}
    for step in range(STEPS):
        grads = flatten_paths(gradients(params, step))
        for path, weights in result.items():
            result[path] = rule(path, weights, grads[path].astype(np.float64), memory[path], float(schedule(step)), step + 1)
    return result


def vector(path: str) -> bool:
    return path.endswith(("bias", "scale"))


def adam_direction(g: np.ndarray, memory: dict[str, np.ndarray], t: int, b1: float, b2: float, eps: float) -> np.ndarray:
    memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * g
    memory["v"] = b2 * memory.get("v", 0.0) + (1 - b2) * g * g
    return (memory["m"] / (1 - b1**t)) / (np.sqrt(memory["v"] / (1 - b2**t)) + eps)


def adamw_rule(path: str, w: np.ndarray, g: np.ndarray, memory: dict[str, np.ndarray], lr: float, t: int) -> np.ndarray:
    w = w * (1 - lr * (0.0 if vector(path) else 0.05))
    return w - lr * adam_direction(g, memory, t, 0.9, 0.95, 1e-8)


def adam_rule(path: str, w: np.ndarray, g: np.ndarray, memory: dict[str, np.ndarray], lr: float, t: int) -> np.ndarray:
    return w - lr * adam_direction(g + 0.05 * w, memory, t, 0.9, 0.999, 1e-3)


def sgd_rule(path: str, w: np.ndarray, g: np.ndarray, memory: dict[str, np.ndarray], lr: float, t: int, nesterov: bool) -> np.ndarray:
    g = g + (0.0 if vector(path) else 0.05) * w
    memory["m"] = 0.8 * memory["m"] + g if "m" in memory else g
    return w - lr * (g + 0.8 * memory["m"] if nesterov else memory["m"])


def lars_rule(path: str, w: np.ndarray, g: np.ndarray, memory: dict[str, np.ndarray], lr: float, t: int) -> np.ndarray:
    if not vector(path):
        g = g + 0.05 * w
        g = g * 0.01 * np.sqrt((w * w).sum()) / np.sqrt((g * g).sum())
    memory["m"] = 0.9 * memory.get("m", 0.0) + g
    return w - lr * memory["m"]


def plain_rule(path: str, w: np.ndarray, g: np.ndarray, memory: dict[str, np.ndarray], lr: float, t: int) -> np.ndarray:
    return w - lr * g


@pytest.mark.parametrize(
    ("name", "arguments", "rule"),
    [
        ("adamw", {"b2": 0.95, "weight_decay": 0.05}, adamw_rule),
        ("adam", {"eps": 1e-3, "weight_decay": 0.05, "no_decay": ()}, adam_rule),
        ("sgd", {"momentum": 0.8, "weight_decay": 0.05}, partial(sgd_rule, nesterov=False)),
        ("nesterov", {"momentum": 0.8, "weight_decay": 0.05}, partial(sgd_rule, nesterov=True)),
        ("sgd", {"momentum": 0.0}, plain_rule),
        ("lars", {"trust": 0.01, "weight_decay": 0.05}, lars_rule),
    ],
)
def test_optimizer_against_numpy(name: str, arguments: dict[str, Any], rule: Callable[..., np.ndarray]) -> None:
    schedule = warmup_cosine(0.1, 0.0, 2, 8)
    params = mae_tree(depth=1)
    got = flatten_paths(run(optim.make_optimizer(name, schedule=schedule, **arguments), params)[0])
    for path, expected in twin(rule, params, schedule).items():
        np.testing.assert_allclose(got[path], expected, rtol=2e-5, atol=2e-6, err_msg=path)


def test_lars_leaves_a_zero_weight_and_a_zero_gradient_alone() -> None:
    params = {"kernel": jnp.zeros((2, 3)), "other": {"kernel": jnp.ones((2, 3))}}
    grads = {"kernel": jnp.ones((2, 3)), "other": {"kernel": jnp.zeros((2, 3))}}
    optimizer = optim.make_optimizer("lars", schedule=warmup_constant(1.0, 0))
    updates, _ = optimizer.update(grads, optimizer.init(params), params, 0)
    np.testing.assert_array_equal(updates["kernel"], -1.0)
    np.testing.assert_array_equal(updates["other"]["kernel"], 0.0)


def test_scales_and_decay_of_the_papers_fine_tuning(shared: Path) -> None:
    recorded = json.loads((shared / "goldens" / "mae" / "a" / "case.json").read_text())["finetune"]
    params = mae_tree()
    scales = flatten_paths(optim.layer_decay_scales(params, recorded["layer_decay"]))
    decays = flatten_paths(optim.decay_mask(params, ("vectors", "cls_token", "position")))
    ours = {"pos_embed": "encoder/position", "cls_token": "encoder/cls_token"}
    seen = set()
    for name, (scale, weight_decay) in recorded["lr_scale_and_weight_decay_per_parameter"].items():
        path = ours.get(name) or name.replace(".", "/")
        path = path.replace("patch_embed/proj", "encoder/patch_embed").replace("blocks/", "encoder/block_")
        path = path.replace("attn/proj", "attention/out").replace("attn", "attention")
        path = path.replace("weight", "scale" if "norm" in path else "kernel")
        assert scales[path] == pytest.approx(scale, rel=1e-9), path
        assert decays[path] == (weight_decay > 0), path
        seen.add(path)
    assert seen == set(scales)


def test_tokens_decay_in_pre_training_and_vectors_do_not() -> None:
    mask = flatten_paths(optim.decay_mask(mae_tree()))
    assert mask["encoder/cls_token"] and mask["encoder/position"] and mask["encoder/block_0/attention/qkv/kernel"]
    assert not mask["encoder/block_0/attention/qkv/bias"] and not mask["fc_norm/scale"]
    assert all(flatten_paths(optim.decay_mask(mae_tree(), ())).values())


def test_the_encoder_norm_and_a_decoder_are_in_the_last_group() -> None:
    params = mae_tree(depth=2) | {"decoder": {"block_0": {"norm1": {"scale": np.ones(4, np.float32)}}}}
    params["encoder"]["norm"] = {"scale": np.ones(4, np.float32)}
    scales = flatten_paths(optim.layer_decay_scales(params, 0.5))
    assert scales["encoder/norm/scale"] == scales["decoder/block_0/norm1/scale"] == 1.0
    assert scales["encoder/block_1/mlp/fc1/kernel"] == 0.5 and scales["encoder/position"] == 0.125


def test_layer_decay_and_path_scales_multiply_the_update() -> None:
    params = mae_tree(depth=2)
    grads, schedule = gradients(params, 0), warmup_constant(0.1, 0)
    plain = optim.make_optimizer("adamw", schedule=schedule, weight_decay=0.05)
    lr_scales = (("^head/", 10.0), ("norm1", 0.0))
    scaled = optim.make_optimizer("adamw", schedule=schedule, weight_decay=0.05, layer_decay=0.5, lr_scales=lr_scales)
    one = flatten_paths(plain.update(grads, plain.init(params), params, 0)[0])
    two = flatten_paths(scaled.update(grads, scaled.init(params), params, 0)[0])
    expected = {"encoder/cls_token": 0.125, "encoder/block_1/mlp/fc1/kernel": 0.5, "head/kernel": 10.0, "encoder/block_0/norm1/scale": 0.0}
    for path, factor in expected.items():
        np.testing.assert_allclose(two[path], factor * one[path], rtol=1e-6, err_msg=path)


def test_names_that_fit_nothing_are_named() -> None:
    params, schedule = mae_tree(depth=1), warmup_constant(0.1, 0)
    with pytest.raises(UserError, match="did you mean 'adamw'"):
        optim.make_optimizer("admw", schedule=schedule)
    with pytest.raises(UserError, match=r"no_decay names 'cls_tokens'.*did you mean 'cls_token'"):
        optim.make_optimizer("adamw", schedule=schedule, no_decay=("vectors", "cls_tokens")).init(params)
    with pytest.raises(UserError, match="matches no parameter"):
        optim.make_optimizer("adamw", schedule=schedule, lr_scales=(("decoder/", 2.0),)).init(params)
    with pytest.raises(UserError, match="encoder/block_0"):
        optim.make_optimizer("adamw", schedule=schedule, layer_decay=0.5).init({"head": params["head"]})


def test_a_skipped_step_does_not_shift_the_schedule() -> None:
    """A run whose step 1 is thrown away applies the rate of step 2 next, and no trace of step 1 is left."""
    params, schedule = mae_tree(depth=1), warmup_cosine(0.1, 0.0, 4, 8)
    optimizer = optim.make_optimizer("sgd", schedule=schedule, momentum=0.0)
    grads = gradients(params, 0)
    state = optimizer.init(params)
    rates = []
    for step in (0, 2, 3):
        updates, state = optimizer.update(grads, state, params, step)
        rates.append(-updates["head"]["bias"][0] / grads["head"]["bias"][0])
    np.testing.assert_allclose(rates, [0.0, 0.05, 0.075], rtol=1e-5)


def test_the_state_is_plain_dicts_and_survives_a_round_trip() -> None:
    params = mae_tree(depth=1)
    for name in optim.OPTIMIZERS:
        state = optim.make_optimizer(name, schedule=warmup_constant(0.1, 0)).init(params)
        rebuilt = unflatten_paths(flatten_paths(state))
        chex.assert_trees_all_equal_structs(rebuilt, state)
    state = optim.make_optimizer("adamw", schedule=warmup_constant(0.1, 0), mu_dtype="bfloat16").init(params)
    assert state["mu"]["head"]["kernel"].dtype == jnp.bfloat16 and state["nu"]["head"]["kernel"].dtype == jnp.float32
    assert optim.make_optimizer("sgd", schedule=warmup_constant(0.1, 0), momentum=0.0).init(params) == {}


def test_low_precision_momentum_stays_close() -> None:
    params, schedule = mae_tree(depth=1), warmup_constant(0.01, 0)
    exact, _ = run(optim.make_optimizer("adamw", schedule=schedule), params)
    small, state = run(optim.make_optimizer("adamw", schedule=schedule, mu_dtype="bfloat16"), params)
    assert state["mu"]["head"]["kernel"].dtype == jnp.bfloat16
    assert small["head"]["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(small["head"]["kernel"], exact["head"]["kernel"], atol=STEPS * 0.01 * 0.02)


def test_partition_is_each_optimizer_on_its_own_part() -> None:
    params, schedule = mae_tree(depth=1), warmup_constant(0.1, 0)
    adamw = optim.make_optimizer("adamw", schedule=schedule, weight_decay=0.1, layer_decay=0.5)
    lars = optim.make_optimizer("lars", schedule=schedule)
    both, state = run(optim.partition([("^(encoder|fc_norm)/", adamw), ("^head/", lars)]), params)
    assert set(state) == {"group_0", "group_1"} and set(state["group_1"]["trace"]) == {"head"}
    first, second = run(adamw, params)[0], run(lars, params)[0]
    for path, value in flatten_paths(both).items():
        expected = flatten_paths(second if path.startswith("head/") else first)[path]
        np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=path)
    with pytest.raises(UserError, match="no optimizer group matches the parameter fc_norm"):
        optim.partition([("^encoder/", adamw), ("^head/", lars)]).init(params)
    with pytest.raises(UserError, match="'decoder' matches no parameter"):
        optim.partition([("decoder", adamw), ("", lars)]).init(params)


def test_each_part_is_clipped_by_its_own_norm() -> None:
    sgd = optim.make_optimizer("sgd", schedule=warmup_constant(1.0, 0), momentum=0.0)
    both = optim.partition([("^small", optim.clipped(sgd, 2.0)), ("", optim.clipped(sgd, 2.0))])
    params = {"small": jnp.zeros(2), "large": jnp.zeros(2)}
    grads = {"small": jnp.array([0.6, 0.8]), "large": jnp.array([30.0, 40.0])}
    updates, _ = both.update(grads, both.init(params), params, 0)
    np.testing.assert_allclose(updates["small"], [-0.6, -0.8], rtol=1e-6)
    np.testing.assert_allclose(updates["large"], [-1.2, -1.6], rtol=1e-6)
    assert optim.clipped(sgd, 0.0) is sgd


def test_clipping_reports_the_norm_before() -> None:
    grads = {"a": jnp.array([3.0, 0.0]), "b": {"c": jnp.array([[4.0]])}}
    clipped, norm = optim.clip_by_global_norm(grads, 1.0)
    assert float(norm) == 5.0
    np.testing.assert_allclose(clipped["b"]["c"], [[0.8]], rtol=1e-6)
    for limit in (10.0, None, 0.0):
        same, norm = optim.clip_by_global_norm(grads, limit)
        np.testing.assert_array_equal(same["a"], grads["a"])
        assert float(norm) == 5.0
    assert not np.isfinite(float(optim.clip_by_global_norm({"a": jnp.array([jnp.nan])}, 1.0)[1]))


def test_moving_average() -> None:
    ema, params = {"a": jnp.array([1.0, 0.1])}, {"a": jnp.array([3.0, 0.1])}
    np.testing.assert_allclose(optim.ema_update(ema, params, 0.9)["a"], [1.2, 0.1], rtol=1e-6)
    np.testing.assert_array_equal(optim.ema_update(params, params, 0.9999)["a"], params["a"])


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_sharded_parameters_get_the_same_update(name: str) -> None:
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    params = {"kernel": np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)}
    spread = jax.device_put(params, NamedSharding(mesh, PartitionSpec("fsdp")))
    optimizer = optim.make_optimizer(name, schedule=warmup_constant(0.1, 0), weight_decay=0.1)
    one, two = run(optimizer, params, 2)[0], run(optimizer, spread, 2)[0]
    np.testing.assert_allclose(two["kernel"], one["kernel"], rtol=1e-6)
