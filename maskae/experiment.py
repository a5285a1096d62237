"""From a config to the pieces of a run: devices, data, system, optimizer. The last place that sees the config besides the loop."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from maskae import mesh as mesh_module
from maskae import start
from maskae.config import build_from
from maskae.data import device
from maskae.data.pipeline import Batch, Order, Pipeline, evaluation_batches
from maskae.data.sources import LimitedSource, Source
from maskae.data.spec import VIDEO, DataSpec, Field
from maskae.data.transforms import Transform, make_transform
from maskae.durations import duration_steps, whole_steps
from maskae.errors import UserError, check_arguments
from maskae.evaluate.features import to_host
from maskae.merging import group_of
from maskae.optim import Optimizer, clipped, make_optimizer, partition
from maskae.run_sources import AbsentSource, open_sources
from maskae.schedules import cosine_between, make_schedule, scaled_learning_rate
from maskae.stages import StageData
from maskae.step import TrainState, init_train_state, make_train_step, train_state_of
from maskae.systems import SYSTEMS
from maskae.systems.contract import System, Variables

logger = logging.getLogger(__name__)
NAMED_FIELDS = 8  # of the data, in the message about one that it lacks


@dataclass(frozen=True)
class Experiment:
    """The pieces of one run, each built from its part of the config."""

    config: ConfigDict
    mesh: Mesh
    system: System
    train_source: Source
    val_source: Source
    order: Order | None = None

    @property
    def spec(self) -> DataSpec:
        """What the data is."""
        return self.train_source.spec

    @property
    def root_key(self) -> jax.Array:
        """The run's one key. Not cached: the first use may be inside a trace."""
        return jax.random.key(self.config.seed)

    @cached_property
    def total_steps(self) -> int:
        """The length of the run."""
        steps = whole_steps(self._steps(self.config.train, "total", None))
        if steps < 1:
            raise UserError("train.total: the run has no step")
        return steps

    def _steps(self, group: ConfigDict, name: str, total: float | None) -> float:
        return duration_steps(
            group, name, batch_size=self.config.train.batch_size, examples_per_epoch=len(self.train_source), total_steps=total
        )

    def every(self, group: ConfigDict, name: str = "every") -> int:
        """A repeated duration in whole steps, at least 1; 0 stays 0 and means never."""
        steps = self._steps(group, name, self.total_steps)
        return max(1, round(steps)) if steps > 0 else 0

    @cached_property
    def optimizer(self) -> Optimizer:
        """The update rule with its schedule; one for each of `optimizer.groups` and for the parameters that none of them names.

        With groups each clips its gradients by their own norm, as two optimizers in a paper's code do; without, the step clips.
        """
        group = self.config.optimizer
        main = self._optimizer(group, "optimizer")
        if not group.groups:
            return main
        named = {pattern: group_of(group, pattern) for pattern in group.groups}
        parts = [(name, clipped(self._optimizer(own, f"optimizer.groups.{name}"), own.clip_norm)) for name, own in named.items()]
        return dataclasses.replace(partition([*parts, ("", clipped(main, group.clip_norm))]), schedule=main.schedule)

    def _optimizer(self, group: ConfigDict, key: str) -> Optimizer:
        lengths = {"total_steps": self._steps(self.config.train, "total", None), **group.schedule_arguments.to_dict()}
        given: dict[str, Any] = {
            "peak": scaled_learning_rate(group.base_learning_rate, self.config.train.batch_size),
            "warmup_steps": self._steps(group, "warmup", self.total_steps),
            "minimum": group.minimum,
        }
        check_arguments(f"{key}.schedule_arguments", lengths, make_schedule, {"name", *given})
        try:
            schedule = make_schedule(group.schedule, **given, **lengths)
        except TypeError as error:
            raise UserError(f"{key}.schedule_arguments: {error}") from error
        arguments = group.arguments.to_dict()
        if (end := arguments.pop("weight_decay_end", None)) is not None:
            arguments["weight_decay"] = cosine_between(arguments.get("weight_decay", 0.0), end, self.total_steps)
        given = {"schedule": schedule, "no_decay": tuple(group.no_decay)}
        given["layer_decay"] = group.layer_decay if group.layer_decay != 1.0 else None
        if given["layer_decay"] is not None and hasattr(self.system, "layer_scales"):
            arguments["lr_scales"] = (*arguments.get("lr_scales", ()), *self.system.layer_scales(given.pop("layer_decay")))
        check_arguments(f"{key}.arguments", arguments, make_optimizer, {"name", *given})
        try:
            return make_optimizer(group.name, **given, **arguments)
        except TypeError as error:
            raise UserError(f"{key}.arguments: {error}") from error

    @cached_property
    def pipeline(self) -> Pipeline:
        """Training batches of this process: its block of the rows of every global batch."""
        data = self.config.data
        block, blocks = self._share(self.config.train.batch_size)
        return Pipeline(
            self.train_source,
            self.transform(data.train_transform),
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
            process_index=block,
            process_count=blocks,
            threads=data.threads,
            workers=data.workers,
            max_bad_percent=data.max_bad_percent,
            views=data.views,
            order=self.order,
        )

    def _share(self, batch_size: int) -> tuple[int, int]:
        """(index, count): which block of every batch's rows this process makes; a batch of one row is made by all."""
        return mesh_module.data_shard(self.mesh) if batch_size > 1 else (0, 1)

    def ordered_by(self, params: Any, state: Any) -> Experiment:
        """This experiment with the data order of a system that has one of its own, which may depend on its variables."""
        order = getattr(self.system, "order", None)
        if order is None:
            return self
        host = jax.tree.map(to_host, (params, state))
        made = order(Variables(*host), batch_size=self.config.train.batch_size, seed=self.config.seed)
        return dataclasses.replace(self, order=made)

    def transform(self, steps: Any) -> Transform:
        """The host transform of a config's (name, arguments) pairs; a step that takes a size gets the config's image size.

        Of clips it gets the source's own.
        """
        clip = self.spec.fields.get(VIDEO)
        return make_transform(steps, self.config.data.channels, clip.shape[1] if clip else self.config.data.image_size)

    def evaluation_batches(self, split: str) -> Iterator[Batch]:
        """Every record of `train` or `val` once, without augmentation."""
        group = self.config.evaluate
        source = {"train": self.train_source, "val": self.val_source}[split]
        if group.max_examples:
            source = LimitedSource(source, group.max_examples)
        return self.batches_of(source)

    def batches_of(self, source: Source) -> Iterator[Batch]:
        """This process's rows of every record of a source once, in order, without augmentation."""
        group = self.config.evaluate
        block, blocks = self._share(group.batch_size)
        return evaluation_batches(
            source,
            self.transform(self.config.data.val_transform),
            group.batch_size,
            process_index=block,
            process_count=blocks,
        )

    def put(self, batch: Batch) -> dict[str, jax.Array]:
        """A host batch on the devices."""
        return mesh_module.put_batch(batch, self.mesh)

    def prepare(self, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        """The device transform of a training batch's images: flip, normalise, erase, mix; the mix is one draw for the whole batch."""
        data = self.config.data
        if "image" not in batch:
            return batch
        example = batch["example"]
        flip_key, mix_key, erase_key = jax.random.split(key, 3)
        images = device.flip(batch["image"], example, flip_key) if data.flip else batch["image"]
        batch = {**batch, "image": device.normalize(images, self.spec)}
        if data.erasing:
            batch["image"] = device.random_erasing(batch["image"], example, erase_key, probability=data.erasing)
        if data.mixup_alpha or data.cutmix_alpha:
            batch["image"], batch["soft_label"] = device.mixup_cutmix(
                batch["image"],
                batch["label"],
                mix_key,
                mixup_alpha=data.mixup_alpha,
                cutmix_alpha=data.cutmix_alpha,
                smoothing=data.label_smoothing,
                num_classes=self.num_classes,
            )
        return batch

    def prepare_evaluation(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The device transform of an evaluation batch: normalise its images."""
        return batch if "image" not in batch else {**batch, "image": device.normalize(batch["image"], self.spec)}

    @property
    def num_classes(self) -> int:
        """Classes of the data. Raises UserError where there are no labels."""
        if self.spec.num_classes is None:
            raise UserError(f"data.source={self.config.data.source} has no labels, which this config needs")
        return self.spec.num_classes

    @property
    def keeps_ema(self) -> bool:
        """Whether an averaged copy of the parameters is kept, and evaluated."""
        return bool(self.config.train.ema_decay)

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of one raw global batch, without reading data."""
        data, size = self.config.data, self.config.train.batch_size
        shapes = {name: jax.ShapeDtypeStruct((size, *field.shape), field.dtype) for name, field in self.spec.fields.items()}
        if self.spec.has_images:
            shapes["image"] = jax.ShapeDtypeStruct((size, data.image_size, data.image_size, data.channels), jnp.uint8)
        shapes |= {name: jax.ShapeDtypeStruct((size,), jnp.int32) for name in ("label", "index", "example")}
        sharding = mesh_module.batch_sharding(self.mesh, size)
        return {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for name, s in shapes.items()}

    def initial_state(self, batch: dict[str, jax.Array]) -> TrainState:
        """The train state at step 0, from a raw batch (jit it, or take its shapes)."""
        prepared = self.prepare(batch, self.root_key)
        return init_train_state(self.system, self.optimizer, self.root_key, prepared, ema=self.keeps_ema)

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the train state. Raises UserError where the system reads a field that the data lacks."""
        with self._absent_fields_named():
            shapes = jax.eval_shape(self.initial_state, self.batch_shapes())
        shardings = mesh_module.tree_shardings(shapes, self.mesh)
        return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings)

    @cached_property
    def train_step(self) -> jax.stages.Wrapped:
        """The jitted step, (train state, batch) -> (train state, metrics); the state that is passed in is given up."""
        train = self.config.train
        if train.accumulate > 1 and getattr(self.system, "couples_examples", False):
            raise UserError(
                f"train.accumulate={train.accumulate}: the loss of {self.config.system} depends on the whole batch at once, "
                "so microbatches would change it; set it to 1"
            )
        step = make_train_step(
            self.system,
            self.optimizer,
            self.prepare,
            self.root_key,
            accumulate=train.accumulate,
            clip_norm=0.0 if self.config.optimizer.groups else self.config.optimizer.clip_norm,
            ema_decay=train.ema_decay,
        )
        state = jax.tree.map(lambda s: s.sharding, self.abstract_state)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(step, out_shardings=(state, replicated), donate_argnums=0)

    @property
    def forward_flops(self) -> float:
        """Matrix-product FLOPs of one forward pass per example, by formula. Raises UserError as `abstract_state` does."""
        with self._absent_fields_named():
            return self.system.forward_flops(self._prepared_shapes())

    @property
    def train_flops(self) -> float:
        """The same of one training step: three times the forward pass, or what a system with a frozen part says."""
        own = getattr(self.system, "train_flops", None)
        return own(self._prepared_shapes()) if own is not None else 3 * self.forward_flops

    @contextmanager
    def _absent_fields_named(self) -> Iterator[None]:
        """Says what the data has, where a system asks a batch for something else."""
        try:
            yield
        except KeyError as error:
            held = sorted(self.batch_shapes())
            if error.args[0] in held:
                raise
            names = ", ".join(held[:NAMED_FIELDS]) + (", ..." if len(held) > NAMED_FIELDS else "")
            absent = isinstance(self.train_source, AbsentSource)
            data = "data.fields (the data is absent)" if absent else f"data.source={self.config.data.source}"
            raise UserError(f"{self.config.system} reads {error.args[0]!r}, but {data} has {names}") from error

    def _prepared_shapes(self) -> Any:
        """What a system's formulas read: the shapes of a batch after the device transform."""
        shapes = self.batch_shapes()
        if "image" in shapes:
            shapes["image"] = jax.ShapeDtypeStruct(shapes["image"].shape, jnp.float32)
        return shapes

    def fresh_state(self) -> TrainState:
        """The initialised train state, each array where it belongs."""
        shardings = jax.tree.map(lambda s: s.sharding, self.abstract_state)
        zeros = {name: jnp.zeros(s.shape, s.dtype, device=s.sharding) for name, s in self.batch_shapes().items()}
        return jax.jit(self.initial_state, out_shardings=shardings)(zeros)

    def start_state(self, stage: StageData | None = None) -> TrainState:
        """The train state at step 0: fresh, or with the variables of `init_from`; then what the system's `begin` makes of them.

        `stage` is what `begin` may read; without it only the records of this experiment.
        """
        state = self.fresh_state()
        begins = hasattr(self.system, "begin")
        if not self.config.init_from:
            if hasattr(self.system, "with_encoder") or hasattr(self.system, "with_pretrained"):
                logger.warning("init_from is empty: %s starts from an untrained encoder", self.config.system)
            if not begins:
                return state
        started = Variables(state["params"], state["state"])
        if self.config.init_from:
            started = start.start_from(self.system, started, Path(self.config.init_from))
        if begins:
            started = start.begin(self.system, started, stage or StageData(self))
        shardings = jax.tree.map(lambda s: s.sharding, self.abstract_state)
        make = jax.jit(lambda v: train_state_of(v.params, v.state, self.optimizer, ema=self.keeps_ema), out_shardings=shardings)
        return make(started)

    def load_for_evaluation(self, path: Path) -> tuple[TrainState, int]:
        """The variables of a run's newest whole checkpoint, or of a weights file, with their step."""
        state = self.fresh_state()
        pretrained = start.read(path, self.system, state["params"])
        state["params"] = start.fill(state["params"], pretrained.params, path)
        state["ema"] = {}
        if pretrained.state:
            state["state"] = start.fill(state["state"], pretrained.state, path)
        return state, pretrained.step


def build(config: ConfigDict, sources: tuple[Source, Source] | None = None, mesh: Mesh | None = None) -> Experiment:
    """Checks the config against data and devices and builds the pieces. Raises UserError.

    `sources` are opened and `mesh` is made of this run's devices where they are not given.
    """
    if mesh is None:
        mesh = mesh_module.make_mesh(config.mesh.to_dict())
    mesh_module.check_batch(config.train.batch_size, config.train.accumulate, mesh)
    mesh_module.check_batch(config.evaluate.batch_size, 1, mesh, "evaluate.batch_size")
    if config.model.get("channels", 1) < 1:
        raise UserError(f"model.channels={config.model.channels}: {config.system} reads pictures, which have at least 1 (data.channels)")
    if config.model.get("dtype") == "float64" and jnp.result_type(float) != "float64":
        raise UserError("model.dtype=float64 is for comparisons with recorded references, under jax.enable_x64; take float32")
    system = build_from(SYSTEMS, config.system, config.model.to_dict(), "system")
    train_source, val_source = sources or open_sources(config)
    spec = train_source.spec
    if spec.channels != config.data.channels:
        raise UserError(f"data.channels={config.data.channels}, but {config.data.source} has {spec.channels}")
    for name, text in config.data.fields.items():
        if (given := spec.fields.get(name)) is not None and len(given.shape) != len(Field.parse(text).shape):
            raise UserError(f"data.fields.{name}={text}, but {config.data.source} has {given}")
    for name in ("train_transform", "val_transform"):
        if config.data[name] and not (spec.has_images or VIDEO in spec.fields):
            raise UserError(f"data.{name}: {config.data.source} has neither images nor clips to transform; set it to ()")
    classes = getattr(system, "num_classes", None)
    if classes is not None and classes != spec.num_classes:
        raise UserError(f"model.num_classes={classes}, but {config.data.source} has {spec.num_classes or 'no labels'}")
    if spec.image_shape and not config.data.train_transform and spec.image_shape[:2] != (config.data.image_size,) * 2:
        height, width = spec.image_shape[:2]
        raise UserError(f"data.image_size={config.data.image_size}, but {config.data.source} has {height} x {width} pixels untransformed")
    return Experiment(config, mesh, system, train_source, val_source)


def parameter_count(tree: Any) -> int:
    """Numbers in all arrays of a tree."""
    return int(sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(tree)))


def data_metadata(spec: DataSpec) -> dict[str, Any]:
    """The data spec as plain JSON values, for a checkpoint's metadata."""
    return dataclasses.asdict(spec)
