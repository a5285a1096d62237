"""Volumes and their slices: NIfTI and npz files, the stretch, organs and the split by slices."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from maskae.data.slices import GAP, MIN_SLICES, hounsfield_units, organ_square, stretch
from maskae.data.sources import open_source
from maskae.data.volume_files import read_nifti, read_volumes
from maskae.errors import UserError


def nifti_bytes(values: np.ndarray, order: str, slope: float = 0.0, offset: float = 0.0) -> bytes:
    """A NIfTI-1 file of int16 values, from the format's definition alone."""
    header = bytearray(352)
    struct.pack_into(f"{order}i", header, 0, 348)
    struct.pack_into(f"{order}8h", header, 40, values.ndim, *values.shape, *([1] * (7 - values.ndim)))
    struct.pack_into(f"{order}2h", header, 70, 4, 16)
    struct.pack_into(f"{order}4f", header, 76, 1.0, 3.0, 2.0, 1.5)
    struct.pack_into(f"{order}3f", header, 108, 352.0, slope, offset)
    header[344:348] = b"n+1\0"
    return bytes(header) + values.astype(f"{order}i2").tobytes(order="F")


def write_nifti(path: Path, values: np.ndarray, unit: str = "mm", kind: type = nibabel.Nifti1Image) -> None:
    """A file by nibabel, voxels of 3 x 2 x 1.5 `unit`."""
    image = kind(values, np.diag([3.0, 2.0, 1.5, 1.0]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, path)


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
    def write(slope: float, offset: float) -> None:
        raw = nifti_bytes(volume[0], order, slope, offset)
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)

    for identity in ((0.0, 0.0), (0.0, 7.0), (1.0, 0.0)):
        write(*identity)
        values, spacing = read_nifti(tmp_path / name)
        assert values.dtype == np.int16 and values.dtype.isnative and spacing.dtype == np.float32
        np.testing.assert_array_equal(values, volume[0])
        np.testing.assert_array_equal(spacing, [3.0, 2.0, 1.5])
    write(2.0, -5.0)
    values = read_nifti(tmp_path / name)[0]
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, 2.0 * volume[0] - 5.0)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", "float64"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_both_versions_keep_the_type_and_lose_axes_of_one_value(tmp_path: Path, kind: type, dtype: str) -> None:
    stored = (np.random.default_rng(0).random((6, 5, 4)) * 200).astype(dtype)
    for number, shape in enumerate([(6, 5, 4), (6, 5, 4, 1), (6, 5, 4, 1, 1)]):
        write_nifti(tmp_path / f"{number}.nii.gz", stored.reshape(shape), kind=kind)
        values, spacing = read_nifti(tmp_path / f"{number}.nii.gz")
        assert values.dtype == dtype
        np.testing.assert_array_equal(values, stored)
        np.testing.assert_array_equal(spacing, [3.0, 2.0, 1.5])
    write_nifti(tmp_path / "first.nii", stored[None], kind=kind)
    values, spacing = read_nifti(tmp_path / "first.nii")
    np.testing.assert_array_equal(values, stored)
    np.testing.assert_array_equal(spacing, [2.0, 1.5, 1.0])  # of the axes that are kept


@pytest.mark.parametrize(("unit", "factor"), [("unknown", 1.0), ("meter", 1000.0), ("mm", 1.0), ("micron", 0.001)])
def test_the_spacing_is_in_millimetres_whatever_the_unit(tmp_path: Path, volume: tuple[np.ndarray, ...], unit: str, factor: float) -> None:
    write_nifti(tmp_path / "a.nii", volume[0], unit)
    np.testing.assert_allclose(read_nifti(tmp_path / "a.nii")[1], np.asarray([3.0, 2.0, 1.5]) * factor)


def test_a_unit_that_nifti_does_not_have_is_named(tmp_path: Path, volume: tuple[np.ndarray, ...]) -> None:
    raw = bytearray(nifti_bytes(volume[0], "<"))
    raw[123] = 5
    (tmp_path / "a.nii").write_bytes(raw)
    with pytest.raises(UserError, match="a.nii: its unit of length has the code 5"):
        read_nifti(tmp_path / "a.nii")


def damaged(raw: bytes) -> bytes:
    """A gzip file with a wrong checksum of its contents: all of them can be unpacked."""
    packed = bytearray(gzip.compress(raw))
    packed[-8] ^= 1
    return bytes(packed)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("text.nii", lambda raw: b"not a header" * 40, "cannot be read as a whole NIfTI file"),
        ("empty.nii", lambda raw: b"", "Empty file"),
        ("header.nii", lambda raw: raw[:200], "cannot be read as a whole NIfTI file"),
        ("short.nii", lambda raw: raw[:-100], "not enough data"),
        ("short.nii.gz", lambda raw: gzip.compress(raw[:-100]), "not enough data"),
        ("cut.nii.gz", lambda raw: gzip.compress(raw)[:-100], "ended before the end"),
        ("damaged.nii.gz", damaged, "CRC check failed"),
        ("plain.nii.gz", lambda raw: raw, "is not a gzip file"),
        ("header_of_two.nii", lambda raw: raw[:344] + b"ni1\0" + raw[348:352], "not enough data"),
        ("huge.nii", lambda raw: raw[:42] + b"\xff\x7f" * 3 + raw[48:], "cannot be read as a whole NIfTI file"),
    ],
)
def test_files_that_are_none_or_not_whole_are_one_line(
    tmp_path: Path, volume: tuple[np.ndarray, ...], name: str, change: Callable[[bytes], bytes], said: str
) -> None:
    (tmp_path / name).write_bytes(change(nifti_bytes(volume[0], "<")))
    with pytest.raises(UserError, match=said) as caught:
        read_nifti(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_images_that_are_no_volumes_are_named(tmp_path: Path, volume: tuple[np.ndarray, ...]) -> None:
    for name, values in (("plane", volume[0][0]), ("film", np.zeros((3, 4, 5, 6), np.int16)), ("phase", volume[0].astype(np.complex64))):
        write_nifti(tmp_path / f"{name}.nii", values)
        with pytest.raises(UserError, match=f"{name}.nii: a volume has three axes and a plain number type"):
            read_nifti(tmp_path / f"{name}.nii")
    nibabel.save(nibabel.MGHImage(volume[0], np.eye(4)), tmp_path / "a.mgz")
    (tmp_path / "a.mgz").rename(tmp_path / "a.nii.gz")
    with pytest.raises(UserError, match="a.nii.gz (is no|cannot be read as a whole) NIfTI file"):
        read_nifti(tmp_path / "a.nii.gz")


def test_wrong_archives_and_masks_are_named(tmp_path: Path, volume: tuple[np.ndarray, ...]) -> None:
    (tmp_path / "b.npz").write_text("text")
    with pytest.raises(UserError, match="neither an .npz of plain arrays nor a NIfTI file"):
        read_volumes(tmp_path / "b.npz", "organs:b.npz")
    np.savez(tmp_path / "c.npz", a=volume[0], a_seg=volume[1][:5])
    with pytest.raises(UserError, match="the mask of a must hold whole numbers in its shape"):
        read_volumes(tmp_path / "c.npz", "organs:c.npz")
    write_nifti(tmp_path / "d.nii", volume[0])
    write_nifti(tmp_path / "d_seg.nii.gz", volume[1].astype(np.float32))
    with pytest.raises(UserError, match="the mask of d must hold whole numbers in its shape, not float32"):
        read_volumes(tmp_path / "d.nii", "organs:d.nii")


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
    write_nifti(folder / "one_seg.nii.gz", volume[1])
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
