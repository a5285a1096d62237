"""The loop, readable top to bottom: build, restore, step, log, save, evaluate.

At step s (s steps taken) everything that belongs to s happens before step s + 1 is taken: first the checkpoint, then the evaluation. So a
resumed run does at s what the first one would have done.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from maskae import config as config_module
from maskae.checkpoint import Checkpointer
from maskae.data.pipeline import Batch
from maskae.errors import UserError, nearest
from maskae.evaluate import to_host
from maskae.evaluation import Evaluation
from maskae.experiment import Experiment, build, data_metadata
from maskae.merging import stage_config
from maskae.mesh import data_shard
from maskae.monitor import (
    Clock,
    LateMetrics,
    MultiWriter,
    Profiler,
    Progress,
    Watchdog,
    describe_run,
    format_seconds,
    machine_columns,
    mfu,
    mfu_text,
    open_writers,
)
from maskae.monitor.tables import write_atomically
from maskae.processes import barrier, check_shared_folder, gather
from maskae.report import write_report
from maskae.run_sources import open_or_assume
from maskae.stages import Finished, StageData
from maskae.step import TrainState
from maskae.stop import Stop
from maskae.summary import describe_experiment, dry_run_lines

logger = logging.getLogger(__name__)

LAST_VALUES = frozenset({"learning_rate", "skipped_steps", "nonfinite_in_a_row"})
INTERRUPTED = 130
COMPILE_SECONDS = 3600.0


def run(config: ConfigDict, workdir: Path) -> int:
    """Trains from where `workdir` stands to the end, and returns the exit status: 0, or 130 after Ctrl-C.

    A config with stages runs them one after the other, each in a folder of its own inside `workdir`.
    Raises UserError for anything in the config, the data or the folder that keeps the run from going on.
    """
    if not config.stages:
        return run_stage(config, workdir, {})[0]
    finished: dict[str, tuple[ConfigDict, Path]] = {}
    for name, folder in stage_folders(config, workdir).items():
        own = started_from(stage_config(config, name), finished)
        logger.info("stage %d of %d: %s", len(finished) + 1, len(config.stages), name)
        status, ended = run_stage(own, folder, finished)
        if not ended:
            return status
        finished[name] = own, folder
    return 0


def stage_folders(config: ConfigDict, workdir: Path) -> dict[str, Path]:
    """Each stage's run folder, in their order: `<workdir>/1_autoencoder`, ..."""
    return {name: workdir / f"{number}_{name}" for number, name in enumerate(config.stages, start=1)}


def started_from(config: ConfigDict, finished: Finished) -> ConfigDict:
    """The config of a stage with `init_from=stage:NAME` replaced by that stage's folder. Raises UserError where it is not before."""
    kind, _, name = config.init_from.partition(":")
    if kind == "stage":
        if name not in finished:
            raise UserError(f"init_from={config.init_from}: no such stage before this one{nearest(name, finished)}")
        config.init_from = str(finished[name][1])
    return config


def run_stage(config: ConfigDict, workdir: Path, finished: Finished) -> tuple[int, bool]:
    """One run in one folder: its exit status, and whether it came to its end. `finished` are the stages before it."""
    experiment = build(config)
    open_workdir(workdir)
    with jax.set_mesh(experiment.mesh), Checkpointer(
        str(workdir / "checkpoints"),
        keep_last=config.checkpoint.keep_last,
        keep_every_steps=config.checkpoint.keep_every_steps or None,
    ) as checkpointer:
        state, metadata = restore_or_start(experiment, checkpointer, workdir, finished)
        experiment = experiment.ordered_by(state["params"], state["state"])
        record_config(config, workdir, int(state["step"]))
        stop = Stop()
        with stop.listening():
            loop = Loop(experiment, workdir, checkpointer, stop)
            loop.run(state, metadata)
    if config.evaluate.finetune and stop.signal is None:
        loop.evaluation.finetune(workdir, run)
    conclude(loop, stop)
    barrier("end of the run")
    if stop.signal is not None:
        logger.info("stopped by %s; the same command resumes", stop.signal.name)
        return (INTERRUPTED if stop.signal == signal.SIGINT else 0), False
    return 0, True


def conclude(loop: Loop, stop: Stop) -> None:
    """Prints the results and writes the report."""
    if jax.process_index() != 0:
        return
    write_report(loop.workdir)
    logger.info("%s", speed_line(loop))
    if stop.signal is None:
        for line in loop.evaluation.table():
            logger.info("%s", line)
    logger.info("report: %s", loop.workdir / "report.html")


