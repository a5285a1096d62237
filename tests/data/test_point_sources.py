"""`points:`: every file format gives the same cloud, scenes are cut into objects, samples are repeatable, wrong files are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from maskae.data.contract import Source
from maskae.data.point_files import read_points, spread_over
from maskae.data.points import in_unit_ball
from maskae.data.sources import open_source
from maskae.data.spec import BadRecord
from maskae.errors import UserError

CLOUD = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
HEADER = "ply\nformat {form} 1.0\nelement vertex 20\nproperty float x\nproperty uchar red\nproperty float y\nproperty float z\n"
FACE_ELEMENT = "element face 0\nproperty list uchar int vertex_indices\nend_header\n"


def write_every_format(folder: Path) -> list[Path]:
    np.save(folder / "a.npy", np.concatenate([CLOUD, CLOUD], axis=1))
    np.savez(folder / "b.npz", points=CLOUD)
    rows = [f"{x} {y} {z} 7" for x, y, z in CLOUD]
    (folder / "c.txt").write_text("\n".join(rows))
    (folder / "d.xyz").write_text("\n".join(["20", *rows]))
    (folder / "e.csv").write_text("\n".join(["x,y,z,red", *(row.replace(" ", ",") for row in rows)]))
    (folder / "f.ply").write_text((HEADER + FACE_ELEMENT).format(form="ascii") + "\n".join(f"{x} 9 {y} {z}" for x, y, z in CLOUD))
    for name, form, order in (("g", "binary_little_endian", "<"), ("h", "binary_big_endian", ">")):
        packed = np.zeros(20, [("x", f"{order}f4"), ("red", "u1"), ("y", f"{order}f4"), ("z", f"{order}f4")])
        for axis, values in zip("xyz", CLOUD.T, strict=True):
            packed[axis] = values
        (folder / f"{name}.ply").write_bytes((HEADER + FACE_ELEMENT).format(form=form).encode() + packed.tobytes())
    (folder / "i.off").write_text("OFF20 0 0\n" + "\n".join(row[:-2] for row in rows))
    return sorted(folder.iterdir())


def test_every_format_gives_the_same_points(tmp_path: Path) -> None:
    paths = write_every_format(tmp_path)
    assert len(paths) == 9
    for path in paths:
        np.testing.assert_allclose(read_points(path), CLOUD, rtol=1e-6, err_msg=path.name)


def test_points_of_a_mesh_lie_on_its_faces_by_area(tmp_path: Path) -> None:
    text = "OFF\n6 2 0\n0 0 0\n3 0 0\n3 3 0\n0 3 0\n0 0 5\n1 0 5\n4 0 1 2 3\n3 4 5 0\n"
    (tmp_path / "square.off").write_text(text)
    points = read_points(tmp_path / "square.off")
    assert points.shape == (4096, 3)
    flat = np.isclose(points[:, 2], 0)
    assert flat.mean() == pytest.approx(9 / 11.5, abs=0.02)
    np.testing.assert_allclose(points[flat].mean(0), [1.5, 1.5, 0], atol=0.05)
    with pytest.raises(ValueError, match="no area"):
        spread_over(np.zeros((2, 3, 3)), 5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"no array", "no readable point file"),
        ("a.ply", b"ply\nformat strange 1.0\nend_header\n", "not known"),
        ("a.off", b"NOFF", "OFF"),
        ("a.txt", b"1 2\n3 4\n", "point"),
        ("a.txt", b"1 2 nan\n3 4 5\n", "finite"),
    ],
)
def test_wrong_files_are_bad_records(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadRecord, match=message):
        read_points(tmp_path / name)


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Eight scenes of two categories with two objects each, the second of 5 points."""
    label = np.zeros((8, 40), np.uint8)
    label[:, 10:30], label[:, 35:] = 1, 2
    xyz = np.random.default_rng(1).normal(size=(8, 40, 3)).astype(np.float16)
    np.savez(tmp_path / "scenes.npz", xyz=xyz, label=label, category=np.asarray(["cup", "box"] * 4), name=np.arange(8).astype(str))
    return tmp_path


def opened(folder: Path, split: str = "train", name: str = "points:scenes.npz@16") -> Source:
    return open_source(name, split, root=str(folder), val_percent=25.0)


def test_objects_of_scenes_are_records_and_no_scene_is_in_both_splits(scenes: Path) -> None:
    train, val = (opened(scenes, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (12, 4)
    assert train.spec.class_names == ("box", "cup")
    assert train.spec.fields["points"].shape == (16, 3)
    of = [{source.name(i).split()[0] for i in range(len(source))} for source in (train, val)]
    assert not of[0] & of[1]


def test_records_are_in_the_unit_ball_and_repeatable(scenes: Path) -> None:
    source = opened(scenes)
    record = source[0]
    assert record["points"].dtype == np.float32
    np.testing.assert_allclose(record["points"].mean(0), 0, atol=1e-6)
    assert np.linalg.norm(record["points"], axis=1).max() == pytest.approx(1)
    np.testing.assert_array_equal(record["points"], source[0]["points"])
    first, second = (source.sample(0, np.random.default_rng(seed))["points"] for seed in (1, 2))  # type: ignore[attr-defined]
    assert not np.array_equal(first, second)
    assert len(np.unique(source[1]["points"], axis=0)) == 5  # filled up with repetitions
    assert not in_unit_ball(np.ones((4, 3))).any()


def test_archives_of_clouds_with_and_without_a_split(tmp_path: Path) -> None:
    points, label = np.random.default_rng(0).normal(size=(10, 8, 3)), np.arange(10) % 2
    np.savez(tmp_path / "whole.npz", points=points, label=label)
    assert len(opened(tmp_path, "val", "points:whole.npz@4")) == 2
    np.savez(tmp_path / "split.npz", train_points=points, train_label=label, val_points=points[:3], val_label=label[:3])
    assert len(opened(tmp_path, "val", "points:split.npz")) == 3


def test_folders_have_classes(tmp_path: Path) -> None:
    for name in ("cup", "box"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(4):
            np.save(tmp_path / "set" / name / f"{number}.npy", CLOUD)
    source = opened(tmp_path, "train", "points:set@8")
    assert (len(source), source.spec.class_names) == (6, ("box", "cup"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("points:scenes.npz@many", "after an @"), ("points:scene.npz", "did you mean 'scenes.npz'"), ("points:empty", "no point files")],
)
def test_wrong_names_are_answered_in_one_line(scenes: Path, name: str, message: str) -> None:
    (scenes / "empty").mkdir()
    with pytest.raises(UserError, match=message) as raised:
        opened(scenes, name=name)
    assert "\n" not in str(raised.value)
