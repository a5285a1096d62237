"""Measures one training step: samples/s, MFU, where the time goes, peak memory, compile time; as a table and as JSON.

    python tools/bench_step.py --config configs/mae.py:base [--config.train.batch_size=512 --config.model.attention=cudnn] \\
        [--steps 10] [--repeats 5] [--json out.json]

The compute parts run on random images that already lie on the devices. Three programs are timed in turn, `--repeats` times each: the loss
(forward), the loss with its gradients, the whole step; backward and optimizer are the differences, taken within each turn. Each timing is
`--steps` calls in a row, waited for at the end. The data part reads the config's own source where that is on this machine.
One process, all of its devices. Exit status: 0, or 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# So that it also works in a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from maskae.config import load_config, split_arguments
from maskae.errors import UserError, nearest
from maskae.experiment import Experiment, build
from maskae.host_memory import keep_host_memory
from maskae.keys import purpose_key
from maskae.monitor.device_info import describe_run, device_memory, mfu, mfu_text
from maskae.run_sources import AbsentSource, open_or_assume
from maskae.step import loss_and_gradients, split_batch

FLAGS = ("--config", "--steps", "--repeats", "--json", "--help")
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")
Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class Programs:
    """The compiled programs: `forward` and `gradient` take (state, batch), `step` gives up its state and returns the next one."""

    forward: Callable[..., Any]
    gradient: Callable[..., Any]
    step: Callable[..., Any]
    seconds: dict[str, float]
    step_memory: dict[str, float]


def random_batch(experiment: Experiment) -> Batch:
    """One raw global batch of random uint8 images [B, H, W, C] with random labels, made on the devices where a real one would lie."""
    spec = experiment.spec
    shapes = experiment.batch_shapes()

    def make(key: jax.Array) -> Batch:
        image_key, label_key = jax.random.split(key)
        size = shapes["label"].shape[0]
        image = jax.random.randint(image_key, shapes["image"].shape, 0, spec.max_value + 1, jnp.int32).astype(jnp.uint8)
        classes = spec.num_classes
        label = jax.random.randint(label_key, (size,), 0, classes) if classes else jnp.full((size,), -1, jnp.int32)
        number = jnp.arange(size, dtype=jnp.int32)
        return {"image": image, "label": label, "index": number, "example": number}

    shardings = {name: shape.sharding for name, shape in shapes.items()}
    return jax.block_until_ready(jax.jit(make, out_shardings=shardings)(jax.random.key(0)))


def compile_programs(experiment: Experiment) -> Programs:
    """Compiles the three programs ahead of time, and times that of the step."""
    accumulate = experiment.config.train.accumulate
    system, root_key = experiment.system, experiment.root_key

    def prepared(state: Any, batch: Batch) -> tuple[Batch, jax.Array]:
        key = jax.random.fold_in(root_key, state["step"])
        return experiment.prepare(batch, purpose_key(key, "augment")), purpose_key(key, "loss")

    def forward(state: Any, batch: Batch) -> jax.Array:
        batch, key = prepared(state, batch)

        def one(part: Batch) -> jax.Array:
            return system.loss(state["params"], state["state"], part, key, state["step"])[0]

        return one(batch) if accumulate == 1 else jax.lax.map(one, split_batch(batch, accumulate)).mean()

    def gradient(state: Any, batch: Batch) -> Any:
        batch, key = prepared(state, batch)
        loss, _, grads = loss_and_gradients(system, state["params"], state["state"], batch, key, state["step"], accumulate)
        return loss, grads

    state, batch = experiment.abstract_state, experiment.batch_shapes()
    gradient_shardings = (None, jax.tree.map(lambda leaf: leaf.sharding, state["params"]))
    jitted = {"forward": jax.jit(forward), "gradient": jax.jit(gradient, out_shardings=gradient_shardings), "step": experiment.train_step}
    compiled: dict[str, Any] = {}
    seconds: dict[str, dict[str, float]] = {}
    for name, program in jitted.items():
        began = time.perf_counter()
        lowered = program.lower(state, batch)
        traced = time.perf_counter()
        with uncached() if name == "step" else nullcontext():
            compiled[name] = lowered.compile()
        seconds[name] = {"trace": traced - began, "compile": time.perf_counter() - traced}
    return Programs(compiled["forward"], compiled["gradient"], compiled["step"], seconds["step"], memory_of(compiled["step"]))


@contextmanager
def uncached() -> Iterator[None]:
    """Compiles anew inside: a program from the persistent cache would make the compile time a lie."""
    config: Any = jax.config  # whose attributes are made at run time
    before = config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # which otherwise remembers its first answer to whether it is used
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def memory_of(compiled: Any) -> dict[str, float]:
    """Bytes per device that the compiler plans for the step: arguments (of which the state is given up), temporaries."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return {}
    return {"arguments_bytes": float(analysis.argument_size_in_bytes), "temporaries_bytes": float(analysis.temp_size_in_bytes)}