def speed_line(loop: Loop) -> str:
    """How fast the run went, over all of its processes and resumes."""
    totals = loop.clock.totals()
    rate = totals["examples_seen"] / max(totals["train_seconds"], 1e-9)
    utilisation = mfu_text(mfu(loop.experiment.train_flops / 3, rate, jax.devices()))
    waiting = 100 * totals["data_wait_seconds"] / max(totals["train_seconds"], 1e-9)
    return (
        f"trained {format_seconds(totals['train_seconds'])}: {rate:,.0f} examples/s, MFU {utilisation}, {waiting:.1f} % of it waiting for"
        f" data, {totals['device_hours']:.3g} device-hours"
    )


def open_workdir(workdir: Path) -> None:
    """Makes the run's folder. Raises UserError where that cannot be, or where not all processes see it."""
    if re.match(r"\w+:/", str(workdir)):
        raise UserError(f"--workdir={workdir}: a run's logs need a folder; mount the bucket and give the folder")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: {error.strerror}") from error
    check_shared_folder(workdir)


def restore_or_start(
    experiment: Experiment, checkpointer: Checkpointer, workdir: Path, finished: Finished
) -> tuple[TrainState, dict[str, Any] | None]:
    """The newest whole checkpoint with its metadata, or a fresh train state and None; says which in one line."""
    resume = experiment.config.checkpoint.resume
    step = checkpointer.latest_step()
    if step is None:
        if resume == "must":
            raise UserError(f"checkpoint.resume=must, but {workdir} holds no whole checkpoint")
        if checkpointer.steps():
            raise UserError(f"every checkpoint in {workdir} is damaged (see above); move the folder away to start afresh")
        refuse_foreign_run(experiment.config, workdir)
        logger.info("fresh start in %s", workdir)
        return experiment.start_state(StageData(experiment, finished)), None
    if resume == "never":
        raise UserError(f"checkpoint.resume=never, but {workdir} holds a checkpoint of step {step}; choose another --workdir")
    metadata = checkpointer.metadata(step)
    for line in config_module.differences(metadata["config"], json.loads(config_module.to_json(experiment.config))):
        logger.info("config differs from the checkpoint's: %s", line)
    state = checkpointer.restore(step, experiment.abstract_state)
    logger.info("resumed at step %d of %d in %s", step, experiment.total_steps, workdir)
    return state, metadata


def refuse_foreign_run(config: ConfigDict, workdir: Path) -> None:
    """Raises UserError where the folder holds metrics of a run with another config and no checkpoint to go on from."""
    path = workdir / "config.json"
    if not path.exists() or not (workdir / "metrics.jsonl").exists() or not (workdir / "metrics.jsonl").stat().st_size:
        return
    changed = config_module.differences(json.loads(path.read_text()), json.loads(config_module.to_json(config)))
    if changed:
        raise UserError(f"--workdir={workdir} holds the logs of another run without a checkpoint ({changed[0]}); choose another folder")


def record_config(config: ConfigDict, workdir: Path, step: int) -> None:
    """Writes the resolved config; an earlier different one stays beside it under the step up to which it was used."""
    path, text = workdir / "config.json", config_module.to_json(config)
    if jax.process_index() != 0:
        return
    if path.exists() and path.read_text() != text:
        path.replace(workdir / f"config_before_step_{step}.json")
    write_atomically(path, text)


