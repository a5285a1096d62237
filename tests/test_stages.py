"""Stages of a run, optimizers by group, records of any arrays."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae import systems, train
from maskae.config import apply_overrides, check, default_config, load_config, set_duration
from maskae.data.contract import sample_record
from maskae.data.sources import CachedSource, LimitedSource
from maskae.data.spec import DataSpec, Field
from maskae.errors import UserError
from maskae.experiment import Experiment, build
from maskae.merging import group_of, stage_config
from maskae.mesh import make_mesh
from maskae.run_sources import assumed_sources
from maskae.systems.contract import Outputs, Variables
from tests.data.test_cache import CountedSource
from tests.test_train import SMALL


def staged(*overrides: str) -> Any:
    """A config of two stages: an MAE, then the same from its weights at another rate."""
    quiet = ("evaluate.evaluators={}", "evaluate.baselines=false", "evaluate.panels=0")
    config = load_config("configs/mae.py:tiny", [*SMALL, *quiet])
    with config.unlocked():
        config.stages = ("first", "second")
        config.stage = {
            "first": {"train": {"total_steps": 4}},
            "second": {"init_from": "stage:first", "train": {"total_epochs": 0.1}, "model": {"mask_ratio": 0.5}},
        }
    apply_overrides(config, overrides)
    check(config)
    return config


def test_a_stage_is_the_config_with_its_own_part_over_it():
    config = staged("stage.second.train.total_steps=3", "stage.first.model.depth=2", "optimizer.clip_norm=1.0")
    first, second = (stage_config(config, name) for name in config.stages)
    assert (first.train.total_steps, second.train.total_steps) == (4, 3)
    assert second.train.total_epochs is None, "one suffix of a duration replaces the other"
    assert (first.model.mask_ratio, second.model.mask_ratio) == (0.75, 0.5)
    assert (first.model.depth, second.model.depth) == (2, 1)
    assert first.optimizer.clip_norm == second.optimizer.clip_norm == 1.0, "keys outside of a stage are those of all stages"
    assert not first.stages


def test_a_stage_with_a_system_of_its_own_has_its_own_model():
    config = default_config()
    config.model = {"depth": 3}
    config.stages, config.stage = ("other",), {"other": {"system": "mae_probe", "model": {"width": 8}}}
    assert stage_config(config, "other").model.to_dict() == {"width": 8}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.secnd.train.total_steps=3", "no stage 'secnd' .did you mean 'second'"),
        ("stage.second.train.total_stebs=3", "no key 'train.total_stebs' .did you mean 'train.total_steps'"),
        ("stages=('first', 'third')", "stages names 'third'"),
    ],
)
def test_a_wrong_stage_or_key_is_named(override, message):
    with pytest.raises(UserError, match=message):
        staged(override)


def test_a_part_with_an_unknown_key_is_named():
    config = default_config()
    config.stages, config.stage = ("one",), {"one": {"train": {"batch": 3}}}
    with pytest.raises(UserError, match="stage.one.train.batch: no key 'train.batch'"):
        check(config)


def test_stages_run_one_after_the_other_and_begin_where_the_last_one_ended(tmp_path, caplog):
    config = staged("stage.second.train.total_steps=2")
    with caplog.at_level("INFO"):
        assert train.run(config, tmp_path / "run") == 0
        assert train.run(config, tmp_path / "run") == 0
    folders = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert folders == ["1_first", "2_second"]
    messages = [record.getMessage() for record in caplog.records]
    assert [m for m in messages if m.startswith("stage ")] == ["stage 1 of 2: first", "stage 2 of 2: second"] * 2
    assert sum(m.startswith("resumed at step 4 of 4") for m in messages) == 1, "a finished stage is not run again"
    second = stage_config(config, "second")
    with second.unlocked():
        second.init_from = str(tmp_path / "run" / "1_first")
    experiment = build(second)
    with jax.set_mesh(experiment.mesh):
        started, ended = experiment.start_state(), experiment.load_for_evaluation(tmp_path / "run" / "1_first")[0]
    jax.tree.map(np.testing.assert_array_equal, started["params"], ended["params"])


def test_a_stage_from_one_that_is_not_before_it_is_refused(tmp_path):
    with pytest.raises(UserError, match="init_from=stage:second: no such stage before this one"):
        train.run(staged("stage.first.init_from=stage:second"), tmp_path / "run")


@dataclass(frozen=True)
class Centres:
    """Moves `centre` to the mean of the points; `begin` puts the state's centre at the mean of all records."""

    size: int = 3

    def init(self, rng: jax.Array, batch: dict[str, jax.Array]) -> Variables:
        width = batch["points"].shape[-1]
        return Variables({"centre": {"kernel": jnp.zeros(width)}, "critic": {"kernel": jnp.ones(width)}}, {"mean": jnp.zeros(width)})

    def begin(self, variables: Variables, stage: Any) -> Variables:
        rows = [np.asarray(batch["points"])[np.asarray(batch["valid"])] for batch in stage.batches()]
        assert sum(map(len, rows)) == len(stage)
        return Variables(variables.params, {"mean": np.concatenate(rows).mean((0, 1))})

    def order(self, variables: Variables, batch_size: int, seed: int) -> Any:
        return Backwards(round(float(variables.state["mean"][0])))

    def loss(self, params: Any, state: Any, batch: Any, rng: jax.Array, step: jax.Array) -> Any:
        distance = jnp.square(batch["points"] - params["centre"]["kernel"]).mean() + jnp.square(params["critic"]["kernel"]).sum()
        return distance, Outputs({}, state)

    def features(self, params: Any, state: Any, batch: Any) -> dict[str, jax.Array]:
        return {"pooled": batch["points"].mean(1)}

    def raw_features(self, batch: Any) -> dict[str, jax.Array]:
        return {"pooled": batch["points"].reshape(len(batch["points"]), -1)}

    def forward_flops(self, batch: Any) -> float:
        return float(batch["points"].shape[1])


