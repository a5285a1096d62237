"""The one step: accumulation, the non-finite guard, averaging, and independence from the number of devices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from maskae import mesh as mesh_module
from maskae.config import load_config
from maskae.errors import UserError
from maskae.experiment import Experiment, build
from maskae.optim import make_optimizer
from maskae.schedules import make_schedule
from maskae.step import make_train_step, train_state_of
from maskae.systems.contract import Outputs, Variables

SMALL = ("model.depth=1", "model.width=16", "model.heads=2", "model.decoder_width=16", "model.decoder_depth=1", "model.decoder_heads=2")


@dataclasses.dataclass(frozen=True)
class Line:
    """loss = mean((w x - 1)^2) over examples; its state counts calls."""

    def init(self, rng, batch):
        return Variables({"w": jnp.ones((2,))}, {"calls": jnp.zeros(())})

    def loss(self, params, state, batch, rng, step):
        error = batch["image"] @ params["w"] - 1
        return (error**2).mean(), Outputs({"size": jnp.float32(len(error))}, {"calls": state["calls"] + 1})


def line_step(**options):
    optimizer = make_optimizer("sgd", schedule=make_schedule("constant", peak=0.1, total_steps=10), momentum=0.0)
    step = make_train_step(Line(), optimizer, lambda batch, key: batch, jax.random.key(0), **options)
    variables = Line().init(None, None)
    state = train_state_of(variables.params, variables.state, optimizer, ema=bool(options.get("ema_decay")))
    return jax.jit(step), state


IMAGES = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)


def test_accumulation_gives_the_gradient_of_the_whole_batch_and_passes_the_state_on():
    whole, state = line_step()
    parts, _ = line_step(accumulate=4)
    a, _ = whole(state, {"image": IMAGES})
    b, metrics = parts(state, {"image": IMAGES})
    np.testing.assert_allclose(a["params"]["w"], b["params"]["w"], rtol=1e-6)
    assert float(b["state"]["calls"]) == 4 and float(metrics["size"]) == 2


def test_a_non_finite_step_changes_nothing_but_the_counters():
    step, state = line_step(ema_decay=0.9)
    good, _ = step(state, {"image": IMAGES})
    bad = IMAGES.copy()
    bad[3] = np.inf
    after, metrics = step(good, {"image": bad})
    for name in ("params", "state", "opt", "ema"):
        jax.tree.map(np.testing.assert_array_equal, after[name], good[name])
    assert int(after["step"]) == 2 and int(after["guard"]["skipped"]) == 1 and int(metrics["nonfinite_in_a_row"]) == 1
    again, metrics = step(after, {"image": IMAGES})
    assert int(metrics["nonfinite_in_a_row"]) == 0 and int(metrics["skipped_steps"]) == 1
    assert not np.array_equal(again["params"]["w"], after["params"]["w"])


def test_clipping_bounds_the_update_and_reports_the_norm_before_it():
    step, state = line_step(clip_norm=0.1)
    after, metrics = step(state, {"image": IMAGES})
    moved = np.linalg.norm(np.asarray(after["params"]["w"] - state["params"]["w"]))
    np.testing.assert_allclose(moved, 0.1 * 0.1, rtol=1e-4)
    assert float(metrics["gradient_norm"]) > 0.2


def test_the_average_follows_the_parameters():
    step, state = line_step(ema_decay=0.75)
    after, _ = step(state, {"image": IMAGES})
    expected = 0.75 * np.asarray(state["params"]["w"]) + 0.25 * np.asarray(after["params"]["w"])
    np.testing.assert_allclose(after["ema"]["w"], expected, rtol=1e-6)


@pytest.fixture(scope="module")
def reference() -> tuple[list[float], dict]:
    return train_small(devices=1)


def train_small(devices: int, *overrides: str) -> tuple[list[float], dict]:
    """Losses and parameters of four steps of a small MAE with masks, flips and accumulation on the first `devices` devices."""
    # Plain SGD: Adam turns the rounding noise of a zero gradient (the key bias) into steps of full size.
    recipe = ["train.batch_size=32", "data.flip=true", "train.total_steps=8", "optimizer.name=sgd", "optimizer.base_learning_rate=0.8"]
    config = load_config("configs/mae.py:tiny", [*SMALL, *recipe, *overrides])
    whole = build(config)
    sizes = config.mesh.to_dict()
    mesh = mesh_module.make_mesh(sizes, jax.devices()[:devices])
    experiment = Experiment(config, mesh, whole.system, whole.train_source, whole.val_source)
    with jax.set_mesh(experiment.mesh):
        state, losses = experiment.fresh_state(), []
        for k in range(4):
            state, metrics = experiment.train_step(state, experiment.put(experiment.pipeline.batch(k)))
            losses.append(float(metrics["loss"]))
        return losses, jax.tree.map(np.asarray, state["params"])


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("mesh.fsdp=4",),
        ("mesh.fsdp=2", "mesh.tensor=2"),
        ("train.accumulate=2",),
        ("model.scan=true", "model.remat=dots", "mesh.fsdp=2"),
    ],
    ids=["data", "fsdp", "tensor", "accumulate", "scan"],
)
def test_eight_devices_train_as_one(reference, overrides):
    losses, params = train_small(8, *overrides)
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), params, reference[1])


def test_mesh_and_batch_that_do_not_divide_are_one_line():
    with pytest.raises(UserError, match="does not divide the 8 devices"):
        mesh_module.make_mesh({"data": 3, "fsdp": 1, "tensor": 1})
    with pytest.raises(UserError, match="one at most is -1"):
        mesh_module.make_mesh({"data": -1, "fsdp": -1, "tensor": 1})
    mesh = mesh_module.make_mesh({"data": -1, "fsdp": 2, "tensor": 1})
    assert dict(mesh.shape) == {"slice": 1, "data": 4, "fsdp": 2, "tensor": 1}
    with pytest.raises(UserError, match=r"batch_size=20 .*nearest: 16"):
        mesh_module.check_batch(20, 1, mesh)


def test_parameters_and_their_moments_lie_on_the_same_axes():
    config = load_config("configs/mae.py:tiny", ["mesh.fsdp=2", "mesh.tensor=2"])
    state = build(config).abstract_state
    block = state["params"]["encoder"]["block_0"]
    moments = state["opt"]["mu"]["encoder"]["block_0"]
    assert block["attention"]["qkv"]["kernel"].sharding.spec == PartitionSpec("fsdp", None, "tensor", None)
    assert moments["attention"]["qkv"]["kernel"].sharding.spec == PartitionSpec("fsdp", None, "tensor", None)
    assert block["mlp"]["fc2"]["kernel"].sharding.spec == PartitionSpec("tensor", "fsdp")
    assert block["norm1"]["scale"].sharding.spec == PartitionSpec()


def test_microbatches_are_refused_for_a_loss_that_couples_examples(monkeypatch):
    experiment = build(load_config("configs/mae.py:tiny", ["train.accumulate=2"]))
    monkeypatch.setattr(type(experiment.system), "couples_examples", True, raising=False)
    with pytest.raises(UserError, match="train.accumulate=2"):
        _ = experiment.train_step


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("accepted", [True, False])
def test_the_old_state_stays_where_the_new_is_refused(accepted: bool, on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from maskae import step

    monkeypatch.setattr(step, "compiles_for_cpu", lambda: on_cpu)
    old, new = {"params": jnp.ones(2), "opt": {}}, {"params": jnp.full(2, 1.0 if accepted else jnp.nan) * 3, "opt": {}}
    kept = jax.jit(lambda flag: step.choose(flag, lambda: new, old))(jnp.asarray(accepted))
    assert kept["params"].tolist() == ([3.0, 3.0] if accepted else [1.0, 1.0])
