"""The step bench on a tiny model: every number is there and plausible, bad input is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from maskae.monitor.device_info import mfu
from tools import bench_step

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "mae.py") + ":tiny"
SMALL = ["--config.model.depth=1", "--config.model.decoder_depth=1", "--config.model.width=16", "--config.model.decoder_width=8"]
FAST = [*SMALL, "--steps=2", "--repeats=3"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    import contextlib
    import io

    out = tmp_path_factory.mktemp("bench") / "out.json"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert bench_step.main(["--config", CONFIG, *FAST, "--json", str(out)]) == 0
    return json.loads(out.read_text()), printed.getvalue()


def test_every_part_is_measured(report: tuple[dict, str]) -> None:
    numbers = report[0]
    seconds = {name: part["median"] for name, part in numbers["seconds"].items()}
    assert set(seconds) == {"step", "forward", "backward", "optimizer"}
    assert seconds["step"] > 0 and seconds["forward"] > 0
    for part in (*numbers["seconds"].values(), *numbers["host"].values()):
        assert part["low"] <= part["median"] <= part["high"]
    assert numbers["samples_per_second"] == pytest.approx(64 / seconds["step"])
    assert numbers["mfu"] == "unknown"
    assert numbers["compile_seconds"]["compile"] > 0
    assert numbers["memory"]["arguments_bytes"] > 3 * 4 * 1000, "parameters and two moments"
    assert numbers["host"]["transfer"]["median"] > 0
    assert numbers["data"]["samples_per_second"] > 0 and 0 <= numbers["data"]["wait_share"] <= 1
    assert numbers["run"]["versions"]["jax"] and numbers["overrides"] == [word.removeprefix("--config.") for word in SMALL]


def test_table_shows_the_numbers(report: tuple[dict, str]) -> None:
    numbers, printed = report
    assert f"{numbers['samples_per_second']:,.1f}" in printed
    for word in ("MFU            unknown", "forward", "backward", "optimizer", "dispatch", "transfer", "with data", "compile"):
        assert word in printed


def test_the_parts_of_a_turn_sum_to_the_step() -> None:
    """With programs that wait for known times: the split finds them."""
    import time

    def pause(milliseconds: float) -> None:
        time.sleep(milliseconds / 1e3)

    def step(state: int, batch: None) -> tuple[int, dict[str, float]]:
        pause(24)
        return state + 1, {"loss": 0.0}

    programs = bench_step.Programs(lambda s, b: pause(6), lambda s, b: pause(18), step, {}, {})
    values, state = bench_step.measure_compute(programs, 0, None, steps=2, repeats=3)
    assert state == 2 + 2 * 3
    for forward, backward, optimizer, whole in zip(*(values[k] for k in ("forward", "backward", "optimizer", "step")), strict=True):
        assert forward + backward + optimizer == pytest.approx(whole)
    assert min(values["forward"]) == pytest.approx(0.006, abs=0.003)
    assert min(values["backward"]) == pytest.approx(0.012, abs=0.006)


def test_random_batch_is_what_training_gets() -> None:
    import jax

    from maskae.config import load_config
    from maskae.experiment import build

    experiment = build(load_config(CONFIG, [word.removeprefix("--config.") for word in SMALL]))
    with jax.set_mesh(experiment.mesh):
        batch = bench_step.random_batch(experiment)
    shapes = experiment.batch_shapes()
    assert {name: (a.shape, a.dtype, a.sharding) for name, a in batch.items()} == {
        name: (s.shape, s.dtype, s.sharding) for name, s in shapes.items()
    }
    assert 15 <= int(batch["image"].max()) <= 16, "the digits' full brightness is 16"
    assert batch["example"].tolist() == list(range(64)) and int(batch["label"].max()) == 9


def test_mfu_counts_three_forward_passes() -> None:
    class Chip:
        device_kind = "NVIDIA H200"

    assert mfu(1e9, 1000, [Chip()]) == pytest.approx(3e12 / 989e12)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", CONFIG, "--step=3"], "did you mean '--steps'"),
        (["--config", CONFIG, "--steps=0"], "--steps=0: at least 1"),
        (["--config", CONFIG, "--config.train.bach_size=3"], "did you mean 'train.batch_size'"),
        (["--config", CONFIG, "--json", "no/such/folder/x.json"], "no folder"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_step.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_cudnn_attention_on_a_cpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_step.main(["--config", CONFIG, "--config.model.attention=cudnn", "--config.model.dtype=bfloat16"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "attention 'cudnn' needs an NVIDIA GPU" in error
