"""Measures a training step of MAE beside PyTorch's: Hugging Face transformers' ViTMAEForPreTraining, eager and under torch.compile.

    python tools/bench_peers.py --model small --batch 8
    python tools/bench_peers.py --model base --batch 4 --rounds 9 [--dtype bfloat16] [--peers eager,compiled] [--threads 1] \\
        [--peer_python other/venv/bin/python] [--json figures.json]

A step is forward, backward and AdamW, at 224 pixels, patches of 16, three quarters of them hidden, the paper's decoder, on the same random
images, hidden patches and weights. Before anything is timed both sides take --check_steps steps, whose losses must agree: that checks the
loss, its gradients and the optimizer of the very programs that are timed. (maskae's step also takes the norm of the gradients and guards
against non-finite ones.)

Each side is a process of its own that sleeps unless it is its turn, on the same processors (--threads, default all). Rounds are
interleaved; the ratio is of one round's turns, above 1 where maskae is faster. Beside the clock there is the processor time of a step,
which other programs on the machine hardly disturb with --threads 1 (with more, PyTorch's threads spin while they wait for each other).

The peers need torch and transformers (extra `peers`), in this Python or in that of --peer_python, which needs no jax: the CUDA packages of
torch and jax do not always live together. Exit status: 0, or 2 for bad input and for sides that disagree.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

# So that it also works in a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from maskae.errors import UserError, nearest

PEERS = ("eager", "compiled")
DTYPES = ("float32", "bfloat16", "float16")
DECODER = {"decoder_width": 512, "decoder_depth": 8, "decoder_heads": 16, "mask_ratio": 0.75}
IMAGES = {"image_size": 224, "patch_size": 16}
MODELS: dict[str, dict[str, Any]] = {
    "small": {"width": 384, "depth": 12, "heads": 6, **DECODER, **IMAGES},
    "base": {"width": 768, "depth": 12, "heads": 12, **DECODER, **IMAGES},
    "large": {"width": 1024, "depth": 24, "heads": 16, **DECODER, **IMAGES},
}
OPTIMIZER = {"learning_rate": 1.5e-4, "betas": [0.9, 0.95], "weight_decay": 0.05}
# How far losses may lie apart, relative: of rounding alone, in the first step and after updates by gradients.
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 4e-2), "float16": (1e-2, 2e-2)}
COMPILERS = ("g++", "clang++", "c++")
WORKERS = Path(__file__).parent / "peers"
SHORTEST_TURN = 0.5  # seconds; shorter steps are repeated within a turn


class Worker:
    """A process that holds one side of the comparison and works only when asked."""

    def __init__(self, name: str, python: str, script: str, work: dict[str, Any]) -> None:
        self.name = name
        environment = os.environ | {"OMP_NUM_THREADS": str(work["threads"])}
        command = [python, str(WORKERS / script)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.ask(work)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its answer. Raises UserError with the reason where it failed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UserError(f"{self.name}: the process ended with status {self.process.wait()}; see its output above")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise UserError(f"{self.name}: {reply['error']}")
        return reply

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def write_inputs(folder: Path, model: dict[str, Any], batch: int) -> None:
    """Random images [B, H, W, 3], noise [B, N] and weights (none of them zero), under the names of Hugging Face transformers."""
    import numpy as np

    from maskae.interop.layout import Geometry
    from maskae.interop.weights import export_weights
    from maskae.paths import flatten_paths, unflatten_paths

    generator = np.random.default_rng(0)
    side, grid = model["image_size"], model["image_size"] // model["patch_size"]
    np.save(folder / "image.npy", generator.standard_normal((batch, side, side, 3), np.float32))
    np.save(folder / "noise.npy", generator.random((batch, grid * grid), np.float32))
    flat = {}
    for name, leaf in flatten_paths(parameter_shapes(model)).items():
        values = generator.standard_normal(leaf.shape, np.float32) * np.float32(0.02)
        flat[name] = values + 1 if name.endswith("scale") else values
    # "pt" is what transformers wants to read there of any file that it loads.
    weights = folder / "model.safetensors"
    export_weights(unflatten_paths(flat), weights, Geometry(model["patch_size"], (grid, grid)), "huggingface", {"format": "pt"})


def parameter_shapes(model: dict[str, Any]) -> Any:
    """The tree of shapes of maskae's parameters; computes nothing, so that this process starts no threads that would take part."""
    import jax

    from maskae.systems.mae import Mae

    return jax.eval_shape(lambda: Mae(**model).init(jax.random.key(0), {})).params