def time_calls(call: Callable[[], Any], count: int) -> float:
    """Seconds per call of `count` calls in a row, the last of which is waited for."""
    began = time.perf_counter()
    result = None
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / count


def measure_compute(programs: Programs, state: Any, batch: Batch, steps: int, repeats: int) -> tuple[dict[str, list[float]], Any]:
    """Seconds per call by part, one value per turn, and the last state. The programs take turns, so that drift of the machine hits all."""
    held = [state]

    def step() -> jax.Array:
        held[0], metrics = programs.step(held[0], batch)
        return metrics["loss"]

    def forward() -> Any:
        return programs.forward(held[0], batch)

    def gradient() -> Any:
        return programs.gradient(held[0], batch)

    for call in (step, forward, gradient):
        time_calls(call, 2)
    values: dict[str, list[float]] = {"step": [], "forward": [], "backward": [], "optimizer": []}
    for _ in range(repeats):
        seconds = {call.__name__: time_calls(call, steps) for call in (forward, gradient, step)}
        values["step"].append(seconds["step"])
        values["forward"].append(seconds["forward"])
        values["backward"].append(seconds["gradient"] - seconds["forward"])
        values["optimizer"].append(seconds["step"] - seconds["gradient"])
    return values, held[0]


def measure_host(experiment: Experiment, programs: Programs, state: Any, batch: Batch, count: int) -> tuple[dict[str, list[float]], Any]:
    """What the host spends per step: `dispatch` (until the call returns, of an idle device) and `transfer` (one batch to the devices).

    A backend that computes inside the call (CPU, for small programs) shows that as dispatch.
    """
    raw = {name: np.asarray(array) for name, array in batch.items()}
    values: dict[str, list[float]] = {"dispatch": [], "transfer": []}
    for _ in range(count):
        began = time.perf_counter()
        state, metrics = programs.step(state, batch)
        values["dispatch"].append(time.perf_counter() - began)
        jax.block_until_ready((state, metrics))
        began = time.perf_counter()
        jax.block_until_ready(experiment.put(raw))
        values["transfer"].append(time.perf_counter() - began)
    return values, state


