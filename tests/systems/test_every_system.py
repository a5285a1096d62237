"""What every system owes, whatever it is: finite gradients, learning, the same on 1 and 8 devices, exact resume, its recorded curve."""

from __future__ import annotations

import functools
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from maskae import train
from maskae.checkpoint import Checkpointer
from maskae.experiment import Experiment, build
from maskae.merging import stage_config
from maskae.mesh import make_mesh
from maskae.systems import SYSTEMS
from tests.systems.cases import CASES, DATA, FAST, REFERENCES, Case, folders, load, losses_in

ONE = {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.fixture(params=[row if row in FAST else pytest.param(row, marks=pytest.mark.slow) for row in sorted(CASES)])
def name(request) -> str:
    """Every row of the table; those that read real data are skipped where it is absent."""
    case = CASES[request.param]
    if case.data and not (DATA / case.data).exists():
        pytest.skip(f"needs the real data: no {DATA / case.data} (set MASKAE_SHARED)")
    return request.param


@dataclass(frozen=True)
class Whole:
    """A run that was never interrupted."""

    case: Case
    config: Any
    workdir: Path

    @property
    def last(self) -> Path:
        """The folder of the last stage."""
        return folders(self.config, self.workdir)[-1]

    def state(self) -> dict[str, Any]:
        """Everything that the last checkpoint holds."""
        return stored(self.last)

    @functools.cached_property
    def last_config(self) -> Any:
        """The config of the last stage."""
        return stage_config(self.config, self.config.stages[-1]) if self.config.stages else self.config

    def experiment(self, mesh: Mesh) -> Experiment:
        """Its last stage on other devices."""
        return build(self.last_config, mesh=mesh)


def stored(folder: Path) -> dict[str, Any]:
    with Checkpointer(str(folder / "checkpoints"), keep_last=1) as checkpointer:
        return checkpointer.restore_raw(checkpointer.latest_step())


RUNS: dict[str, Whole] = {}


@pytest.fixture
def whole(name, tmp_path_factory) -> Whole:
    """The row's run, made once for all tests of the row."""
    if name not in RUNS:
        case = CASES[name]
        config, workdir = load(case), tmp_path_factory.mktemp("whole") / name
        assert train.run(config, workdir) == 0
        RUNS[name] = Whole(case, config, workdir)
    return RUNS[name]


def loss_and_gradients(whole: Whole, mesh: Mesh) -> tuple[float, Any, dict[str, np.ndarray], Any]:
    """Loss, gradients and features of the first batch at the end of the run, on the devices of `mesh`."""
    experiment = whole.experiment(mesh)
    with jax.set_mesh(mesh):
        state, _ = experiment.load_for_evaluation(whole.last)
        batch = experiment.put(experiment.pipeline.batch(0))

        def objective(params: Any, rest: Any, batch: Any) -> Any:
            prepared = experiment.prepare(batch, jax.random.key(1))
            (loss, _), grads = jax.value_and_grad(experiment.system.loss, has_aux=True)(
                params, rest, prepared, jax.random.key(2), np.int32(0)
            )
            return loss, grads, experiment.system.features(params, rest, experiment.prepare_evaluation(batch))

        loss, grads, features = jax.jit(objective)(state["params"], state["state"], batch)
        return float(loss), jax.tree.map(np.asarray, grads), jax.tree.map(np.asarray, features), batch["example"].shape[0]


@functools.cache
def on_one_device(name: str) -> tuple[float, Any, dict[str, np.ndarray], Any]:
    return loss_and_gradients(RUNS[name], make_mesh(ONE, jax.devices()[:1]))


def test_gradients_are_finite_and_features_have_their_shapes(whole, name):
    loss, grads, features, batch_size = on_one_device(name)
    assert np.isfinite(loss)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    assert leaves
    for path, leaf in leaves:
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
    assert any(np.abs(leaf).max() > 0 for _, leaf in leaves)
    assert features["pooled"].shape[0] == batch_size
    assert features["pooled"].ndim == 2
    for feature, values in features.items():
        assert np.isfinite(values).all(), feature


def test_loss_and_gradients_are_the_same_on_eight_devices(whole, name):
    loss, grads, _, _ = on_one_device(name)
    spread, spread_grads, _, _ = loss_and_gradients(whole, make_mesh({"data": 4, "fsdp": 2, "tensor": 1}))
    assert spread == pytest.approx(loss, rel=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    for (path, one), eight in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(spread_grads), strict=True):
        np.testing.assert_allclose(
            eight, one, rtol=0, atol=CASES[name].gradient_tolerance * largest, err_msg=jax.tree_util.keystr(path)
        )


def test_it_overfits_a_batch_of_real_examples(whole, name):
    steps, share = whole.case.overfit
    experiment = whole.experiment(make_mesh(ONE, jax.devices()[:1]))
    with jax.set_mesh(experiment.mesh):
        state = experiment.fresh_state()
        started, _ = experiment.load_for_evaluation(whole.last)
        state = {**state, "params": started["params"], "state": started["state"]}
        batch = experiment.put(experiment.pipeline.batch(0))
        losses = []
        for _ in range(steps):
            state, metrics = experiment.train_step(state, batch)
            losses.append(float(metrics["loss"]))
    edge = max(1, steps // 10)
    assert np.mean(losses[-edge:]) < share * np.mean(losses[:edge]), losses[:: max(1, steps // 8)]


def test_a_stopped_run_goes_on_bit_for_bit(whole, name, tmp_path, monkeypatch):
    taken, calls = train.Loop.after_step, []
    middle = len(losses_in(whole.config, whole.workdir)) // 2

    def after_step(self, state, done, metrics):
        taken(self, state, done, metrics)
        calls.append(done)
        if len(calls) == middle:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train.Loop, "after_step", after_step)
        assert train.run(load(whole.case), tmp_path / "run") == 0
    assert len(calls) == middle, "it did not stop where it was told to"
    assert train.run(load(whole.case), tmp_path / "run") == 0
    again = stored(folders(whole.config, tmp_path / "run")[-1])
    jax.tree.map(np.testing.assert_array_equal, again, whole.state())
    assert losses_in(whole.config, tmp_path / "run") == losses_in(whole.config, whole.workdir)


def test_the_recorded_curve_comes_again(whole, name):
    recorded = json.loads((REFERENCES / f"{name}.json").read_text())["losses"]
    np.testing.assert_allclose(losses_in(whole.config, whole.workdir), recorded, rtol=whole.case.tolerance)


def test_every_system_is_in_the_table():
    # Fine-tuning, and systems that share their loss and wiring with a row: Point-CMAE's base, MR-MAE's other backbone, molecules. They are
    # tested in files of their own.
    elsewhere = {"mae_finetune", "mae_probe", "tip_classifier", "mc_mae_finetune"}
    elsewhere |= {"point_mae", "mc_mae", "mr_mc_mae", "graph_mae_molecules"}
    in_table = set()
    for case in CASES.values():
        config = load(case)
        in_table |= {stage_config(config, name).system for name in config.stages} or {config.system}
    assert set(SYSTEMS) - elsewhere - in_table == set()
