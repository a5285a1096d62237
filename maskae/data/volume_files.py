"""Volumes with their masks, from .npz and NIfTI-1 files (nifti.nimh.nih.gov/nifti-1: header of 348 bytes, then the values).

    FILE.npz         arrays NAME [X, Y, Z], and where there are such NAME_seg (whole numbers, 0 outside) and NAME_spacing [3] in mm
    NAME.nii(.gz)    and beside it NAME_seg.nii(.gz)

Values are in the units of the scanner (Hounsfield units for CT), axes as stored (RAS where the set says so).
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from maskae.errors import UserError

MASK, SPACING = "_seg", "_spacing"
ENDINGS = (".nii.gz", ".nii")
HEADER = 348
# NIfTI's codes of the plain types.
TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4"}


class Volume(NamedTuple):
    """`values` [X, Y, Z] of any number type, `mask` whole numbers of that shape or None, `spacing` float32 [3] in mm."""

    name: str
    values: np.ndarray
    mask: np.ndarray | None
    spacing: np.ndarray


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(values [X, Y, Z], spacing float32 [3] in mm) of a NIfTI-1 file, scaled as its header says. Raises UserError for other files."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    order = next((each for each in "<>" if len(raw) >= HEADER and struct.unpack(f"{each}i", raw[:4])[0] == HEADER), None)
    if order is None or raw[344:347] != b"n+1":
        raise UserError(f"{path} is no NIfTI-1 file of one part (.nii or .nii.gz)")
    shape = struct.unpack(f"{order}8h", raw[40:56])
    code = struct.unpack(f"{order}h", raw[70:72])[0]
    spacing = np.asarray(struct.unpack(f"{order}8f", raw[76:108])[1:4], np.float32)
    start, slope, offset = struct.unpack(f"{order}3f", raw[108:120])
    sizes = [size for size in shape[1 : shape[0] + 1] if size != 1]
    if len(sizes) != 3 or code not in TYPES:
        raise UserError(f"{path}: a volume has three axes and a plain number type, not the axes {sizes} and type {code}")
    kind = np.dtype(order + TYPES[code])
    if len(raw) < int(start) + int(np.prod(sizes)) * kind.itemsize:
        raise UserError(f"{path} is cut short: {len(raw)} bytes do not hold {' x '.join(map(str, sizes))} values")
    values = np.frombuffer(raw, kind, int(np.prod(sizes)), int(start)).reshape(sizes, order="F")
    if slope not in (0.0, 1.0) or (slope and offset):
        values = values.astype(np.float32) * np.float32(slope) + np.float32(offset)
    return values.astype(values.dtype.newbyteorder("=")), spacing


def stem(path: Path) -> str:
    """A NIfTI file's name without its ending."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def read_volumes(path: Path, name: str) -> list[Volume]:
    """All volumes of an .npz, a NIfTI file or a folder of NIfTI files, in the order of their names; `name` is what errors call it.

    Raises:
        UserError: other files, no volume at all, or a mask of another shape than its volume.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS))
        volumes = [_from_nifti(file) for file in files if not stem(file).endswith(MASK)]
    elif path.name.endswith(ENDINGS):
        volumes = [_from_nifti(path)]
    else:
        volumes = _from_npz(path, name)
    if not volumes:
        raise UserError(f"{name}: no volume in {path}; it reads arrays [X, Y, Z] of an .npz, and .nii or .nii.gz files")
    for volume in volumes:
        if volume.mask is not None and (volume.mask.shape != volume.values.shape or volume.mask.dtype.kind not in "iu"):
            shapes = f"{volume.mask.dtype} {volume.mask.shape} for {volume.values.shape}"
            raise UserError(f"{name}: the mask of {volume.name} must hold whole numbers in its shape, not {shapes}")
    return volumes


def _from_nifti(path: Path) -> Volume:
    values, spacing = read_nifti(path)
    masks = [file for ending in ENDINGS if (file := path.with_name(f"{stem(path)}{MASK}{ending}")).is_file()]
    return Volume(stem(path), values, read_nifti(masks[0])[0] if masks else None, spacing)


def _from_npz(path: Path, name: str) -> list[Volume]:
    try:
        with np.load(path, allow_pickle=False) as loaded:
            arrays = {key: loaded[key] for key in loaded.files}
    except (ValueError, OSError, BadZipFile, AttributeError, TypeError, EOFError) as error:
        raise UserError(f"{name}: {path} is neither an .npz of plain arrays nor a NIfTI file: {error}") from error
    plain = sorted(key for key, array in arrays.items() if array.ndim == 3 and not key.endswith(MASK))
    return [Volume(key, arrays[key], arrays.get(key + MASK), arrays.get(key + SPACING, np.ones(3, np.float32))) for key in plain]
