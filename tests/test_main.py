"""The command line as a user meets it: real processes, kills, wrong words, no TensorFlow and no torch."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maskae.main import main
from tests.test_train import SMALL, assert_same_run, stored

ROOT = Path(__file__).parent.parent
# Eight simulated devices belong to the test process, not to a user's; the last flag counts.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"}
QUICK = ("evaluate.panels=0", "evaluate.baselines=false", "evaluate.evaluators={'rank': {}}", "evaluate.every_steps=100")
RUN = [f"--config.{override}" for override in (*SMALL, *QUICK)]


def command(workdir: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "maskae.main", "--config", "configs/mae.py:tiny", "--workdir", str(workdir), *RUN, *more]


def start(workdir: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(command(workdir, *more), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


LONG = ("--config.train.total_steps=240", "--config.checkpoint.every_steps=20", "--config.log.every_steps=30")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("killed") / "whole"
    assert start(workdir, *LONG).wait() == 0
    return workdir


def test_a_run_killed_at_random_moments_ends_like_one_that_was_not(whole, tmp_path):
    """Two SIGKILLs: one once a number of checkpoints is there, one at the moment a save is seen under way."""
    workdir = tmp_path / "killed"
    draw = random.Random(0)
    kills = 0
    for attempt in range(2):
        process = start(workdir, *LONG)
        checkpoints = workdir / "checkpoints"
        known = complete(checkpoints)
        wanted = draw.randint(1, 3)
        while process.poll() is None:
            if attempt == 0 and len(complete(checkpoints) - known) >= wanted:
                time.sleep(draw.random() * 0.05)
                break
            if attempt == 1 and complete(checkpoints) - known and unfinished(checkpoints):
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 2
    assert start(workdir, *LONG).wait() == 0
    assert_same_run(whole, workdir, 240)


def complete(checkpoints: Path) -> set[int]:
    return {int(p.parent.name) for p in checkpoints.glob("*/maskae_manifest.json")}


def unfinished(checkpoints: Path) -> bool:
    return any(not (p / "maskae_manifest.json").exists() for p in checkpoints.glob("*") if p.is_dir())


def test_sigterm_saves_and_exits_cleanly(tmp_path):
    workdir = tmp_path / "terminated"
    process = start(workdir, "--config.train.total_steps=100000", "--config.checkpoint.every_steps=50000")
    while not (workdir / "metrics.jsonl").exists() or not (workdir / "metrics.jsonl").stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=60) == 0
    (step,) = complete(workdir / "checkpoints")
    assert int(stored(workdir, step)["step"]) == step > 0


def test_a_run_imports_neither_tensorflow_nor_torch(tmp_path):
    for name in ("tensorflow", "torch"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "__init__.py").write_text(f"raise ImportError('{name} was imported')")
    environment = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path / 'broken'}{os.pathsep}{ROOT}"}
    words = command(tmp_path / "run", "--config.train.total_steps=2", "--config.log.tensorboard=true")
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--config", "configs/mea.py", "--dry_run"], ["configs/mea.py", "did you mean 'configs/mae.py'"]),
        (["--config", "configs/mae.py:tine", "--dry_run"], ["'tine'", "did you mean 'tiny'"]),
        (["--config", "configs/mae.py:tiny"], ["--workdir"]),
        (["--workdir", "x"], ["--config"]),
        (["--config", "configs/mae.py:tiny", "--dryrun"], ["--dryrun", "did you mean '--dry_run'"]),
        (["--config", "configs/mae.py:tiny", "--dry_run", "--config.optimizer.nam=sgd"], ["optimizer.nam", "optimizer.name"]),
        (["--config", "configs/mae.py:tiny", "--dry_run", "--config.optimizer.name=adamq"], ["adamq", "did you mean 'adam"]),
        (["--config", "configs/mae.py:tiny", "--dry_run", "--config.train.batch_size=30"], ["train.batch_size=30", "nearest: 32"]),
        (["--config", "configs/mae.py:tiny", "--dry_run", "--config.mesh.data=3"], ["mesh", "8 devices"]),
        (["--config", "configs/mae.py:tiny", "--dry_run", "--config.data.source=folder:/no/such"], ["/no/such"]),
        (
            ["--config", "configs/graph_mae.py", "--dry_run", "--config.data.source=tu:none", "--config.data.fields={}"],
            ["graph_mae reads 'nodes', but data.fields (the data is absent) has example, index, label"],
        ),
        (["--config", "configs/mae.py:tiny", "--dry_run", "--config.data.source=digit"], ["digit", "did you mean 'digits'"]),
        (["--config", "configs/mae.py:tiny", "--dry_run", "--config.data.image_size=16"], ["image_size=16", "8 x 8"]),
        (["--config", "configs/mae.py:tiny", "--dry_run", "--config.model.heads=5"], ["heads"]),
        (
            ["--config", "configs/mae.py", "--dry_run", *(f"--config.data.{x}" for x in ("source=tu:none", "examples=9", "channels=0"))],
            ["model.channels=0: mae reads pictures"],
        ),
        (["--config", "configs/mae.py:tiny", "--evaluate", "no/such/run"], ["no/such/run"]),
    ],
)
def test_wrong_words_get_one_line_and_status_2(words, parts, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(words) == 2
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("error: ")
    for part in parts:
        assert part in text


def test_a_dry_run_prints_sizes_shardings_and_flops(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["--config", "configs/mae.py:base", "--dry_run", "--config.mesh.fsdp=4"]) == 0
    text = capsys.readouterr().out
    for part in ("111,655,680", "58.68 GFLOP", "uint8[4096, 224, 224, 3]", "499,200 steps", "'fsdp', None, None, None", "abstract step"):
        assert part in text