class Loop:
    """One run from one state on."""

    def __init__(self, experiment: Experiment, workdir: Path, checkpointer: Checkpointer, stop: Stop):
        self.experiment, self.workdir, self.checkpointer, self.stop = experiment, workdir, checkpointer, stop
        config = experiment.config
        self.total = experiment.total_steps
        self.save_every = experiment.every(config.checkpoint)
        self.evaluate_every = experiment.every(config.evaluate)
        self.evaluation = Evaluation(experiment, workdir)
        # Once: it asks git and the package index, and every save carries it.
        self.description = describe_run()

    def run(self, state: TrainState, metadata: dict[str, Any] | None) -> TrainState:
        """Takes the steps that are left, and returns the last state."""
        start = int(state["step"])
        with ExitStack() as stack:
            self.open_monitors(stack, start, metadata)
            if jax.process_index() == 0:
                write_atomically(self.workdir / "summary.json", json.dumps(self.summary(), indent=1))
            if metadata is None:
                with self.stop.breaking():
                    row = self.evaluation.start(state, self.writer)
                    if row:
                        self.writer.scalars(0, row)
            self.clock.start(start)
            batches = stack.enter_context(self.experiment.pipeline.iterate(start))
            step = start
            while True:
                self.stop.agree()
                if self.at_step(state, step, metadata if step == start else None):
                    break
                with self.profiler.step(step + 1):
                    batch = self.next_batch(batches, state, step)
                    state, metrics = self.take_step(state, batch, compiling=step == start)
                step += 1
                self.after_step(state, step, metrics)
            self.progress.close()
            totals = self.clock.totals() | {"bad_records": self.bad_records()}
            if jax.process_index() == 0:
                write_atomically(self.workdir / "totals.json", json.dumps(totals, indent=1))
        return state

    def summary(self) -> dict[str, Any]:
        """What this run is, for the report."""
        return describe_experiment(self.experiment) | self.description | {"arguments": sys.argv[1:]}

    def next_batch(self, batches: Iterator[Batch], state: TrainState, step: int) -> Batch:
        """The batch of step `step` + 1. Where the data ends the run (too many broken records), what was learned is saved first.

        Not with several processes: a save needs all of them, and only this one knows.
        """
        try:
            with self.clock.waiting_for_data():
                return next(batches)
        except UserError:
            if jax.process_count() > 1:
                raise
            self.checkpointer.save(step, state, self.metadata(evaluated=True))
            raise

    def take_step(self, state: TrainState, batch: Batch, compiling: bool) -> tuple[TrainState, dict[str, jax.Array]]:
        """Dispatches one step. The first one of a process compiles, which is not training time."""
        if not compiling:
            return self.experiment.train_step(state, self.experiment.put(batch))
        with self.clock.pause("compile"):
            placed = self.experiment.put(batch)
            if jax.process_count() > 1:
                # Collectives wait only seconds for a peer that still compiles (gloo 30 s), and process 0 alone fills the compilation cache.
                self.experiment.train_step.lower(state, placed).compile()
                barrier("first step compiled", COMPILE_SECONDS)
            return jax.block_until_ready(self.experiment.train_step(state, placed))

    def open_monitors(self, stack: ExitStack, start: int, metadata: dict[str, Any] | None) -> None:
        """Everything that watches: writers, clock, progress bar, watchdog, profiler."""
        config, workdir = self.experiment.config, self.workdir
        self.writer = MultiWriter([])
        if jax.process_index() == 0:
            self.writer = open_writers(
                workdir,
                resume_step=start if metadata is not None else None,
                tensorboard=config.log.tensorboard,
                wandb_project=config.log.wandb_project,
                settings=config.to_dict(),
            )
        stack.callback(self.writer.close)
        self.watchdog = Watchdog(workdir, factor=config.log.watchdog_factor) if config.log.watchdog_factor else None
        if self.watchdog is not None:
            stack.callback(self.watchdog.close)
        pause = self.watchdog.pause if self.watchdog is not None else nullcontext
        self.clock = Clock(devices=jax.device_count(), total_steps=self.total, also_pause=pause)
        self.late = LateMetrics(self.write_row, every_steps=config.log.every_steps, last=LAST_VALUES)
        if metadata is not None:
            self.clock.load_state_dict(metadata["clock"])
            self.late.load_state_dict(metadata["interval"])
        shown = None if jax.process_index() == 0 else stack.enter_context(open(os.devnull, "w"))  # noqa: SIM115
        self.progress = Progress(self.total, initial_step=start, stream=shown)
        first = config.log.profile_first_step
        self.profiler = Profiler(workdir, first_step=first, last_step=first + config.log.profile_steps - 1 if first else 0)
        stack.callback(self.profiler.close)

    def at_step(self, state: TrainState, step: int, metadata: dict[str, Any] | None) -> bool:
        """Evaluate, then save, where either is due at `step`; returns whether the run ends here.

        `metadata` is that of the checkpoint which `state` was restored from. Rows of the metric files that belong to a step are on disk
        before its checkpoint is: a resume keeps them, and only drops later ones. A run stopped before its first step leaves no checkpoint.
        """
        done, stopping = step >= self.total, self.stop.signal is not None
        wants_evaluation = done or self.due(step, self.evaluate_every)
        if metadata is not None and (metadata["evaluated"] or not wants_evaluation):
            return done or stopping
        if done:
            self.flush()
        row: dict[str, float] | None = None
        if wants_evaluation and not stopping:
            with self.clock.pause("evaluate", wait_for=state["step"]), self.stop.breaking():
                row = self.evaluation.run(state, step, self.writer)
        if row is not None:
            self.writer.scalars(step, row)
        stopping = self.stop.signal is not None
        if metadata is None and step > 0 and (done or stopping or self.due(step, self.save_every)):
            with self.clock.pause("save", wait_for=state["step"]):
                self.checkpointer.save(step, state, self.metadata(evaluated=row is not None or not wants_evaluation))
        return done or stopping

    @staticmethod
    def due(step: int, every: int) -> bool:
        """Whether `step` is a multiple of `every`; 0 is never."""
        return every > 0 and step > 0 and step % every == 0

    def after_step(self, state: TrainState, step: int, metrics: dict[str, jax.Array]) -> None:
        """Reads the metrics of the step before, and stops the run where too many steps in a row were not finite."""
        examples = self.experiment.config.train.batch_size
        read = self.late.add(step, metrics)
        self.profiler.after_step(step, wait_for=state["step"])
        self.clock.tick(step, examples)
        if self.watchdog is not None:
            self.watchdog.beat()
        if read is not None:
            self.check_finite(*read)
            self.progress.update(
                step, loss=read[1]["loss"], examples_per_second=self.clock.examples_per_second(), eta_seconds=self.clock.eta_seconds()
            )

    def check_finite(self, step: int, values: dict[str, float]) -> None:
        """Raises UserError after too many non-finite steps in a row, and leaves the batch's record numbers in `nonfinite.json`."""
        in_a_row = int(values["nonfinite_in_a_row"])
        if in_a_row == 0:
            return
        own = self.experiment.put({"index": self.experiment.pipeline.batch(step - 1)["index"]})
        index = to_host(own["index"])
        names = [self.experiment.train_source.name(int(i)) for i in index]
        record = {"step": step, "in_a_row": in_a_row, "loss": str(values["loss"]), "index": np.asarray(index).tolist(), "records": names}
        if jax.process_index() == 0:
            write_atomically(self.workdir / "nonfinite.json", json.dumps(record, indent=1))
        logger.warning("step %d: loss or gradients are not finite; the step is skipped (%d in a row)", step, in_a_row)
        limit = self.experiment.config.train.max_nonfinite_in_a_row
        if in_a_row >= limit:
            raise UserError(
                f"{in_a_row} steps in a row up to step {step} were not finite (train.max_nonfinite_in_a_row={limit});"
                f" the last batch's records are in {self.workdir / 'nonfinite.json'}"
            )

    def write_row(self, step: int, means: dict[str, float]) -> None:
        """One row of the metric files, with what the machine did in the interval."""
        self.writer.scalars(step, means | machine_columns(self.clock, self.experiment.train_flops / 3, jax.devices()))

    def metadata(self, evaluated: bool) -> dict[str, Any]:
        """What a checkpoint says about itself. `evaluated`: nothing that is due at its step is still to be done."""
        return {
            "config": json.loads(config_module.to_json(self.experiment.config)),
            "data": data_metadata(self.experiment.spec),
            "run": self.description,
            "interval": self.late.state_dict(),
            "clock": self.clock.state_dict(),
            "bad_records": self.bad_records(),
            "evaluated": evaluated,
        }

    def bad_records(self) -> dict[str, Any]:
        """Records that could not be read, on all hosts; those that read the same rows are counted once."""
        bad, block = self.experiment.pipeline.bad, data_shard(self.experiment.mesh)[0]
        rows = {row["block"]: row for row in gather("bad records", {"block": block, "count": bad.count, "names": bad.names})}
        names = dict.fromkeys(name for row in rows.values() for name in row["names"])
        return {"count": sum(row["count"] for row in rows.values()), "names": list(names)}

    def flush(self) -> None:
        """Reads the last step's metrics and writes the last, perhaps shorter interval."""
        last = self.late.settle()
        if last is not None:
            self.check_finite(*last)
        self.late.flush()


