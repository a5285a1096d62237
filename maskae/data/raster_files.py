"""Rasters of many bands from GeoTIFF and other TIFF files; a folder of files with one band each is a raster, too.

    NAME.tif                     all bands, in planes or pixel by pixel
    NAME/B1.tif  NAME/B2.tif ... one band each: B2 before B10, B8A after B8; bands of larger pixels are resized, linearly, to the smallest

What the file calls no data (GDAL's tag) and what is no finite number is missing, and NaN; uint8 is as stored.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import cv2
import numpy as np
import tifffile

from maskae.data.spec import BadRecord

SUFFIXES = (".tif", ".tiff")
GDAL_NODATA = 42113
MOST_COMPRESSION = 2000  # bytes of values to a byte of the file: above what deflate and LZW reach

# It tells of odd metadata once per reading of a file; what makes a file unreadable is raised.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


def natural_order(name: str) -> list[int | str]:
    """A key by which numbers in names are sorted by value."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def raster_entries(root: Path, folder: str) -> list[str]:
    """Names of the TIFF files and the folders in `root / folder`, in natural order; those that start with a dot are passed over.

    Raises BadRecord where there are none.
    """
    try:
        with os.scandir(root / folder) as entries:
            found = [each.name for each in entries if each.name.lower().endswith(SUFFIXES) or each.is_dir()]
    except OSError as error:
        raise BadRecord(f"{folder}: {error.strerror or error}") from error
    names = [name for name in found if not name.startswith(".")]
    if not names:
        raise BadRecord(f"{folder}: no .tif or .tiff in the folder")
    return sorted(names, key=natural_order)


def read_raster(root: Path, file: str) -> np.ndarray:
    """The file or folder of bands `root / file`: uint8 [H, W, c] as stored, or float32 [H, W, c] with NaN where a value is missing.

    Raises BadRecord, which names the file below `root`, where it cannot be read.
    """
    if not (root / file).is_dir():
        return _read_file(root / file, file)
    bands = [_read_band(root / file / name, f"{file}/{name}") for name in raster_entries(root, file)]
    height, width = max(band.shape for band in bands)
    return np.stack([_resize(band, height, width) for band in bands], axis=-1)


def _read_band(path: Path, file: str) -> np.ndarray:
    raster = _read_file(path, file)
    if raster.shape[-1] != 1:
        raise BadRecord(f"{file}: {raster.shape[-1]} bands, where a folder's files hold one each")
    return raster[..., 0]


def _resize(band: np.ndarray, height: int, width: int) -> np.ndarray:
    return band if band.shape == (height, width) else cv2.resize(band, (width, height), interpolation=cv2.INTER_LINEAR)


def _read_file(path: Path, file: str) -> np.ndarray:
    try:
        with tifffile.TiffFile(path) as opened:
            series = opened.series[0]
            if series.nbytes > MOST_COMPRESSION * path.stat().st_size:
                raise ValueError(f"{series.shape} values in so small a file")  # a wrong header must not take all memory
            # One thread: the records of a batch are read side by side already.
            axes, values = series.axes, series.asarray(maxworkers=1)
            missing = float(opened.pages.first.tags.valueof(GDAL_NODATA, default="nan"))
    # What a damaged file raises depends on where the damage is.
    except Exception as error:
        hint = ": pip install 'maskae[rasters]'" if "imagecodecs" in str(error) else ""
        raise BadRecord(f"{file}: no readable TIFF file: {' '.join(str(error).split())}{hint}") from error
    if values.dtype.kind not in "uif":
        raise BadRecord(f"{file}: {values.dtype} values, where plain numbers are read")
    values = _bands_last(values, axes, file)
    return values if values.dtype == np.uint8 else _with_nan(values, missing)


def _bands_last(values: np.ndarray, axes: str, file: str) -> np.ndarray:
    """[H, W, c] by the names of the axes: rows Y, columns X, and the bands under any other name (samples, planes or pages)."""
    bands = axes.replace("Y", "").replace("X", "")
    if len(bands) > 1 or not len(axes) == len(bands) + 2 == values.ndim:
        raise BadRecord(f"{file}: the axes {axes} of {values.shape} values, where rows, columns and bands are read")
    ordered = values.transpose([axes.index(axis) for axis in "YX" + bands])
    return ordered if bands else ordered[..., None]


def _with_nan(values: np.ndarray, missing: float) -> np.ndarray:
    # What float32 cannot hold is infinite then, which is missing as well.
    with np.errstate(over="ignore"):
        raster = values.astype(np.float32)
        raster[~np.isfinite(raster) | (raster == np.float32(missing))] = np.nan
    return raster
