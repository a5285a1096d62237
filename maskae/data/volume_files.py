"""Volumes with their masks, from .npz and NIfTI files.

    FILE.npz         arrays NAME [X, Y, Z], and where there are such NAME_seg (whole numbers, 0 outside) and NAME_spacing [3] in mm
    NAME.nii(.gz)    NIfTI-1 or NIfTI-2, and beside it NAME_seg.nii(.gz)

Values are in the units of the scanner (Hounsfield units for CT), axes as stored (RAS where the set says so).
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from maskae.errors import UserError, describe

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Image

MASK, SPACING = "_seg", "_spacing"
ENDINGS = (".nii.gz", ".nii")
# A header's code of the unit of length: unknown, metres, millimetres, microns.
MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}


class Volume(NamedTuple):
    """`values` [X, Y, Z] of any number type, `mask` whole numbers of that shape or None, `spacing` float32 [3] in mm."""

    name: str
    values: np.ndarray
    mask: np.ndarray | None
    spacing: np.ndarray


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(values [X, Y, Z], spacing float32 [3] in mm) of a NIfTI-1 or NIfTI-2 file of one part; axes of one value are left out.

    Values that the header scales are float32, others have the file's type. A header without a unit of length means mm. Raises UserError for
    other files and those that are not whole.
    """
    import nibabel  # only runs on volumes need it
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    try:
        found = nibabel.load(path)
        if not isinstance(found, nibabel.Nifti1Image):  # NIfTI-2's is one, too
            raise UserError(f"{path} is no NIfTI file of one part (.nii or .nii.gz), but a {type(found).__name__}")
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            image = found.from_stream(stream)
            values = _values(image, path)
            while stream.read(1 << 20):  # gzip compares its checksum at the end, which may lie behind the values
                pass
    except (ImageFileError, HeaderDataError, WrapStructError, OSError, EOFError, ValueError, zlib.error, MemoryError) as error:
        raise UserError(f"{path} cannot be read as a whole NIfTI file: {describe(error)}") from error
    return values, _spacing(image, path)


def _values(image: Nifti1Image, path: Path) -> np.ndarray:
    """The values [X, Y, Z], scaled as the header says, read plane by plane: no second volume is held. Raises UserError."""
    axes, kind = _axes(image), image.get_data_dtype()
    stored: Any = image.dataobj
    if len(axes) != 3 or not all(image.shape) or kind.kind not in "iuf":
        raise UserError(f"{path}: a volume has three axes and a plain number type, not the axes {list(image.shape)} and type {kind}")
    scaled = (stored.slope, stored.inter) != (1, 0)
    values = np.empty([image.shape[axis] for axis in axes], np.float32 if scaled else kind.newbyteorder("="), order="F")
    for place in range(values.shape[2]):
        values[..., place] = np.squeeze(stored[(slice(None),) * axes[2] + (place,)])
    return values


def _spacing(image: Nifti1Image, path: Path) -> np.ndarray:
    """float32 [3] in mm. Raises UserError for a unit of length that NIfTI does not have."""
    code = int(image.header["xyzt_units"]) % 8
    if code not in MILLIMETRES:
        raise UserError(f"{path}: its unit of length has the code {code}; NIfTI knows 1 (metre), 2 (millimetre) and 3 (micron)")
    return np.asarray(image.header.get_zooms(), np.float32)[_axes(image)] * np.float32(MILLIMETRES[code])


def _axes(image: Nifti1Image) -> list[int]:
    """The axes with more than one value."""
    return [axis for axis, size in enumerate(image.shape) if size != 1]


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