def evaluate_run(config: ConfigDict, target: Path) -> None:
    """Evaluates the newest whole checkpoint of a run folder (of all its stages), or a weights file, and prints the table.

    Raises UserError.
    """
    if config.stages:
        folders = {name: folder for name, folder in stage_folders(config, target).items() if folder.is_dir()}
        if not folders:
            raise UserError(f"--evaluate={target}: no folder of a stage in it ({', '.join(stage_folders(config, target))})")
        for name, folder in folders.items():
            print(f"stage {name}")
            evaluate_run(stage_config(config, name), folder)
        return
    experiment = build(config)
    with jax.set_mesh(experiment.mesh):
        state, step = experiment.load_for_evaluation(target)
        evaluation = Evaluation(experiment, target if target.is_dir() else None)
        evaluation.run(state, step, MultiWriter([]))
        if config.evaluate.finetune:
            evaluation.finetune(target, run)
    if jax.process_index() == 0:
        print("\n".join(evaluation.table()))


def dry_run(config: ConfigDict) -> None:
    """Builds everything, prints sizes and shardings, and runs one abstract step, for every stage. Raises UserError."""
    for name in config.stages:
        print(f"stage {name}")
        dry_run(stage_config(config, name))
    if config.stages:
        return
    experiment = build(config, open_or_assume(config))
    with jax.set_mesh(experiment.mesh):
        lines = dry_run_lines(experiment)
    if jax.process_index() == 0:
        print("\n".join(lines))