def missing_packages(python: str) -> list[str]:
    """Which of torch and transformers that Python lacks. Raises UserError where it cannot be run."""
    code = "import importlib.util as u; print(*(n for n in ('torch', 'transformers') if u.find_spec(n) is None))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"--peer_python={python} cannot be run: {error}") from error
    return done.stdout.split()


def why_not_compiled(on_cpu: bool) -> str | None:
    """Why torch.compile cannot work here; None where nothing is known against it."""
    if on_cpu and not os.environ.get("CXX") and not any(shutil.which(name) for name in COMPILERS):
        return f"torch.compile needs a C++ compiler ({', '.join(COMPILERS)} or CXX), and there is none"
    return None


def check_losses(losses: dict[str, list[float]], dtype: str) -> None:
    """Raises UserError where a peer's losses are not maskae's, or are none."""
    ours = losses["maskae"]
    for name, theirs in losses.items():
        for step, (own, other) in enumerate(zip(ours, theirs, strict=True)):
            tolerance = TOLERANCE[dtype][step > 0]
            if not abs(own - other) <= tolerance * abs(own):
                raise UserError(f"{name} and maskae disagree: loss {other:.6g} and {own:.6g} in step {step}; nothing was timed")


def take_turns(workers: dict[str, Worker], rounds: int, steps: int | None) -> dict[str, dict[str, list[float]]]:
    """Per side `seconds` and `processor_seconds` of a step, one value per round. The order of the turns rotates."""
    counts = {}
    for name, worker in workers.items():
        once = worker.ask({"do": "time", "count": 1})["seconds"]
        counts[name] = steps or max(1, round(SHORTEST_TURN / once))
    names = list(workers)
    values: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "processor_seconds": []} for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            for key, value in workers[name].ask({"do": "time", "count": counts[name]}).items():
                values[name][key].append(value)
    return values


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summarise(values: dict[str, dict[str, list[float]]], described: dict[str, Any], batch: int) -> dict[str, Any]:
    """Per side: seconds and processor seconds of a step, images/s, MFU, and for peers the ratios of their turns to maskae's."""
    from maskae.monitor.device_info import mfu

    ours, sides = values["maskae"], {}
    device: Any = SimpleNamespace(device_kind=described["maskae"]["device"])
    for name, own in values.items():
        side: dict[str, Any] = {key: spread(each) for key, each in own.items()}
        side["images_per_second"] = batch / side["seconds"]["median"]
        side["mfu"] = mfu(described["maskae"]["forward_flops"], side["images_per_second"], [device])
        if name != "maskae":
            side["ratio"] = spread([theirs / mine for theirs, mine in zip(own["seconds"], ours["seconds"], strict=True)])
            pairs = zip(own["processor_seconds"], ours["processor_seconds"], strict=True)
            side["processor_ratio"] = spread([theirs / mine for theirs, mine in pairs])
        sides[name] = side
    return sides


@contextmanager
def start_workers(flags: argparse.Namespace, work: dict[str, Any]) -> Iterator[tuple[dict[str, Worker], dict[str, str]]]:
    """The processes by side, and why a peer is not among them. Raises UserError where maskae's side or every peer fails."""
    absent: dict[str, str] = {}
    with ExitStack() as stack:

        def start(name: str, python: str, script: str, **more: str) -> Worker:
            worker = Worker(name, python, script, work | more)
            stack.callback(worker.close)
            return worker

        workers = {"maskae": start("maskae", sys.executable, "maskae_worker.py")}
        on_cpu = workers["maskae"].ask({"do": "describe"})["on_cpu"]
        for variant in flags.peers:
            name = f"torch {variant}"
            reason = why_not_compiled(on_cpu) if variant == "compiled" else None
            try:
                if reason is None:
                    workers[name] = start(name, flags.peer_python, "torch_worker.py", variant=variant)
            except UserError as error:
                if variant == "eager":
                    raise
                reason = str(error)
            if reason is not None:
                absent[name] = reason
        yield workers, absent


