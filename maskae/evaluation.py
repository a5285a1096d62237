"""What a run's variables are worth at some step: features once, every evaluator on them, baselines beside them, panels to look at."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from maskae import config as config_module
from maskae import evaluate
from maskae.data.sources import LimitedSource
from maskae.errors import UserError
from maskae.experiment import Experiment
from maskae.keys import purpose_key
from maskae.monitor import Writer, read_metrics
from maskae.monitor.tables import write_atomically
from maskae.panels import TITLES, panel_sheet
from maskae.plots import draw_embedding
from maskae.run_folder import read_json
from maskae.step import TrainState

logger = logging.getLogger(__name__)

PRETRAINED, TRAINED, UNTRAINED, RAW, RAW_INPUT = "pretrained", "trained", "untrained", "raw pixels", "raw input"
Results = dict[str, dict[str, float]]


class Evaluation:
    """The evaluators of one config. Results lie in `<workdir>/evaluation.json`: a row per kind of feature, each {metric: value}."""

    def __init__(self, experiment: Experiment, workdir: Path | None):
        """`workdir` None keeps nothing on disk. Raises UserError for an unknown evaluator or argument, or data that cannot serve."""
        self.experiment, self.workdir = experiment, workdir
        self.evaluators = evaluate.make_evaluators(experiment.config.evaluate.evaluators.to_dict())
        for name, evaluator in self.evaluators.items():
            if absent := [field for field in getattr(evaluator, "fields", ()) if field not in experiment.spec.fields]:
                words = f"evaluate.evaluators.{name}: {evaluator} reads the field '{absent[0]}'"
                raise UserError(f"{words}, which {experiment.spec.name} lacks")
        self.features = jax.jit(self._features)
        self.panels = jax.jit(self._panels)
        self.step, self.rows = read_results(workdir)
        # What a classifier shows is what its labels taught it.
        self.own_row = TRAINED if hasattr(experiment.system, "num_classes") else PRETRAINED

    def _features(self, variables: tuple[Any, Any], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return self.experiment.system.features(*variables, self.experiment.prepare_evaluation(batch))

    def _panels(self, variables: tuple[Any, Any], batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        reconstruct = self.experiment.system.reconstruct  # type: ignore[attr-defined]
        return reconstruct(*variables, self.experiment.prepare_evaluation(batch), key)

    def batches(self, split: str) -> Iterator[dict[str, jax.Array]]:
        """Every record of a split once, on the devices."""
        return (self.experiment.put(batch) for batch in self.experiment.evaluation_batches(split))

    def extract(self, variables: tuple[Any, Any], split: str, keys: tuple[str, ...]) -> evaluate.Features:
        """The features of one split."""
        return evaluate.extract(lambda batch: self.features(variables, batch), self.batches(split), keys)

    def start(self, state: TrainState, writer: Writer) -> dict[str, float]:
        """Before the first step: the baselines, which also shows that evaluation works before hours of training depend on it."""
        self.step, self.rows = 0, {}
        config = self.experiment.config
        if config.evaluate.baselines:
            raw = self.raw_input()
            if raw:
                self.rows[RAW if self.experiment.spec.has_images else RAW_INPUT] = raw
            self.rows["before training" if config.init_from else UNTRAINED] = self.metrics(state)
            self.draw(state, 0, writer)
            self.save()
            return self._columns(self.metrics_of_last_row())
        first = self.experiment.put(next(self.experiment.evaluation_batches("val")))
        jax.block_until_ready(self.features(variables_of(state), first))
        return {}

    def metrics_of_last_row(self) -> dict[str, float]:
        """The row written last."""
        return list(self.rows.values())[-1]

    def run(self, state: TrainState, step: int, writer: Writer) -> dict[str, float]:
        """Evaluates the state of `step`, keeps its row and panels, and returns the columns for the metric files."""
        metrics = self.metrics(state)
        metrics |= self.maxima(metrics)
        earlier = self.rows.get(self.own_row, {}) if self.step == step else {}
        self.step, self.rows[self.own_row] = step, earlier | metrics
        self.draw(state, step, writer)
        self.save()
        return self._columns(metrics)

    @staticmethod
    def _columns(metrics: dict[str, float]) -> dict[str, float]:
        return {f"evaluate/{name}": value for name, value in metrics.items()}

    def metrics(self, state: TrainState) -> dict[str, float]:
        """All evaluators on the features of these variables."""
        if not self.evaluators:
            return {}
        keys = evaluate.needed_keys(self.evaluators)
        reads_train = any(getattr(evaluator, "reads_train", True) for evaluator in self.evaluators.values())
        train = self.extract(variables_of(state), "train", keys) if reads_train else None
        val = self.extract(variables_of(state), "val", keys)
        return evaluate.run(self.evaluators, train, val, self.experiment.config.evaluate.seed)

    def maxima(self, metrics: dict[str, float]) -> dict[str, float]:
        """`<name>_maximum`: the largest value of each metric in this run's logged evaluations and now, where the config asks for it.

        Choosing a step by labels is an oracle's choice: such a number says what some step reached, not what a user would get.
        """
        if not self.experiment.config.evaluate.maxima or self.workdir is None:
            return {}
        logged = read_metrics(self.workdir / "metrics.jsonl")
        columns = {name: [row[f"evaluate/{name}"] for row in logged if f"evaluate/{name}" in row] for name in metrics}
        return {f"{name}_maximum": max([*columns[name], value]) for name, value in metrics.items()}

    def raw_input(self) -> dict[str, float]:
        """The evaluators that need one vector per example, on the input itself: its pixels, or what the system calls its raw features."""
        chosen = {name: evaluator for name, evaluator in self.evaluators.items() if evaluator.keys == ("pooled",)}
        own = getattr(self.experiment.system, "raw_features", None)
        if not chosen or (own is None and not self.experiment.spec.has_images):
            return {}
        of = evaluate.raw_pixels if own is None else lambda batches: evaluate.extract(jax.jit(own), batches, ("pooled",))
        train, val = (of(self.batches(split)) for split in ("train", "val"))
        return evaluate.run(chosen, train, val, self.experiment.config.evaluate.seed)

    def draw(self, state: TrainState, step: int, writer: Writer) -> None:
        """The pictures of the first validation records: reconstructions, and what else the system draws."""
        if self.experiment.config.evaluate.pictures == "last" and 0 < step < self.experiment.total_steps:
            return
        if self.experiment.config.evaluate.map_examples:
            writer.images(step, {"embedding": self.embedding(state, step)})
        count = self.experiment.config.evaluate.panels
        system: Any = self.experiment.system
        if not count or not (hasattr(system, "reconstruct") or hasattr(system, "draw")):
            return
        put = self.experiment.put(next(self.experiment.evaluation_batches("val")))
        key = purpose_key(self.experiment.root_key, "panels")
        if hasattr(system, "reconstruct"):
            writer.images(step, {"reconstruction": self.reconstructions(state, put, key, step)})
        if hasattr(system, "draw"):
            pictures = system.draw(*variables_of(state), self.experiment.prepare_evaluation(put), key, self.experiment.spec)
            writer.images(step, pictures)

    def embedding(self, state: TrainState, step: int) -> np.ndarray:
        """A map of the pooled features of validation records."""
        count = self.experiment.config.evaluate.map_examples
        source = LimitedSource(self.experiment.val_source, count)
        batches = (self.experiment.put(batch) for batch in self.experiment.batches_of(source))
        found = evaluate.extract(lambda batch: self.features(variables_of(state), batch), batches, ("pooled",))
        spec = self.experiment.spec
        names = spec.class_names
        return draw_embedding(found["pooled"], found["label"], title=f"pooled features, validation, step {step}", names=names)

    def reconstructions(self, state: TrainState, put: dict[str, jax.Array], key: jax.Array, step: int) -> np.ndarray:
        """One sheet, a row per image."""
        shown = min(self.experiment.config.evaluate.panels, int(evaluate.to_host(put["valid"]).sum()))
        panels = self.panels(variables_of(state), put, key)
        labels = getattr(self.experiment.system, "panel_labels", TITLES)
        order = [name for name in (*TITLES, *panels) if name in panels]
        columns = {labels.get(name, name): evaluate.to_host(panels[name])[:shown] for name in order}
        spec = self.experiment.spec
        return panel_sheet(columns, mean=spec.mean, std=spec.std, rows=shown, caption=f"{spec.name}, validation images, step {step}")

    def save(self) -> None:
        """Writes the rows; only the first process does."""
        if self.workdir is not None and jax.process_index() == 0:
            text = json.dumps({"step": self.step, "rows": self.rows}, indent=1)
            write_atomically(self.workdir / "evaluation.json", text)

    def finetune(self, pretrained: Path, run: Callable[[ConfigDict, Path], int]) -> None:
        """Fine-tunes `pretrained` by the recipe `evaluate.finetune` with the ordinary loop in `<workdir>/finetune`; keeps its accuracy."""
        own = self.experiment.config
        config = config_module.load_config(own.evaluate.finetune)
        with config.unlocked():
            config.init_from = str(pretrained)
            records = ("source", "root", "downloads", "val_percent", "split_seed", "max_examples", "statistics", "cache")
            for key in (*records, "image_size", "channels"):
                config.data[key] = own.data[key]
            for key in ("patch_size", "width", "depth", "heads"):
                config.model[key] = own.model[key]
            config.model.num_classes = self.experiment.num_classes
        folder = (self.workdir or pretrained.parent) / "finetune"
        if run(config, folder):
            return
        result = read_results(folder)[1].get(TRAINED)
        if result is None:
            raise UserError(f"{own.evaluate.finetune} has no evaluator, so {folder} gives no accuracy")
        self.rows.setdefault(self.own_row, {}).update({f"finetune_{name}": value for name, value in result.items()})
        self.save()

    def table(self) -> list[str]:
        """The results as lines of text: a row per metric, a column per kind of feature."""
        return table_lines(self.rows)


def variables_of(state: TrainState) -> tuple[Any, Any]:
    """(params, state) to evaluate: the averaged parameters where the run keeps them."""
    return state["ema"] or state["params"], state["state"]


def read_results(workdir: Path | None) -> tuple[int, Results]:
    """The step and the rows of `<workdir>/evaluation.json`; 0 and none where there is no such file."""
    stored = read_json(workdir / "evaluation.json") if workdir is not None else {}
    return stored.get("step", 0), stored.get("rows", {})


def table_lines(rows: Results) -> list[str]:
    """`rows` as a text table; a metric that a row lacks is a dash."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    if not names:
        return []
    order = [name for name in (PRETRAINED, TRAINED, *rows) if name in rows]
    columns = list(dict.fromkeys(order))
    width = max(len(name) for name in names)
    lines = [" " * width + "".join(f"  {column:>15s}" for column in columns)]
    for name in names:
        cells = (f"{rows[column][name]:.4f}" if name in rows[column] else "-" for column in columns)
        lines.append(f"{name:{width}s}" + "".join(f"  {cell:>15s}" for cell in cells))
    return lines
