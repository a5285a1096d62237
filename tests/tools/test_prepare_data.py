"""Preparing ArrayRecord shards: what is read back equals what was put in, and nothing is overwritten."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from maskae.data.contract import measure
from maskae.data.images import Picture
from maskae.data.pipeline import Pipeline
from maskae.data.sources import open_source
from maskae.data.transforms import make_transform
from maskae.errors import UserError

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("maskae_tools_prepare_data", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


prepare_data = load()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """12 images of two classes, 30 to 52 pixels wide."""
    generator = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "photos" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(image).resize((30 + 2 * number, 24)).save(folder / f"{number:02d}.jpg", quality=95)
    return tmp_path / "photos"


def pixels(source: object, index: int) -> np.ndarray:
    return Picture(source[index]["image"], source.spec.channels).read()  # type: ignore[index,attr-defined]


def test_files_are_kept_as_they_are_with_exact_statistics(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_data, "RECORDS_PER_SHARD", 4)
    assert (
        prepare_data.main(["--source", "folder:photos", "--root", str(tmp_path), "--out", str(tmp_path / "out"), "--val_percent=17"]) == 0
    )
    assert len(list((tmp_path / "out").glob("train-*-of-00003.arrayrecord"))) == 3
    for split in ("train", "val"):
        folder = open_source(f"folder:{photos}", split, val_percent=17)
        records = open_source("arrayrecord:out", split, root=str(tmp_path))
        assert len(records) == len(folder) == {"train": 10, "val": 2}[split]
        for i in range(len(folder)):
            assert records[i] == folder[i]
            assert folder.name(i) in records.name(i)
    train = open_source("arrayrecord:out", "train", root=str(tmp_path))
    assert train.spec.class_names == ("cat", "dog")
    assert train.spec.counts == {"train": 10, "val": 2}
    np.testing.assert_allclose((train.spec.mean, train.spec.std), measure([pixels(train, i) for i in range(10)], 3), rtol=1e-9)
    assert pickle.loads(pickle.dumps(train))[3] == train[3]
    batch = Pipeline(train, make_transform((("resize", {"size": 8}),)), batch_size=10, seed=0, shuffle=False).batch(0)
    assert batch["label"].tolist() == [0] * 5 + [1] * 5


def test_larger_images_are_shrunk_and_smaller_ones_are_not(photos: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((10, 50, 3), 90, np.uint8)).save(photos / "cat" / "low.jpg")
    arguments = ["--source", f"folder:{photos}", "--out", str(tmp_path / "out"), "--short_side=16", "--val_percent=0", "--format=png"]
    assert prepare_data.main(arguments) == 0
    train = open_source(f"arrayrecord:{tmp_path}/out", "train")
    sizes = {pixels(train, i).shape[:2] for i in range(len(train))}
    assert (10, 50) in sizes
    assert {size[0] for size in sizes} == {10, 16}
    assert (16, 20) in sizes, "30 x 24 pixels shrunk to a short side of 16"
    with pytest.raises(UserError, match=r"no shards of split 'val' .* which has train"):
        open_source(f"arrayrecord:{tmp_path}/out", "val")


def test_arrays_survive_exactly(tmp_path: Path) -> None:
    assert prepare_data.main(["--source", "digits", "--out", str(tmp_path / "out")]) == 0
    digits, records = open_source("digits", "val"), open_source(f"arrayrecord:{tmp_path}/out", "val")
    assert records.spec.max_value == 16
    np.testing.assert_allclose(records.spec.std, digits.spec.std, rtol=1e-9)
    for i in (0, 100, 359):
        np.testing.assert_array_equal(pixels(records, i), digits[i]["image"])


def test_broken_images_are_left_out_and_listed(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = photos / "cat" / "00.jpg"
    victim.write_bytes(victim.read_bytes()[:-200])
    assert prepare_data.main(["--source", f"folder:{photos}", "--out", str(tmp_path / "out"), "--val_percent=0"]) == 1
    listed = (tmp_path / "out" / "broken.txt").read_text()
    assert listed == f"{victim}\ttruncated JPEG: no end marker\n"
    assert f"broken: {victim}" in capsys.readouterr().err
    assert len(open_source(f"arrayrecord:{tmp_path}/out", "train")) == 11
    assert json.loads((tmp_path / "out" / "prepare.json").read_text())["broken"] == 1


def test_nothing_is_overwritten_and_nothing_half_made_is_left_under_the_name(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    arguments = ["--source", f"folder:{photos}", "--out", str(tmp_path / "out")]
    assert prepare_data.main(arguments) == 2
    assert f"{tmp_path / 'out'} exists already" in capsys.readouterr().err
    (tmp_path / "out").rmdir()
    for file in photos.rglob("*.jpg"):
        file.write_text("words")
    assert prepare_data.main([*arguments[:2], "--out", str(tmp_path / "new"), "--val_percent=0"]) == 2
    assert "not one image can be read" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "foldr:x"], "did you mean 'folder'"),
        (["--source", "digits", "--quality=0"], "--quality must be within 1..100"),
        (["--source", "digits", "--short_side=0"], "--short_side must be at least 1"),
        (["--sauce", "digits"], "--source"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_data.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_damaged_and_incomplete_copies_are_noticed(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert prepare_data.main(["--source", f"folder:{photos}", "--out", str(out), "--val_percent=0"]) == 0
    (out / "spec.json").write_text((out / "spec.json").read_text().replace('"train": 12', '"train": 13'))
    with pytest.raises(UserError, match=r"12 records, but spec\.json says 13: the copy is incomplete"):
        open_source(f"arrayrecord:{out}", "train")
    (out / "train-00000-of-00001.arrayrecord").rename(out / "train-00000-of-00002.arrayrecord")
    with pytest.raises(UserError, match="1 of 2 shards of split 'train'"):
        open_source(f"arrayrecord:{out}", "train")
