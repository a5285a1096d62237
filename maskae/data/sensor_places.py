"""A folder of places seen by two sensors, read when they are needed: the form for sets too large for memory (SSL4EO-S12).

    PATH/0000001.npz       s1 uint8 [seasons, c, H, W] and s2 uint8 [seasons, C, H, W], scaled as `maskae.data.sensor_scale` says; a single
                           season may lack the first axis; in subfolders too
    PATH/s1/0000001.tif    and s2/0000001.tif: a raster of many bands from each sensor (also .tiff), of the same pixels
    PATH/s1/0000001/...    and s2/0000001/...: a raster for every season, in the order of the dates (YYYYMMDD) in their names, else of the
                           names; each a file, or a folder with a file for every band (`maskae.data.raster_files`). So SSL4EO-S12 is read as
                           it comes, its s2a or s2c called s2.

Rasters of uint8 are taken as they are. Those of other numbers are scaled as `maskae.data.sensor_scale` says, measured on one season of at
most 512 training places.

The seasons of a place stay in one record: training draws one of them, evaluation reads the first. Of the places val_percent are held out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import BadZipFile

import numpy as np

from maskae.data.contract import SPLITS, Record, Source, SourceArguments, statistics_rows, stratified_split
from maskae.data.folder import files_below
from maskae.data.raster_files import raster_entries, read_raster
from maskae.data.sensor_scale import ClippedScale, sensor_details
from maskae.data.spec import LABEL, NO_LABEL, BadRecord, DataSpec, Field, split_hash
from maskae.errors import UserError

ARRAYS = {"sensor_optical": "s2", "sensor_radar": "s1"}
OPTICAL, RADAR = ARRAYS.values()
SEASON_AXES = 4  # seasons, channels, rows, columns

Choose = Callable[[int], int]  # the number of a season, of so many


def read_archive(root: Path, file: str, choose: Choose) -> dict[str, np.ndarray]:
    """Both sensors in a season of an .npz, uint8 [H, W, c]. Raises BadRecord for a file that is damaged or holds something else."""
    try:
        with np.load(root / file, allow_pickle=False) as loaded:
            found = {field: loaded[name] for field, name in ARRAYS.items()}
    except (ValueError, OSError, EOFError, KeyError, BadZipFile) as error:
        raise BadRecord(f"not an .npz file with s1 and s2: {error}") from error
    found = {name: array if array.ndim == SEASON_AXES else array[None] for name, array in found.items()}
    optical, radar = found.values()
    if {each.dtype for each in found.values()} != {np.dtype(np.uint8)} or {each.ndim for each in found.values()} != {SEASON_AXES}:
        raise BadRecord(f"s2 {optical.dtype} {optical.shape} and s1 {radar.dtype} {radar.shape} must be uint8 [seasons, channels, H, W]")
    if len(optical) != len(radar) or optical.shape[2:] != radar.shape[2:]:
        raise BadRecord(f"s2 {optical.shape} and s1 {radar.shape} are not of the same seasons and size")
    season = choose(len(optical))
    return {name: array[season].transpose(1, 2, 0) for name, array in found.items()}


def read_rasters(root: Path, file: str, choose: Choose) -> dict[str, np.ndarray]:
    """Both sensors in a season of a place, [H, W, c], uint8 or float32 with NaN where values are missing; `file` is that of s2.

    Raises BadRecord for a raster that is damaged, and for two that do not fit together.
    """
    seasons = {field: season_rasters(root, sensor, file) for field, sensor in ARRAYS.items()}
    counts = [len(each) for each in seasons.values()]
    if counts[0] != counts[1]:
        raise BadRecord(f"s2 has {counts[0]} seasons and s1 {counts[1]} (files of single bands belong into a folder for their season)")
    season = choose(counts[0])
    found = {field: read_raster(root, each[season]) for field, each in seasons.items()}
    (height, width), other = (array.shape[:2] for array in found.values())
    if (height, width) != other:
        raise BadRecord(f"s2 {height} x {width} pixels and s1 {other[0]} x {other[1]} are not of the same size")
    return found


def season_rasters(root: Path, sensor: str, file: str) -> list[str]:
    """The rasters of a sensor for the place of `file`, one a season, relative to root. Raises BadRecord where there are none."""
    place = f"{sensor}/{PurePosixPath(file).name}"
    if not (root / place).is_dir():
        return [place]
    return [f"{place}/{name}" for name in sorted(raster_entries(root, place), key=_date)]


def _date(name: str) -> str:
    # Names of scenes begin with the satellite, S1A or S1B, which says nothing of the season.
    found = re.search(r"(19|20)\d{6}", name)
    return found[0] if found else ""


@functools.lru_cache(maxsize=8)
def _measure_rasters(root: Path, files: tuple[str, ...], sensor: str, channels: int) -> ClippedScale:
    # Cached: the training and the validation source of a run are opened one after the other, with the same statistics.
    def readable() -> Iterator[np.ndarray]:
        for number, row in enumerate(statistics_rows(len(files))):
            try:
                seasons = season_rasters(root, sensor, files[row])
                raster = read_raster(root, seasons[number % len(seasons)])
            except BadRecord:
                continue
            if raster.dtype != np.uint8 and raster.shape[-1] == channels:
                yield raster

    return ClippedScale.measured(readable())


@dataclass(frozen=True)
class PlacesSource:
    """Places in files below `root`; `side` pixels of each, its middle for evaluation and a random window for training; 0: all.

    Attributes:
        read: gives the sensors of a file in a season, [H, W, c] each.
        scales: of the sensors that are not uint8.
    """

    root: Path
    files: tuple[str, ...]
    side: int
    spec: DataSpec
    read: Callable[[Path, str, Choose], dict[str, np.ndarray]]
    scales: dict[str, ClippedScale]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        place = self._place(index, lambda count: 0)
        room = self._room(place)
        return self._window(place, room // 2, room // 2)

    def sample(self, index: int, generator: np.random.Generator) -> Record:
        """A random season and window of a place, the same in both sensors."""
        place = self._place(index, lambda count: int(generator.integers(0, count)))
        row, column = generator.integers(0, self._room(place) + 1, 2)
        return self._window(place, int(row), int(column))

    def name(self, index: int) -> str:
        """The file or folder, that of s2 where the sensors have their own."""
        return str(self.root / self.files[index])

    def _place(self, index: int, choose: Choose) -> dict[str, np.ndarray]:
        place = self.read(self.root, self.files[index], choose)
        for name, array in place.items():
            whole, wanted = array.shape, self.spec.fields[name].shape
            if whole[0] < wanted[0] or whole[1] < wanted[1] or whole[2] != wanted[2] or (not self.side and whole != wanted):
                raise BadRecord(f"{ARRAYS[name]} has {whole[0]} x {whole[1]} pixels of {whole[2]} channels, the set {wanted}")
            if (array.dtype == np.uint8) == (name in self.scales):
                kind = "uint8" if array.dtype == np.uint8 else "other numbers than uint8"
                raise BadRecord(f"{ARRAYS[name]} holds {kind}, unlike the set's first place")
        return place

    def _room(self, place: dict[str, np.ndarray]) -> int:
        height, width = next(iter(place.values())).shape[:2]
        return min(height, width) - self.side if self.side else 0

    def _window(self, place: dict[str, np.ndarray], row: int, column: int) -> Record:
        end = self.side or None
        rows, columns = (slice(start, start + end if end else None) for start in (row, column))
        record: dict[str, Any] = {name: self._scaled(name, array[rows, columns]) for name, array in place.items()}
        return record | {LABEL: NO_LABEL}

    def _scaled(self, name: str, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.scales[name](values) if name in self.scales else values)


def _list_archives(name: str, folder: Path) -> list[str]:
    files = files_below(folder, (".npz",))
    if not files:
        raise UserError(f"{name}: no .npz files and no folders s1 and s2 of rasters in {folder}")
    return files


def _list_rasters(name: str, folder: Path) -> list[str]:
    """The places under s2, which must be those under s1."""
    if any(folder.glob("*.npz")):
        raise UserError(f"{name}: both .npz files and rasters, in s1 and s2, are in {folder}; keep one kind")
    try:
        places = {sensor: raster_entries(folder, sensor) for sensor in ARRAYS.values()}
    except BadRecord as error:
        raise UserError(f"{name}: {folder}/{error}") from error
    for sensor, other in ((OPTICAL, RADAR), (RADAR, OPTICAL)):
        alone = sorted(set(places[sensor]) - set(places[other]))
        if alone:
            raise UserError(f"{name}: {len(alone)} places of {sensor}, for example {alone[0]}, are not in {other} of {folder}")
    return sorted(f"{OPTICAL}/{place}" for place in places[OPTICAL])


def open_places(arguments: SourceArguments, folder: Path, side: int | None) -> Source:
    """The places of a split. Raises UserError where there are none, or the first one cannot be read."""
    rasters = any((folder / sensor).is_dir() for sensor in ARRAYS.values())
    list_places, read = (_list_rasters, read_rasters) if rasters else (_list_archives, read_archive)
    files = list_places(arguments.name, folder)
    try:
        first = read(folder, files[0], lambda count: 0)
    except BadRecord as error:
        raise UserError(f"{arguments.name}: {folder / files[0]}: {error}") from error
    height, width = next(iter(first.values())).shape[:2]
    if side and side > min(height, width):
        raise UserError(f"{arguments.name}: a window of {side} pixels does not fit into places of {height} x {width}")
    shape = (side, side) if side else (height, width)
    rows = stratified_split(np.zeros(len(files), np.int32), arguments.val_percent, arguments.split_seed)
    parts = {split: tuple(files[i] for i in part) for split, part in zip(SPLITS, rows, strict=True)}
    unscaled = {name: array.shape[-1] for name, array in first.items() if array.dtype != np.uint8}
    scales = {name: _measure_rasters(folder, parts["train"], ARRAYS[name], channels) for name, channels in unscaled.items()}
    spec = DataSpec(
        name=arguments.name,
        image_shape=None,
        channels=0,
        mean=(),
        std=(),
        counts={split: len(part) for split, part in parts.items()},
        split_hash=split_hash(*([(file, NO_LABEL) for file in parts[split]] for split in SPLITS)),
        fields={name: Field((*shape, array.shape[-1]), "uint8") for name, array in first.items()},
        details=sensor_details(scales, (3, 2, 1)),
    )
    return PlacesSource(folder, parts[arguments.split], side or 0, spec, read, scales)