@dataclass(frozen=True)
class Backwards:
    """A data order that a test can recognise."""

    first: int

    def __getitem__(self, j: int) -> int:
        return (self.first - j) % 24


FIELDS = {"points": Field((4, 3), "float32")}


@dataclass(frozen=True)
class Points:
    """24 records without an image: four points each, around (5, 5, 5)."""

    @property
    def spec(self) -> DataSpec:
        return DataSpec("points", None, 0, (), (), num_classes=2, counts={"train": 24}, fields=FIELDS)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        half = index % 2 - 0.5
        return {"points": np.tile(np.asarray([5 + half, 5 - half, 5 - half], np.float32), (4, 1)), "label": index % 2}

    def sample(self, index: int, generator: np.random.Generator) -> dict[str, Any]:
        return {"points": generator.normal(size=(4, 3)).astype(np.float32) + 5, "label": index % 2}

    def name(self, index: int) -> str:
        return f"points {index}"


@pytest.fixture
def points(monkeypatch) -> Experiment:
    monkeypatch.setitem(systems.SYSTEMS, "centres", Centres)
    config = default_config()
    config.system, config.model = "centres", {}
    config.data.update({"source": "points", "channels": 0, "fields": {"points": "float32[4,3]"}, "examples": 24})
    config.data.update({"train_transform": (), "val_transform": ()})
    config.train.batch_size, config.evaluate.batch_size = 8, 16
    config.evaluate.evaluators = {"knn": {}}
    config.evaluate.map_examples = 12
    config.optimizer.base_learning_rate = 3.2
    config.optimizer.groups = {"critic": {"name": "sgd", "arguments": {"momentum": 0.0}, "schedule": "constant"}}
    set_duration(config.optimizer, warmup_steps=0)
    set_duration(config.train, total_steps=6)
    config.lock()
    return build(config, (Points(), Points()))


def test_groups_clip_their_own_gradients(points):
    """A bound of almost nothing on the critic stops the critic and nothing else."""
    points.config.unlock()
    points.config.optimizer.groups.critic.clip_norm = 1e-12
    points.config.lock()
    with jax.set_mesh(points.mesh):
        state = jax.tree.map(np.asarray, points.start_state()["params"])
        after, metrics = points.train_step(points.start_state(), points.put(points.pipeline.batch(0)))
    moved = {name: float(np.abs(np.asarray(after["params"][name]["kernel"]) - state[name]["kernel"]).max()) for name in state}
    assert metrics["gradient_norm"] > 1e-3
    assert moved["critic"] < 1e-9 < 1e-3 < moved["centre"]


