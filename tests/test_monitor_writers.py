"""Pictures, TensorBoard, W&B, and what happens when one of them fails."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskae.errors import UserError
from maskae.monitor import MultiWriter, PngWriter, TensorBoardWriter, open_writers, read_metrics


class Broken(PngWriter):
    """Fails in `scalars`, and counts how often it was asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.calls = 0

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.calls += 1
        raise ConnectionError("the service is down")


def picture(channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 5, channels), dtype=np.uint8)


def test_png_files_hold_the_very_pixels(tmp_path: Path) -> None:
    writers = open_writers(tmp_path, resume_step=None, tensorboard=False)
    writers.images(30, {"reconstruction": picture(3), "val/gray": picture(1)})
    with Image.open(tmp_path / "panels" / "00000030_reconstruction.png") as image:
        np.testing.assert_array_equal(np.asarray(image), picture(3))
    with Image.open(tmp_path / "panels" / "00000030_val_gray.png") as image:
        np.testing.assert_array_equal(np.asarray(image), picture(1)[:, :, 0])


def test_float_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="'soft' must be uint8"):
        MultiWriter([]).images(1, {"soft": np.zeros((2, 2, 3), np.float32)})


def test_failing_optional_writer_is_named_once_and_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = Broken(tmp_path)
    required = open_writers(tmp_path, resume_step=None, tensorboard=False)
    writers = MultiWriter([required], [broken])
    for step in (1, 2, 3):
        writers.scalars(step, {"loss": 1.0})
    assert broken.calls == 1
    assert caplog.text.count("the service is down") == 1 and "Broken" in caplog.text
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_failing_required_writer_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        MultiWriter([Broken(tmp_path)]).scalars(1, {"loss": 1.0})


def test_tensorboard_events_are_written(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path, resume_step=4)
    writer.scalars(5, {"loss": 0.5})
    writer.images(5, {"panel": picture(3)})
    writer.text(5, "note", "hello")
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    data = events.read_bytes()
    assert b"loss" in data and b"panel" in data and b"hello" in data


def test_missing_wandb_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"maskae\[wandb\]"):
        open_writers(tmp_path, resume_step=None, tensorboard=False, wandb_project="trial")


def fake_wandb(log: list[tuple[int, dict[str, object]]], opened: list[dict[str, object]]) -> types.ModuleType:
    module = types.ModuleType("wandb")

    class Run:
        summary: dict[str, str] = {}  # noqa: RUF012

        def log(self, values: dict[str, object], step: int) -> None:
            log.append((step, values))

        def finish(self) -> None:
            log.append((-1, {}))

    def init(**arguments: object) -> Run:
        opened.append(arguments)
        return Run()

    module.init = init  # type: ignore[attr-defined]
    module.Image = lambda image: ("image", image.shape)  # type: ignore[attr-defined]
    return module


def test_wandb_gets_everything_and_a_resumed_run_keeps_its_identifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[int, dict[str, object]]] = []
    opened: list[dict[str, object]] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(log, opened))
    for resume_step in (None, 3):
        writers = open_writers(tmp_path, resume_step=resume_step, tensorboard=False, wandb_project="trial", settings={"seed": 1})
    writers.scalars(4, {"loss": 0.5})
    writers.images(4, {"panel": picture(3)})
    writers.close()
    assert log == [(4, {"loss": 0.5}), (4, {"panel": ("image", (6, 5, 3))}), (-1, {})]
    assert opened[0]["id"] == opened[1]["id"] and opened[0]["project"] == "trial" and opened[0]["config"] == {"seed": 1}


def test_wandb_that_cannot_be_opened_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # has no `init`
    writers = open_writers(tmp_path, resume_step=None, tensorboard=False, wandb_project="trial")
    writers.scalars(1, {"loss": 1.0})
    assert "Weights & Biases could not be opened" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_import_stays_light() -> None:
    heavy = ("tensorflow", "torch", "tensorboardX", "wandb", "matplotlib", "tqdm", "PIL")
    code = f"import sys, maskae.monitor, maskae.report, maskae.panels; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"
