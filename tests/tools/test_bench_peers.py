"""The bench beside PyTorch, without PyTorch: maskae's side on a tiny model, turns with fake sides, bad input and missing packages."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from maskae.errors import UserError
from tools import bench_peers
from tools.peers import turns

ROOT = Path(__file__).parents[2]
SIZES = {"width": 16, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "mask_ratio": 0.75}
TINY = SIZES | {"image_size": 16, "patch_size": 4}


class FakeWorker:
    """Takes as long as it is told, in rounds that are noted in `order`."""

    def __init__(self, name: str, seconds: float, order: list[str]) -> None:
        self.name, self.seconds, self.order = name, seconds, order
        self.counts: list[int] = []

    def ask(self, request: dict[str, Any]) -> dict[str, float]:
        self.counts.append(request["count"])
        self.order.append(self.name)
        return {"seconds": self.seconds, "processor_seconds": 2 * self.seconds}


def test_our_side_trains_and_the_table_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(bench_peers.MODELS, "small", TINY)
    out = tmp_path / "out.json"
    arguments = ["--batch=2", "--rounds=2", "--steps=1", "--peers=", "--threads=1", f"--json={out}"]
    assert bench_peers.main(arguments) == 0
    printed = capfd.readouterr().out
    report = json.loads(out.read_text())
    losses = report["losses"]["maskae"]
    assert losses[0] > losses[1] > losses[2] > 0, "three steps of training on one batch"
    side = report["sides"]["maskae"]
    assert side["seconds"]["low"] <= side["seconds"]["median"] <= side["seconds"]["high"]
    assert side["images_per_second"] == pytest.approx(2 / side["seconds"]["median"])
    assert report["described"]["maskae"]["threads"] in (1, None) or sys.platform != "linux"
    assert f"{side['images_per_second']:.1f}" in printed and f"{losses[0]:.6f}" in printed and "jax " in printed


def test_turns_rotate_and_ratios_are_of_one_round() -> None:
    order: list[str] = []
    workers: Any = {"maskae": FakeWorker("maskae", 0.1, order), "torch eager": FakeWorker("torch eager", 0.3, order)}
    values = bench_peers.take_turns(workers, 2, None)
    assert order == ["maskae", "torch eager", "maskae", "torch eager", "torch eager", "maskae"], "one call each first"
    assert workers["maskae"].counts[1:] == [5, 5] and workers["torch eager"].counts[1:] == [2, 2], "half a second per turn"
    values["torch eager"]["seconds"] = [0.3, 0.5]
    sides = bench_peers.summarise(values, {"maskae": {"device": "NVIDIA H200", "forward_flops": 1e12}}, batch=4)
    assert sides["torch eager"]["ratio"] == pytest.approx({"median": 4, "low": 3, "high": 5})
    assert sides["maskae"]["mfu"] == pytest.approx(3e12 * 40 / 989e12)


@pytest.mark.parametrize("losses", [[1.0, 0.9011], [1.0002, 0.9], [float("nan"), 0.9]])
def test_sides_that_disagree_are_not_timed(losses: list[float]) -> None:
    bench_peers.check_losses({"maskae": [1.0, 0.9], "torch eager": [1.00005, 0.9005]}, "float32")
    with pytest.raises(UserError, match="torch eager and maskae disagree: loss"):
        bench_peers.check_losses({"maskae": [1.0, 0.9], "torch eager": losses}, "float32")


FAKE = """
import sys
sys.path.insert(0, {root!r})
from tools.peers.turns import serve

def make_side(work):
    print("libraries print to stdout")
    if work["how"] == "exit":
        raise SystemExit(3)
    raise RuntimeError("no triton\\nmore")

serve(make_side)
"""


@pytest.mark.parametrize(
    ("how", "message"), [("raise", "peer: RuntimeError: no triton$"), ("exit", "peer: the process ended with status 3")]
)
def test_what_fails_in_a_worker_is_one_line(how: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake.py").write_text(FAKE.format(root=str(ROOT)))
    monkeypatch.setattr(bench_peers, "WORKERS", tmp_path)
    with pytest.raises(UserError, match=message):
        bench_peers.Worker("peer", sys.executable, "fake.py", {"threads": 1, "how": how})


def test_time_counts_each_step_and_waits_once() -> None:
    calls: list[str] = []

    class Side:
        def describe(self) -> dict[str, Any]:
            return {}

        def step(self) -> Any:
            calls.append("step")
            return lambda: calls.append("wait") or 0.5

    reply = turns.answer(Side(), {"do": "time", "count": 3})
    assert calls == ["step", "step", "step", "wait"] and reply["seconds"] > 0
    assert turns.answer(Side(), {"do": "losses", "count": 2}) == {"losses": [0.5, 0.5]}


def test_python_without_torch_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    assert bench_peers.main(["--peer_python", str(bare)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "has no torch and no transformers: pip install 'maskae[peers]'" in error


def test_compile_needs_a_compiler_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "needs a C++ compiler" in (bench_peers.why_not_compiled(on_cpu=True) or "")
    assert bench_peers.why_not_compiled(on_cpu=False) is None
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    assert bench_peers.why_not_compiled(on_cpu=True) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=bas"], "did you mean 'base'"),
        (["--peers=eager,compile"], "did you mean 'compiled'"),
        (["--dtype=float23"], "did you mean 'float32'"),
        (["--rounds=0"], "--rounds=0: at least 1"),
        (["--threads=100000"], "this process may use"),
        (["--peer_python=no/such/python"], "cannot be run"),
        (["--json=no/such/folder/x.json"], "no folder"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_peers.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
