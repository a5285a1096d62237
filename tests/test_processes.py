"""Several processes for real: 2 and 4 on this machine with gloo, and 8 simulated devices in one; kills, stops, hosts that never come."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from maskae import processes
from maskae.errors import UserError
from maskae.monitor import read_metrics
from maskae.processes import Agreement, Launch, barrier, gather, joined, table_lines
from tests import processes_entry
from tests.conftest import CACHE
from tests.test_main import complete
from tests.test_train import stored

ROOT = Path(__file__).parent.parent
STEPS = 20
MODEL = ("depth=1", "width=16", "heads=4", "decoder_width=16", "decoder_depth=1", "decoder_heads=4")
RECIPE = (
    "train.batch_size=32",
    f"train.total_steps={STEPS}",
    # Plain SGD: Adam turns the rounding noise of a zero gradient (the key bias) into steps of full size.
    "optimizer.name=sgd",
    "optimizer.arguments={}",
    "optimizer.base_learning_rate=0.8",
    "data.flip=true",
    "checkpoint.every_steps=10",
    "checkpoint.keep_last=10",
    "evaluate.every_steps=20",
    "evaluate.batch_size=64",
    "evaluate.max_examples=64",
    "evaluate.baselines=false",
    "evaluate.panels=0",
    "log.every_steps=1",
    "log.tensorboard=false",
)
TIMEOUT = 20


def flags(workdir: Path, *overrides: str) -> list[str]:
    model = (f"model.{override}" for override in MODEL)
    return words("configs/mae.py:tiny", workdir, *model, "evaluate.evaluators={}", *overrides)


def words(config: str, workdir: Path, *overrides: str) -> list[str]:
    return ["--config", config, "--workdir", str(workdir), *(f"--config.{override}" for override in (*RECIPE, *overrides))]


def both(folder: Path, *overrides: str) -> list[list[str]]:
    """The two runs that are compared between layouts: the MAE, and a loss with global negatives."""
    return [flags(folder / "mae", *overrides), words("tests/contrast_config.py", folder / "contrast", *overrides)]


EVALUATED = ("evaluate.evaluators={'knn': {'ks': (5,)}}", "evaluate.panels=1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def launch(
    count: int, devices: int, command: list[str], timeout: float = TIMEOUT, own: dict[int, list[str]] | None = None, **spec
) -> list[subprocess.Popen]:
    """Starts `count` processes with `devices` simulated devices each; `own` holds further flags of single processes."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    port = free_port()
    started = []
    for index in range(count):
        several = ["--coordinator", f"localhost:{port}", "--num_processes", str(count), "--process_id", str(index)]
        several += ["--process_timeout_seconds", str(timeout)]
        line = [sys.executable, "-m", "tests.processes_entry", json.dumps(spec), *command]
        line += [*(several if count > 1 else []), *(own or {}).get(index, [])]
        started.append(subprocess.Popen(line, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True))
    return started


def ended(processes: list[subprocess.Popen], seconds: float = 120) -> list[tuple[int, str]]:
    """(status, stderr) of each process; fails where one is still there after `seconds`."""
    deadline, results = time.monotonic() + seconds, []
    try:
        for process in processes:
            _, errors = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            results.append((process.returncode, errors))
    finally:
        for process in processes:
            process.kill()
    return results


def losses(workdir: Path) -> dict[int, float]:
    return {int(row["step"]): row["loss"] for row in read_metrics(workdir / "metrics.jsonl") if "loss" in row}


def batches(workdir: Path) -> dict[str, str]:
    return json.loads((workdir / "batches.json").read_text())