def measure_data(experiment: Experiment, programs: Programs, state: Any, steps: int) -> dict[str, Any]:
    """The real pipeline: seconds per batch by itself, then under training with the share of the time spent waiting for it."""
    if isinstance(experiment.train_source, AbsentSource):
        return {"absent": f"{experiment.config.data.source} is not on this machine"}
    with experiment.pipeline.iterate(0) as batches:
        next(batches)
        began = time.perf_counter()
        for _ in range(steps):
            next(batches)
        alone = (time.perf_counter() - began) / steps
    with experiment.pipeline.iterate(0) as batches:
        state, metrics = programs.step(state, experiment.put(next(batches)))
        jax.block_until_ready(metrics)
        waited, began = 0.0, time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            before = metrics
            state, metrics = programs.step(state, experiment.put(batch))
            jax.block_until_ready(before)  # as the training loop does: one step in flight
        jax.block_until_ready(metrics)
        total = time.perf_counter() - began
    size = experiment.config.train.batch_size
    return {
        "batch_seconds": alone,
        "samples_per_second": size / alone,
        "step_seconds_with_data": total / steps,
        "samples_per_second_with_data": size * steps / total,
        "wait_share": waited / total,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def measure(experiment: Experiment, steps: int, repeats: int) -> dict[str, Any]:
    """All numbers of one config as a JSON object. Times in seconds, memory in bytes; `mfu` is a share of 1, or "unknown"."""
    with jax.set_mesh(experiment.mesh):
        programs = compile_programs(experiment)
        batch, state = random_batch(experiment), experiment.fresh_state()
        state, _ = jax.block_until_ready(programs.step(state, batch))
        # Before the other programs run, which keep the old state and the gradients beside each other.
        memory = device_memory() | programs.step_memory
        parts, state = measure_compute(programs, state, batch, steps, repeats)
        host, state = measure_host(experiment, programs, state, batch, max(3, repeats))
        data = measure_data(experiment, programs, state, steps)
    size, seconds = experiment.config.train.batch_size, statistics.median(parts["step"])
    utilisation = mfu(experiment.forward_flops, size / seconds, jax.devices())
    return {
        "batch_size": size,
        "accumulate": experiment.config.train.accumulate,
        "mesh": dict(experiment.mesh.shape),
        "forward_flops_per_example": experiment.forward_flops,
        "samples_per_second": size / seconds,
        "samples_per_second_per_device": size / seconds / jax.device_count(),
        "mfu": "unknown" if utilisation is None else utilisation,
        "seconds": {name: spread(values) for name, values in parts.items()},
        "host": {name: spread(values) for name, values in host.items()},
        "data": data,
        "memory": {name.removeprefix("machine/"): value for name, value in memory.items()},
        "compile_seconds": programs.seconds,
        "timing": {"steps": steps, "repeats": repeats},
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    run, seconds = report["run"], report["seconds"]
    whole = seconds["step"]["median"]
    commit = run["commit"] or run["maskae"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if name in ("jax", "jaxlib", "flax"))
    lines = [
        f"{report['config']} {' '.join(report['overrides'])}".rstrip(),
        f"{run['devices']} x {run['device']}, {run['platform']}, Python {run['python']}, {versions}, maskae {commit}",
        f"batch {report['batch_size']}, {report['accumulate']} microbatch(es), mesh "
        + " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items()),
        *(f"{name}={value}" for name, value in report["environment"].items()),
        "",
        f"samples/s      {report['samples_per_second']:,.1f}  ({report['samples_per_second_per_device']:,.1f} per device)",
        f"MFU            {mfu_text(None if report['mfu'] == 'unknown' else report['mfu'])}",
        "",
        f"{'part':<14s} {'median ms':>10s} {'low':>10s} {'high':>10s} {'share':>7s}",
    ]
    for name, part in {**seconds, **report["host"]}.items():
        share = f"{100 * part['median'] / whole:6.1f}%" if name in seconds else "beside"
        lines.append(f"{name:<14s} {1e3 * part['median']:10.3f} {1e3 * part['low']:10.3f} {1e3 * part['high']:10.3f} {share:>7s}")
    data = report["data"]
    if "absent" in data:
        lines.append(f"data           not measured: {data['absent']}")
    else:
        lines += [
            f"data           {1e3 * data['batch_seconds']:10.3f} per batch by itself, {data['samples_per_second']:,.1f} samples/s",
            f"with data      {1e3 * data['step_seconds_with_data']:10.3f} per step, {data['samples_per_second_with_data']:,.1f} samples/s, "
            f"{100 * data['wait_share']:.1f}% of it waiting",
        ]
    lines += ["", *(f"{name.replace('_bytes', ''):<26s} {value / 2**20:12,.1f} MiB" for name, value in report["memory"].items())]
    compiling = report["compile_seconds"]
    lines.append(f"compile        {compiling['compile']:.1f} s, after {compiling['trace']:.1f} s of tracing")
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Command-line words -> (flags, config overrides). Raises UserError."""
    plain, overrides = split_arguments(argv)
    parser = _Parser(prog="python tools/bench_step.py", description="Measure one training step.", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="such as configs/mae.py:base")
    parser.add_argument("--steps", type=int, default=10, help="calls per timing")
    parser.add_argument("--repeats", type=int, default=5, help="timings per part")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    flags, rest = parser.parse_known_args(plain)
    for word in rest:
        raise UserError(f"unknown argument {word}{nearest(word.split('=')[0], FLAGS)}; config keys are set by --config.key=value")
    for name in ("steps", "repeats"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name}={getattr(flags, name)}: at least 1")
    if flags.json is not None and not flags.json.parent.is_dir():
        raise UserError(f"--json={flags.json}: no folder {flags.json.parent}")
    return flags, overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 2 for bad input (one line on stderr)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("absl", "jax"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        flags, overrides = parse(sys.argv[1:] if argv is None else argv)
        config = load_config(flags.config, overrides)
        experiment = build(config, open_or_assume(config))
        report = {"config": flags.config, "overrides": overrides, "model": config.model.to_dict(), "run": describe_run()}
        report["environment"] = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        report |= measure(experiment, flags.steps, flags.repeats)
        print(table(report))
        if flags.json is not None:
            flags.json.write_text(json.dumps(report, indent=1) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    keep_host_memory()  # as maskae.main does
    sys.exit(main())
