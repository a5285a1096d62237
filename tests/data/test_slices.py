"""Volumes and their slices: NIfTI and npz files, the stretch, organs and the split by slices."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from maskae.data.slices import GAP, MIN_SLICES, hounsfield_units, organ_square, stretch
from maskae.data.sources import open_source
from maskae.data.volume_files import read_nifti, read_volumes
from maskae.errors import UserError


def write_nifti(path: Path, values: np.ndarray, *, code: int = 4, order: str = "<", slope: float = 0.0, offset: float = 0.0) -> None:
    """A NIfTI-1 file of one part."""
    header = bytearray(352)
    struct.pack_into(f"{order}i", header, 0, 348)
    struct.pack_into(f"{order}8h", header, 40, values.ndim, *values.shape, *([1] * (7 - values.ndim)))
    struct.pack_into(f"{order}h", header, 70, code)
    struct.pack_into(f"{order}4f", header, 76, 1.0, 3.0, 2.0, 1.5)
    struct.pack_into(f"{order}3f", header, 108, 352.0, slope, offset)
    header[344:348] = b"n+1\0"
    raw = bytes(header) + values.astype(values.dtype.newbyteorder(order)).tobytes(order="F")
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def volume() -> tuple[np.ndarray, np.ndarray]:
    """A volume [10, 12, 40] and a mask with an organ in 32 slices and one in too few."""
    values = np.random.default_rng(0).integers(-1000, 1000, (10, 12, 40)).astype(np.int16)
    mask = np.zeros(values.shape, np.uint8)
    mask[2:6, 3:9, 4:36] = 7
    mask[0, 0, : MIN_SLICES - 1] = 3
    return values, mask


@pytest.mark.parametrize(("name", "order"), [("a.nii", "<"), ("a.nii.gz", ">")])
def test_nifti_files_are_read_in_both_byte_orders_and_scaled(tmp_path: Path, volume: tuple[np.ndarray, ...], name: str, order: str) -> None:
    write_nifti(tmp_path / name, volume[0], order=order)
    values, spacing = read_nifti(tmp_path / name)
    np.testing.assert_array_equal(values, volume[0])
    np.testing.assert_array_equal(spacing, [3.0, 2.0, 1.5])
    write_nifti(tmp_path / "b.nii", volume[0], slope=2.0, offset=-5.0)
    np.testing.assert_array_equal(read_nifti(tmp_path / "b.nii")[0], 2.0 * volume[0] - 5.0)


def test_wrong_files_are_named(tmp_path: Path, volume: tuple[np.ndarray, ...]) -> None:
    (tmp_path / "a.nii").write_bytes(b"not a header" * 40)
    with pytest.raises(UserError, match="no NIfTI-1 file"):
        read_nifti(tmp_path / "a.nii")
    write_nifti(tmp_path / "short.nii", volume[0])
    (tmp_path / "short.nii").write_bytes((tmp_path / "short.nii").read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short"):
        read_nifti(tmp_path / "short.nii")
    (tmp_path / "b.npz").write_text("text")
    with pytest.raises(UserError, match="neither an .npz of plain arrays nor a NIfTI file"):
        read_volumes(tmp_path / "b.npz", "organs:b.npz")
    np.savez(tmp_path / "c.npz", a=volume[0], a_seg=volume[1][:5])
    with pytest.raises(UserError, match="the mask of a must hold whole numbers in its shape"):
        read_volumes(tmp_path / "c.npz", "organs:c.npz")


def test_organs_are_labelled_and_split_with_a_gap(tmp_path: Path, volume: tuple[np.ndarray, ...]) -> None:
    np.savez(tmp_path / "v.npz", ct_a=volume[0], ct_a_seg=volume[1], mr=volume[0])
    train, val = (open_source("organs:v.npz#ct_", split, root=str(tmp_path), statistics="unit") for split in ("train", "val"))
    assert (len(train), len(val)) == (24, 8 - GAP)
    assert train.spec.num_classes == 1 and train.spec.class_names == ("organ 7",) and train.spec.mean == (0.0,)
    last = max(int(train.name(i).split()[-1]) for i in range(len(train)))
    assert min(int(val.name(i).split()[-1]) for i in range(len(val))) == last + 1 + GAP
    assert train[0]["image"].dtype == np.uint8 and train[0]["image"].shape[-1] == 1
    three = open_source("organs:v.npz#ct_", "train", root=str(tmp_path), channels=3)
    assert three[0]["image"].shape[-1] == 3
    with pytest.raises(UserError, match="no volume begins with 'pet'.*there are ct_a, mr"):
        open_source("organs:v.npz#pet", "train", root=str(tmp_path))
    with pytest.raises(UserError, match="no organ is seen in"):
        open_source("organs:v.npz#mr", "train", root=str(tmp_path))


def test_slices_come_from_all_directions_and_a_window_is_absolute(tmp_path: Path, volume: tuple[np.ndarray, ...]) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    write_nifti(folder / "one.nii.gz", volume[0])
    write_nifti(folder / "one_seg.nii.gz", volume[1], code=2)
    both = [open_source("slices:scans", split, root=str(tmp_path)) for split in ("train", "val")]
    assert len(both[0]) + len(both[1]) == 10 + 12 + 40 and len(both[1]) > 0 and both[0].spec.num_classes is None
    assert all(int(both[0][i]["image"].max()) == 255 and int(both[0][i]["image"].min()) == 0 for i in range(5))
    fixed = open_source("slices:scans#@-160:240", "train", root=str(tmp_path))
    expected = np.rint(np.clip((np.rot90(volume[0][0]).astype(float) + 160) / 400, 0, 1) * 255)
    np.testing.assert_array_equal(fixed[0]["image"][..., 0], expected)
    with pytest.raises(UserError, match="the window '3' is not LOW:HIGH"):
        open_source("slices:scans#@3", "train", root=str(tmp_path))


def test_values_to_pictures() -> None:
    stored = np.asarray([[-2000, 0], [1024, 3071]], np.int16)
    units = hounsfield_units(stored, 1, -1024)
    np.testing.assert_array_equal(units, [[-1024, -1024], [0, 2047]])
    np.testing.assert_allclose(stretch(units), [[0, 0], [255 * 1024 / 3071, 255]])
    assert stretch(np.ones((2, 2))).max() == 0
    mask = np.zeros((40, 60), bool)
    mask[10:14, 20:50] = True
    rows, columns = organ_square(mask)
    assert (rows.start, rows.stop) == (0, 34) and (columns.start, columns.stop) == (12, 58)
