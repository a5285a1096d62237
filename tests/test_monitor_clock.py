"""The clock by a hand-driven time, the progress line, and the numbers about the machine."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from maskae.monitor import Clock, Progress, describe_run, device_memory, format_seconds, machine_columns, mfu, mfu_text, peak_flops


class Time:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def device(kind: str) -> Any:
    return SimpleNamespace(device_kind=kind)


def run_steps(clock: Clock, time: Time, steps: range, *, seconds: float = 2.0, wait: float = 0.5, examples: int = 32) -> None:
    for step in steps:
        with clock.waiting_for_data():
            time.pass_(wait)
        time.pass_(seconds - wait)
        clock.tick(step, examples)


def test_rates_without_pauses() -> None:
    time = Time()
    clock = Clock(devices=4, total_steps=100, time=time)
    time.pass_(50)  # building the model is not training
    clock.start(0)
    run_steps(clock, time, range(1, 11))
    assert clock.rates() == pytest.approx(
        {
            "machine/examples_per_second": 16.0,
            "machine/examples_per_second_per_device": 4.0,
            "machine/step_seconds": 2.0,
            "machine/data_wait_share": 0.25,
            "machine/eta_seconds": 180.0,
            "machine/train_seconds": 20.0,
            "machine/device_hours": 80 / 3600,
        }
    )
    run_steps(clock, time, range(11, 13), seconds=1.0, wait=0.1)
    rates = clock.rates()
    assert rates["machine/examples_per_second"] == pytest.approx(32.0), "an interval of its own"
    assert rates["machine/data_wait_share"] == pytest.approx(0.1)


def test_pauses_are_left_out_and_may_be_nested() -> None:
    time = Time()
    entered = []

    class Also:
        def __enter__(self) -> None:
            entered.append(1)

        def __exit__(self, *_: object) -> None:
            entered.append(-1)

    clock = Clock(devices=1, total_steps=10, time=time, also_pause=Also)
    clock.start(0)
    run_steps(clock, time, range(1, 4))
    with clock.pause("evaluate"):
        time.pass_(100)
        with clock.pause("save"), clock.waiting_for_data():
            time.pass_(10)
        assert clock.totals()["train_seconds"] == pytest.approx(6.0)
    run_steps(clock, time, range(4, 6))
    rates = clock.rates()
    assert rates["machine/examples_per_second"] == pytest.approx(16.0)
    assert rates["machine/data_wait_share"] == pytest.approx(0.25)
    assert rates["machine/eta_seconds"] == pytest.approx(10.0)
    assert clock.totals()["pause_seconds"] == pytest.approx({"evaluate": 110.0})
    assert entered == [1, -1]


def test_pause_ends_when_its_body_fails() -> None:
    time = Time()
    clock = Clock(devices=1, total_steps=10, time=time)
    clock.start(0)
    with pytest.raises(RuntimeError), clock.pause("evaluate"):
        time.pass_(5)
        raise RuntimeError
    run_steps(clock, time, range(1, 3))
    assert clock.totals()["train_seconds"] == pytest.approx(4.0)


def test_a_slow_first_step_does_not_weigh_on_the_pace() -> None:
    time = Time()
    clock = Clock(devices=1, total_steps=101, time=time)
    clock.start(0)
    assert clock.examples_per_second() is None and clock.eta_seconds() is None
    run_steps(clock, time, range(1, 2), seconds=60.0)
    run_steps(clock, time, range(2, 4))
    assert clock.examples_per_second() == pytest.approx(16.0)
    assert clock.eta_seconds() == pytest.approx(2.0 * 98)


def test_totals_survive_a_resume_on_other_devices() -> None:
    time = Time()
    first = Clock(devices=4, total_steps=20, time=time)
    first.start(0)
    run_steps(first, time, range(1, 11))
    with first.pause("evaluate"):
        time.pass_(7)
    second = Clock(devices=2, total_steps=20, time=time)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.start(10)
    run_steps(second, time, range(11, 16))
    with second.pause("evaluate"):
        time.pass_(3)
    totals = second.totals()
    assert totals["train_seconds"] == pytest.approx(30.0)
    assert totals["device_hours"] == pytest.approx((20 * 4 + 10 * 2) / 3600)
    assert totals["examples_seen"] == 15 * 32
    assert totals["pause_seconds"] == pytest.approx({"evaluate": 10.0})
    rates = second.rates()
    assert rates["machine/examples_per_second"] == pytest.approx(16.0), "earlier examples are no part of this interval"
    assert rates["machine/eta_seconds"] == pytest.approx(10.0)


def test_clock_refuses_wrong_order() -> None:
    clock = Clock(devices=1, total_steps=1)
    clock.start(0)
    with pytest.raises(RuntimeError, match="twice"):
        clock.start(0)
    with pytest.raises(RuntimeError, match="before it is started"):
        clock.load_state_dict(clock.state_dict())


def test_progress_without_a_terminal_writes_few_plain_lines() -> None:
    time, stream = Time(), io.StringIO()
    progress = Progress(1000, stream=stream, time=time)
    for step in range(1, 1001):
        time.pass_(0.5)
        progress.update(step, loss=0.34567, examples_per_second=1234.5, eta_seconds=72)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert lines[0] == "step 1/1000 (0%)  loss 0.3457  1,234 examples/s  ETA 0:01:12"
    assert lines[-1].startswith("step 1000/1000 (100%)") and len(lines) == len(set(lines))
    assert 10 < len(lines) < 100


def test_progress_tells_where_an_interrupted_run_stood() -> None:
    time, stream = Time(), io.StringIO()
    progress = Progress(1000, initial_step=10, stream=stream, time=time)
    progress.update(11, loss=1.0)
    progress.update(12, loss=2.0)
    progress.close()
    assert stream.getvalue().splitlines() == ["step 11/1000 (1%)  loss 1", "step 12/1000 (1%)  loss 2"]


def test_progress_on_a_terminal_is_a_bar() -> None:
    stream = Terminal()
    progress = Progress(4, stream=stream)
    for step in range(1, 5):
        progress.update(step, loss=0.5, examples_per_second=10.0, eta_seconds=3.0)
    progress.write("a line of its own")
    progress.close()
    last = stream.getvalue().replace("\n", "\r").rstrip("\r").split("\r")[-1]
    assert "step 4/4" in last and "loss 0.5" in last and "10 examples/s" in last and "ETA 0:00:03" in last
    assert "a line of its own\n" in stream.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_outlives_the_reader_of_its_progress(terminal: bool, caplog: pytest.LogCaptureFixture) -> None:
    class Closed(Terminal):
        gone = False

        def isatty(self) -> bool:
            return terminal

        def write(self, text: str) -> int:
            if self.gone:
                raise BrokenPipeError("the reader is gone")
            return super().write(text)

    time, stream = Time(), Closed()
    progress = Progress(100, stream=stream, time=time)
    progress.update(1, loss=0.5)
    stream.gone = True
    progress.write("a line of its own")
    for step in range(2, 101):
        time.pass_(10)
        progress.update(step, loss=0.5)
    progress.close()
    assert caplog.text.count("the reader is gone") == 1


def test_format_seconds() -> None:
    assert [format_seconds(s) for s in (0.4, 72, 47159, 187506)] == ["0:00:00", "0:01:12", "13:05:59", "2d 04:05:06"]


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("TPU v3", 123 / 2),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("TPU7x", 2307 / 2),
    ],
)
def test_peak_of_each_device(kind: str, teraflops: float) -> None:
    assert peak_flops(kind) == pytest.approx(teraflops * 1e12)


def test_mfu_of_the_published_anchor() -> None:
    # ViT-L MAE with 124.5 GFLOP per image and training step, 289 examples/s per v3 chip (two devices): 29 % in the field notes.
    value = mfu(124.5e9 / 3, 289.0, [device("TPU v3")] * 2)
    assert value == pytest.approx(0.2925, abs=1e-3)
    assert mfu_text(value) == "29.3 %"


def test_mfu_is_unknown_on_a_cpu() -> None:
    assert peak_flops("cpu") is None
    assert mfu(1e9, 10.0, jax.devices()) is None
    assert mfu_text(None) == "unknown"
    time = Time()
    clock = Clock(devices=8, total_steps=10, time=time)
    clock.start(0)
    run_steps(clock, time, range(1, 3))
    columns = machine_columns(clock, 1e9, jax.devices())
    assert "machine/mfu" not in columns and "machine/host_memory_bytes" in columns
    assert all(name.startswith("machine/") for name in columns)
    run_steps(clock, time, range(3, 5))
    assert machine_columns(clock, 1e12, [device("NVIDIA A100")])["machine/mfu"] == pytest.approx(3 * 1e12 * 16 / 312e12)


def test_memory_of_accelerators_and_of_this_process() -> None:
    gpus: Any = [
        SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 5, "peak_bytes_in_use": 9}),
        SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 7, "peak_bytes_in_use": 8}),
    ]
    assert device_memory(gpus) == {"machine/device_memory_bytes": 7.0, "machine/device_memory_peak_bytes": 9.0}
    (name, resident), *rest = device_memory().items()
    assert name == "machine/host_memory_bytes" and not rest
    assert 2e7 < resident < 1e11


def test_description_names_versions_and_devices() -> None:
    described = json.loads(json.dumps(describe_run()))
    assert described["versions"]["jax"] == jax.__version__
    assert described["device"] == "cpu" and described["devices"] == jax.device_count() and described["peak_flops_per_device"] is None