def measure(flags: argparse.Namespace, model: dict[str, Any]) -> dict[str, Any]:
    """Everything of one run as a JSON object. Raises UserError where the sides disagree."""
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), model, flags.batch)
        work = {"model": model, "dtype": flags.dtype, "threads": flags.threads, "folder": folder, "optimizer": OPTIMIZER}
        work["compute"] = {"attention": flags.attention}
        with start_workers(flags, work) as (workers, absent):
            losses: dict[str, list[float]] = {}
            for name in list(workers):
                try:
                    losses[name] = workers[name].ask({"do": "losses", "count": flags.check_steps})["losses"]
                except UserError as error:  # torch.compile compiles, and may fail, in its first step
                    if name != "torch compiled":
                        raise
                    absent[name] = str(error)
                    del workers[name]
            check_losses(losses, flags.dtype)
            described = {name: worker.ask({"do": "describe"}) for name, worker in workers.items()}
            values = take_turns(workers, flags.rounds, flags.steps)
    run = {name: getattr(flags, name) for name in ("model", "batch", "dtype", "rounds", "threads")}
    sides = summarise(values, described, flags.batch)
    return {"run": run, "losses": losses, "described": described, "sides": sides, "absent": absent, "values": values}


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    from maskae.monitor.device_info import mfu_text

    run, device = report["run"], report["described"]["maskae"]["device"]
    lines = [
        f"MAE ViT-{run['model']}, batch {run['batch']}, {run['dtype']}, {run['rounds']} rounds, on {device}",
        *(
            f"{name:<16s}threads {about['threads']}, " + ", ".join(f"{package} {version}" for package, version in about["versions"].items())
            for name, about in report["described"].items()
        ),
        *(f"{name:<16s}losses " + ", ".join(f"{loss:.6f}" for loss in losses) for name, losses in report["losses"].items()),
        "",
        f"{'side':<16s}{'ms/step':>10s}{'low':>10s}{'high':>10s}{'images/s':>10s}{'MFU':>9s}{'ratio':>8s}{'low':>7s}{'high':>7s}"
        f"{'processor ms':>14s}{'ratio':>8s}",
    ]
    for name, side in report["sides"].items():
        seconds = "".join(f"{1e3 * side['seconds'][key]:10.1f}" for key in ("median", "low", "high"))
        ratio, processor_ratio = f"{'1':>8s}{'':14s}", f"{'1':>8s}"
        if "ratio" in side:
            ratio = f"{side['ratio']['median']:8.2f}{side['ratio']['low']:7.2f}{side['ratio']['high']:7.2f}"
            processor_ratio = f"{side['processor_ratio']['median']:8.2f}"
        processor = f"{1e3 * side['processor_seconds']['median']:14.1f}"
        rate = f"{side['images_per_second']:10.1f}{mfu_text(side['mfu']):>9s}"
        lines.append(f"{name:<16s}{seconds}{rate}{ratio}{processor}{processor_ratio}")
    lines += [f"{name:<16s}not available: {reason}" for name, reason in report["absent"].items()]
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command-line words -> flags. Raises UserError."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = _Parser(prog="python tools/bench_peers.py", description="Measure MAE's training step beside PyTorch's.", allow_abbrev=False)
    parser.add_argument("--model", default="small", help=", ".join(MODELS))
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--dtype", default="float32", help=", ".join(DTYPES))
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--steps", type=int, help="steps per turn; by default as many as take half a second")
    parser.add_argument("--check_steps", type=int, default=3, help="steps whose losses must agree")
    parser.add_argument("--threads", type=int, default=cores, help="processors that a side may use")
    parser.add_argument("--attention", default="xla", help="maskae's attention implementation, such as auto or cudnn")
    parser.add_argument("--peers", default=",".join(PEERS), help="which of " + ", ".join(PEERS))
    parser.add_argument("--peer_python", default=sys.executable, metavar="FILE", help="a Python that has torch and transformers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    flags = parser.parse_args(argv)
    flags.peers = [name for name in flags.peers.split(",") if name]
    for option, known, given in (("model", MODELS, [flags.model]), ("dtype", DTYPES, [flags.dtype]), ("peers", PEERS, flags.peers)):
        for name in given:
            if name not in known:
                raise UserError(f"--{option}={name} is not known{nearest(name, known)}; there are {', '.join(known)}")
    for name in ("batch", "rounds", "threads", "check_steps"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name}={getattr(flags, name)}: at least 1")
    if flags.threads > cores:
        raise UserError(f"--threads={flags.threads}: this process may use {cores}")
    if flags.json is not None and not flags.json.parent.is_dir():
        raise UserError(f"--json={flags.json}: no folder {flags.json.parent}")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 2 for bad input (one line on stderr)."""
    try:
        flags = parse(sys.argv[1:] if argv is None else argv)
        if flags.peers and (missing := missing_packages(flags.peer_python)):
            raise UserError(
                f"{flags.peer_python} has no {' and no '.join(missing)}: pip install 'maskae[peers]', or name another by --peer_python"
            )
        report = measure(flags, MODELS[flags.model])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(report))
    if flags.json is not None:
        flags.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
