"""The benchmark measures every loader of a source in turns, and says what it cannot do in one line."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskae.data.images import Picture
from maskae.data.sources import open_source
from maskae.data.transforms import make_transform
from tools import bench_data, torch_loader

QUICK = ["--rounds=2", "--batches=1", "--batch_size=4", "--size=32"]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    bench_data.write_photographs(tmp_path / "photographs", 6)
    return tmp_path / "photographs"


def test_photographs_are_of_the_kind_that_is_said(photographs: Path) -> None:
    files = sorted(photographs.iterdir())
    assert len(files) == 6
    assert len({file.read_bytes() for file in files}) == 6
    for file in files:
        assert Picture(file.read_bytes(), 3).size == (375, 500)
        assert 25_000 < file.stat().st_size < 110_000


def test_every_loader_is_measured_beside_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started: list[int] = []

    def slow(files: Any, size: int, scale: Any, batch_size: int, workers: int) -> Iterator[np.ndarray]:
        started.append(workers)
        while True:
            sum(range(300_000))
            yield np.zeros((batch_size, 3, size, size), np.uint8)

    monkeypatch.setattr(torch_loader, "is_installed", lambda: True)
    monkeypatch.setattr(torch_loader, "start", slow)
    figures = tmp_path / "figures.json"
    assert bench_data.main(["--source=photographs", "--count=12", "--views=2", f"--json={figures}", *QUICK]) == 0
    written = json.loads(figures.read_text())
    names = ["maskae folder", "maskae arrayrecord", "maskae folder, 2 views", "maskae arrayrecord, 2 views", "torch DataLoader, PIL"]
    assert [rate["name"] for rate in written["rates"]] == names
    assert all(len(rate["per_core"]) == len(rate["per_host"]) == 2 and min(rate["per_core"]) > 0 for rate in written["rates"])
    assert started == [0, written["cores"]]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:7]] == names
    assert lines[6].split("|")[4].strip() == "1.00 (1.00-1.00)"
    first, torch = written["rates"][0]["per_core"], written["rates"][-1]["per_core"]
    ratio = sorted(a / b for a, b in zip(first, torch, strict=True))
    assert lines[2].split("|")[4].strip() == f"{sum(ratio) / 2:.2f} ({ratio[0]:.2f}-{ratio[1]:.2f})"


@pytest.mark.parametrize(("workers", "wanted"), [(0, [(0, 0), (6, 0)]), (4, [(0, 0), (2, 4)])])
def test_a_hosts_cores_are_shared_by_its_processes(
    workers: int, wanted: list[tuple[int, int]], photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []

    class Recorder:
        def __init__(self, *_: Any, threads: int, workers: int, **__: Any):
            made.append((threads, workers))

        def iterate(self) -> Iterator[None]:
            return iter(())

    monkeypatch.setattr(bench_data, "Pipeline", Recorder)
    reading = bench_data.Reading(f"folder:{photographs}", None, make_transform(()), 32, 4, 1, workers)
    loader = bench_data.pipeline_loader("maskae", open_source(reading.source, "train"), reading)
    loader.start(0)
    loader.start(6)
    assert made == wanted


def test_a_config_gives_source_and_transform(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_data.main(["--config=configs/mae.py:tiny", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "| maskae digits |" in out
    assert "8 pixels, batches of 4" in out
    assert "torch" not in out.splitlines()[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --source (such as folder:photos, or photographs) or --config"),
        (["--source=photographs", "--rounds=0"], "--rounds must be at least 1, not 0"),
        (["--source=photographs", "--workers=-1"], "--workers must not be negative, not -1"),
        (["--source=photographs", "--config.data.channels=1"], "--config.data.channels=1 without --config"),
        (["--source=foldr:x"], "did you mean 'folder'?"),
        (["--source=photographs", "--batch_size=5", "--views=2", "--count=4"], "batch_size 5 cannot be divided"),
        (["--sauce=photographs"], "--sauce"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_data.main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("bench_data: ")
    assert message in error


def test_torchs_loader_follows_torchvisions_recipe(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tensor(np.ndarray):
        def permute(self, *axes: int) -> np.ndarray:
            return self.transpose(axes)

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(as_tensor=lambda array: array.view(Tensor)))
    file = sorted(photographs.iterdir())[0]
    images = torch_loader.ImageFiles([file], 24, (0.999, 1.0))
    whole = np.asarray(Image.open(file).convert("RGB").resize((24, 24), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)
    seen = [images[0] for _ in range(20)]
    errors = [min(np.abs(image - whole).mean(), np.abs(image - whole[..., ::-1]).mean()) for image in seen]
    assert all(image.shape == (3, 24, 24) and image.dtype == np.uint8 for image in seen)
    assert max(errors) < 4
    assert len({bool(np.abs(image - whole).mean() < 4) for image in seen}) == 2, "about half are flipped"
