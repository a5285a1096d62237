"""Archives of images, images as two sensors, and Sentinel pairs: what a record is, what stays together, and what is refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskae.data.sensor_scale import ClippedScale
from maskae.data.sensors import OPTICAL, RADAR, luminance_and_energy
from maskae.data.sources import open_source
from maskae.errors import UserError


def write_archive(folder: Path, rows: list[tuple[str, int, str]], columns: str = "file,label,class,split") -> Path:
    """An archive of noisy 20 x 12 pictures."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name, _, _ in rows:
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 255, (12, 20, 3), np.uint8)).save(buffer, "PNG")
            archive.writestr(name, buffer.getvalue())
    lines = [f"{name},{label},c{label},{split}" for name, label, split in rows]
    (folder / "labels.csv").write_text("\n".join([columns, *lines]) + "\n")
    return folder


ROWS = [("a/1.png", 0, "train"), ("a/2.png", 0, "test"), ("b/1.png", 1, "train"), ("b/2.png", 1, "test")]


def test_archive_follows_its_table(tmp_path: Path) -> None:
    write_archive(tmp_path / "set", ROWS)
    train, val = (open_source("archive:set", split, root=str(tmp_path)) for split in ("train", "val"))
    assert [train[i]["label"] for i in range(len(train))] == [0, 1]
    assert val.name(0).endswith("images.zip:a/2.png")
    assert Image.open(io.BytesIO(val[1]["image"])).size == (20, 12)
    assert (train.spec.class_names, train.spec.counts) == (("c0", "c1"), {"train": 2, "val": 2})


def test_archive_names_what_is_wrong(tmp_path: Path) -> None:
    folder = write_archive(tmp_path / "set", ROWS)
    table = (folder / "labels.csv").read_text()
    for text, message in (
        (table.replace("file,label", "file,lable"), "no column 'label' \\(did you mean 'lable'"),
        (table.replace("a/2.png,0", "a/2.png,cat"), "the label of a/2.png is 'cat'"),
        (table + "c/9.png,0,c0,train\n", "1 files of labels.csv are not in .*for example c/9.png"),
    ):
        (folder / "labels.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            open_source("archive:set", "train", root=str(tmp_path))
    (write_archive(tmp_path / "broken", ROWS) / "images.zip").write_bytes(b"no")
    with pytest.raises(UserError, match="is no zip file"):
        open_source("archive:broken", "train", root=str(tmp_path))


def test_range_is_two_deviations_around_the_mean() -> None:
    values = np.random.default_rng(0).normal([10.0, -3.0], [2.0, 0.5], (100, 100, 2))
    scale = ClippedScale.measured([values])
    np.testing.assert_allclose(scale.low, [6.0, -4.0], atol=0.1)
    np.testing.assert_allclose(scale.high, [14.0, -2.0], atol=0.1)
    np.testing.assert_array_equal(scale(np.asarray([[-99.0, -3.0], [99.0, 99.0]]))[:, 0], [0, 255])
    assert abs(int(scale(np.asarray([[10.0, -3.0]]))[0, 1]) - 127) <= 2


def test_second_sensor_is_luminance_and_gradient_energy() -> None:
    ramp = np.repeat(np.arange(8)[None, :, None] * 10, 8, 0).repeat(3, 2).astype(np.uint8)
    found = luminance_and_energy(ramp)
    np.testing.assert_allclose(found[..., 0], ramp[..., 0], rtol=1e-5)
    np.testing.assert_allclose(found[..., 1], 10, rtol=1e-5)
    np.testing.assert_allclose(luminance_and_energy(np.full((4, 4, 3), 7, np.uint8))[..., 1], 0, atol=1e-4)


def test_images_become_two_sensors(tmp_path: Path) -> None:
    write_archive(tmp_path / "set", ROWS)
    source = open_source("two_sensor:set@8", "val", root=str(tmp_path))
    record = source[1]
    assert (record[OPTICAL].shape, record[RADAR].shape, record["label"]) == ((8, 8, 3), (8, 8, 2), 1)
    assert {str(field) for field in source.spec.fields.values()} == {"uint8[8,8,3]", "uint8[8,8,2]"}
    assert not source.spec.has_images
    with pytest.raises(UserError, match="after the @"):
        open_source("two_sensor:set@x", "val", root=str(tmp_path))


def write_pairs(path: Path, side: int = 8) -> None:
    """Six places whose pixel values say where they lie."""
    place, row, column = np.meshgrid(np.arange(6), np.arange(side), np.arange(side), indexing="ij")
    code = (place * 100 + row * 10 + column).astype(np.float32)
    np.savez(path, s1=np.stack([code, -code], 1), s2=np.stack([code] * 3, 1).astype(np.uint16), y=np.eye(6, dtype=np.uint8))


def test_windows_of_pairs_are_the_same_in_both_sensors(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.npz")
    train, val = (open_source("sentinel_pairs:pairs.npz@4", split, root=str(tmp_path), val_percent=34) for split in ("train", "val"))
    assert (len(train), len(val)) == (4 * 9, 2 * 9)
    assert not set(np.asarray(train.places)) & set(np.asarray(val.places))
    generator = np.random.default_rng(0)
    drawn = [train.sample(10, generator) for _ in range(20)]
    for record in [train[0], train[35], *drawn]:
        np.testing.assert_allclose(record[OPTICAL][..., 0], record[RADAR][..., 0], atol=1)
    assert len({record[OPTICAL].tobytes() for record in drawn}) > 5
    np.testing.assert_array_equal(drawn[0]["labels"], np.eye(6)[train.places[1]])
    again = train.sample(10, np.random.default_rng(0))
    np.testing.assert_array_equal(again[OPTICAL], drawn[0][OPTICAL])


def test_wrong_pairs_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz", images=np.zeros((2, 4, 4)))
    np.savez(tmp_path / "other.npz", s1=np.zeros((2, 2, 4, 4)), s2=np.zeros((3, 2, 4, 4)))
    write_pairs(tmp_path / "pairs.npz")
    for source, message in (
        ("none.npz", "no array 's1'"),
        ("other.npz", "are not of the same places"),
        ("pairs.npz@9", "a window of 9 pixels does not fit into rasters of 8"),
        ("pears.npz", "did you mean 'pairs.npz'"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(f"sentinel_pairs:{source}", "train", root=str(tmp_path))


def test_a_folder_of_places_keeps_seasons_together(tmp_path: Path) -> None:
    folder = tmp_path / "places"
    (folder / "deep").mkdir(parents=True)
    for place in range(5):
        code = np.arange(4 * 36, dtype=np.uint8).reshape(4, 1, 6, 6) + place
        seasons = code if place else code[0]
        np.savez(folder / ("deep" if place % 2 else "") / f"{place}.npz", s1=seasons, s2=np.concatenate([seasons] * 2, -3))
    train, val = (open_source("sentinel_pairs:places@4", split, root=str(tmp_path), val_percent=20) for split in ("train", "val"))
    assert (len(train), len(val)) == (4, 1)
    assert val[0][OPTICAL].shape == (4, 4, 2)
    drawn = [train.sample(2, np.random.default_rng(i)) for i in range(30)]
    for record in drawn:
        np.testing.assert_array_equal(record[OPTICAL][..., :1], record[RADAR])
    assert len({int(record[RADAR][0, 0, 0]) // 36 for record in drawn}) == 4
    np.savez(folder / "0.npz", s1=np.zeros((2, 1, 6, 6)), s2=np.zeros((2, 1, 6, 6)))
    with pytest.raises(UserError, match="0.npz: .*must be uint8"):
        open_source("sentinel_pairs:places", "train", root=str(tmp_path))