def last_line(text: str) -> str:
    return [line for line in text.strip().splitlines() if line.startswith("error")][-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


def run_here(runs: list[list[str]]) -> None:
    """In this process with its eight devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(processes_entry.train.Loop, "take_step", processes_entry.train.Loop.take_step)
        processes_entry.record_batches()
        processes_entry.run_all(runs)


@pytest.fixture(scope="module")
def one(folder) -> Path:
    """One process with eight devices, data parallel: what the others are compared with."""
    run_here(both(folder / "one", *EVALUATED))
    return folder / "one"


@pytest.fixture(scope="module")
def two(folder) -> Path:
    """Two processes with four devices each, parameters split over four."""
    results = ended(launch(2, 4, [], runs=both(folder / "two", "mesh.fsdp=4", *EVALUATED)))
    assert [status for status, _ in results] == [0, 0], results
    return folder / "two"


@pytest.fixture(scope="module")
def four(folder) -> Path:
    """Four processes with one device each; tensor parallel over two processes, which therefore read the same rows."""
    results = ended(launch(4, 1, [], runs=both(folder / "four", "mesh.tensor=2")[:1]))
    assert [status for status, _ in results] == [0] * 4, results
    return folder / "four"


# Four processes on two cores take half a minute: pytest -n 0 -m slow tests/test_processes.py
@pytest.mark.parametrize(("layout", "system"), [("two", "mae"), ("two", "contrast"), pytest.param("four", "mae", marks=pytest.mark.slow)])
def test_processes_train_as_one(layout, system, one, request):
    other = request.getfixturevalue(layout) / system
    assert batches(other) == batches(one / system) and len(batches(other)) == STEPS
    expected, found = losses(one / system), losses(other)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    assert expected[1] - expected[STEPS] > 0.01, "a loss that does not move would agree with anything"
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def test_evaluation_over_processes_is_that_of_one(one, two):
    expected, found = (json.loads((run / "mae" / "evaluation.json").read_text())["rows"]["pretrained"] for run in (one, two))
    assert set(found) == set(expected) and any(name.startswith("knn") for name in found)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3), name
    pictures = [(run / "mae" / "panels" / f"{STEPS:08d}_reconstruction.png").stat().st_size for run in (one, two)]
    assert all(pictures)


def resumed_from_ten(two: Path, folder: Path, name: str) -> Path:
    """A copy of the two processes' run as it stood at step 10."""
    workdir = folder / name / "mae"
    shutil.copytree(two / "mae", workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    return workdir


def assert_goes_on_like(whole: Path, workdir: Path) -> None:
    """The second half of a run: the same batches, the same losses."""
    order = batches(workdir)
    assert order == {step: digest for step, digest in batches(whole).items() if int(step) >= 10}
    np.testing.assert_allclose(list(losses(workdir).values()), list(losses(whole).values()), rtol=1e-5)


def test_a_checkpoint_of_two_processes_goes_on_on_two_devices_of_one(two, folder):
    workdir = resumed_from_ten(two, folder, "small")
    ((status, errors),) = ended(launch(1, 2, [], runs=[flags(workdir, "mesh.fsdp=1")]))
    assert status == 0 and "resumed at step 10" in errors, errors
    assert_goes_on_like(two / "mae", workdir)


def test_a_checkpoint_of_two_processes_goes_on_on_eight_devices(two, folder):
    workdir = resumed_from_ten(two, folder, "wide")
    run_here([flags(workdir, "mesh.fsdp=2", "mesh.tensor=2")])
    assert_goes_on_like(two / "mae", workdir)


def test_a_stop_and_a_kill_of_one_process_lose_nothing(one, tmp_path):
    """One run in three lives: SIGTERM to one process, then SIGKILL to one, then to the end."""
    workdir = tmp_path / "mae"
    command = flags(workdir, "mesh.fsdp=2")
    stopped = ended(launch(2, 1, command, signal=[1, 5, signal.SIGTERM]))
    assert [status for status, _ in stopped] == [0, 0], stopped
    assert "process  host" in stopped[0][1] and "1 x cpu" in stopped[0][1] and "process  host" not in stopped[1][1]
    assert complete(workdir / "checkpoints") == {6}, "agreed one step later, by both"
    began = time.monotonic()
    killed = ended(launch(2, 1, command, signal=[1, 13, signal.SIGKILL]))
    assert time.monotonic() - began < 60
    assert [status for status, _ in killed] == [3, -signal.SIGKILL], killed
    assert "another process was lost" in last_line(killed[0][1]) and "resumed at step 6" in killed[0][1]
    assert complete(workdir / "checkpoints") == {6, 10}
    finished = ended(launch(2, 1, command))
    assert [status for status, _ in finished] == [0, 0] and "resumed at step 10" in finished[0][1], finished
    assert list(losses(workdir)) == list(range(1, STEPS + 1)) and int(stored(workdir, STEPS)["step"]) == STEPS
    # Not bit for bit: gloo adds in the order in which pieces arrive.
    np.testing.assert_allclose(list(losses(workdir).values()), list(losses(one / "mae").values()), rtol=1e-5)


def test_a_process_that_falls_silent_ends_the_others(tmp_path):
    processes = launch(2, 1, flags(tmp_path / "mae"), timeout=8, signal=[1, 3, signal.SIGSTOP])
    began = time.monotonic()
    _, errors = processes[0].communicate(timeout=60)
    processes[1].kill()
    processes[1].communicate()
    assert processes[0].returncode == 3 and time.monotonic() - began < 45
    assert "process 1 gave no sign for 8 s" in last_line(errors)


def test_an_error_of_one_process_reaches_the_others(tmp_path):
    results = ended(launch(2, 1, flags(tmp_path / "mae"), own={0: ["--config.data.source=folder:/no/such"]}))
    assert [status for status, _ in results] == [2, 3], results
    assert "/no/such" in last_line(results[0][1])
    assert "process 0" in last_line(results[1][1]) and "/no/such" in last_line(results[1][1])


def test_bad_input_gets_the_same_line_from_every_process(tmp_path):
    results = ended(launch(2, 1, flags(tmp_path / "mae", "mesh.fsdp=2", "train.batch_size=31")))
    for status, errors in results:
        assert status == 2 and "train.batch_size=31 does not divide by mesh data x fsdp = 2" in last_line(errors), errors
        assert "Traceback" not in errors


def test_a_host_that_never_comes_is_one_line_after_a_bounded_wait(tmp_path):
    began = time.monotonic()
    process = launch(2, 1, flags(tmp_path / "mae"), timeout=3)
    process[1].kill()
    (status, errors), _ = ended(process, 60)
    assert status == 2 and time.monotonic() - began < 45
    assert errors.strip().splitlines()[-1].startswith("error: process 0 of 2: not all 2 processes were at localhost:")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("localhost:1", 2, None), "--process_id missing"),
        ((None, None, 1), "--coordinator and --num_processes missing"),
        (("localhost", 2, 0), "--coordinator=localhost: expected host:port"),
        (("localhost:1", 2, 2), "--process_id=2: with --num_processes=2 it is 0 to 1"),
        (("localhost:1", 0, 0), "--num_processes=0"),
        ((None, None, None, 0.0), "--process_timeout_seconds"),
    ],
)
def test_flags_that_do_not_fit_together_are_one_line(arguments, part):
    with pytest.raises(UserError, match=part):
        Launch(*arguments).check()