def test_records_of_points_go_through_the_whole_house(points, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build", lambda config: points)
    assert train.run(points.config, tmp_path / "run") == 0
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"]
    assert set(rows) == {"pretrained", "untrained", "raw input"}
    assert rows["raw input"]["knn_top1_k10"] == 1.0
    assert sorted(path.name for path in (tmp_path / "run" / "panels").glob("*.png")) == ["00000000_embedding.png", "00000006_embedding.png"]


def test_begin_sees_all_records_and_order_is_the_systems_own(points):
    with jax.set_mesh(points.mesh):
        state = points.start_state()
        np.testing.assert_allclose(state["state"]["mean"], 5.0, rtol=1e-6)
        ordered = points.ordered_by(state["params"], state["state"])
        assert ordered.pipeline.batch(0)["index"].tolist() == [5, 4, 3, 2, 1, 0, 23, 22]


def test_training_reads_random_parts_and_evaluation_the_records(points):
    batch = points.pipeline.batch(0)
    assert np.ptp(batch["points"]) > 1
    np.testing.assert_array_equal(points.pipeline.batch(0)["points"], batch["points"])
    first = next(points.evaluation_batches("val"))
    np.testing.assert_array_equal(first["points"][:2, 0, 0], [4.5, 5.5])


def test_a_limited_and_a_cached_source_give_random_parts_too():
    for source in (LimitedSource(Points(), 6), LimitedSource(CachedSource(Points(), 1e6), 6)):
        part = sample_record(source, 1, np.random.default_rng(0))
        np.testing.assert_array_equal(part["points"], Points().sample(4, np.random.default_rng(0))["points"])
        assert part["points"].std() > 0.5
    plain = CachedSource(CountedSource(), 1e6)
    assert sample_record(LimitedSource(plain, 10), 3, np.random.default_rng(0))["label"] == 6
    assert list(plain.kept) == [6], "what has no parts is kept"


def test_a_group_of_parameters_has_its_own_optimizer(points):
    with jax.set_mesh(points.mesh):
        state = points.start_state()
        state, metrics = points.train_step(state, points.put(points.pipeline.batch(0)))
    # Plain gradient descent on sum(x^2) at rate 3.2 * 8 / 256 = 0.1; Adam's first step is the rate itself.
    np.testing.assert_allclose(state["params"]["critic"]["kernel"], 0.8, rtol=1e-6)
    np.testing.assert_allclose(state["params"]["centre"]["kernel"], 0.1, rtol=1e-3)
    assert float(metrics["learning_rate"]) == pytest.approx(0.1)


def test_an_unknown_key_of_an_optimizer_group_is_named(points):
    group = points.config.optimizer
    with group.unlocked():
        group.groups = {"critic": {"weight": 3}}
    with pytest.raises(UserError, match="optimizer.groups.critic.weight: no key"):
        group_of(group, "critic")


def test_absent_data_is_assumed_by_its_fields(points):
    source, _ = assumed_sources(points.config)
    assert source.spec.fields == {"points": Field((4, 3), "float32")}
    with pytest.raises(UserError, match="'float32.4,' is no field"):
        Field.parse("float32[4,")
    with pytest.raises(UserError, match="'float3"):
        Field.parse("float33[4]")
    assert Field.parse("int32[]") == Field((), "int32")


def test_a_single_record_lies_on_every_device(points):
    mesh = make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    config = points.config.copy_and_resolve_references()
    config.train.batch_size = config.evaluate.batch_size = 1
    alone = build(config, (Points(), Points()), mesh)
    with jax.set_mesh(mesh):
        placed = alone.put(alone.pipeline.batch(0))
        assert placed["points"].sharding.is_fully_replicated
        _, metrics = alone.train_step(alone.start_state(), placed)
        assert np.isfinite(metrics["loss"])


def test_a_spec_with_fields_comes_back_from_json():
    spec = Points().spec
    assert DataSpec.from_json(spec.to_json()) == spec