def test_the_cluster_is_asked_where_no_flag_is_given(monkeypatch):
    """A Slurm step of four tasks, as jax's own detection reads it."""
    for name, value in {
        "SLURM_JOB_ID": "4097",
        "SLURM_STEP_NODELIST": "node[003-004]",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_NODES": "2",
    }.items():
        monkeypatch.setenv(name, value)
    seen = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **_: seen.append(arguments))
    monkeypatch.setattr(processes, "gather", lambda *_: [{"host": "node004", "kind": "cpu", "devices": [0]}])
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    processes.initialize(Launch())
    assert seen == [("node003:61441", 4, 3, [1])]


def test_one_process_alone_costs_nothing_and_agrees_with_itself():
    with joined(Launch()):
        assert not jax.distributed.is_initialized()
    barrier("nobody else")
    assert gather("own", {"a": 1}) == [{"a": 1}]
    agreement = Agreement()
    assert [agreement(0), agreement(15), agreement(0)] == [0, 15, 0]


def test_the_table_names_host_and_devices():
    rows = [{"host": "a", "kind": "TPU v5 lite", "devices": [0, 1, 2, 3]}, {"host": "worker-1", "kind": "TPU v5 lite", "devices": [6, 9]}]
    assert table_lines(rows) == [
        "process  host      devices",
        "      0  a         4 x TPU v5 lite (0-3)",
        "      1  worker-1  2 x TPU v5 lite (6, 9)",
    ]
