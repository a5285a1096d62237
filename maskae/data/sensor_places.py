"""A folder of places seen by two sensors, one .npz each, read when it is needed: the form for sets too large for memory (SSL4EO-S12).

    PATH/0000001.npz    s1 uint8 [seasons, c, H, W] and s2 uint8 [seasons, C, H, W], scaled as `maskae.data.sensors` says; a single season
                        may lack the first axis; in subfolders too

The seasons of a place stay in one record: training draws one of them, evaluation reads the first. Of the places val_percent are held out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from maskae.data.contract import SPLITS, Record, Source, SourceArguments, stratified_split
from maskae.data.folder import files_below
from maskae.data.spec import LABEL, NO_LABEL, BadRecord, DataSpec, Field, split_hash
from maskae.errors import UserError

ARRAYS = {"sensor_optical": "s2", "sensor_radar": "s1"}
SEASON_AXES = 4  # seasons, channels, rows, columns


def read_place(path: Path) -> dict[str, np.ndarray]:
    """Both sensors of a place, uint8 [seasons, H, W, c]. Raises BadRecord for a file that is damaged or holds something else."""
    try:
        with np.load(path, allow_pickle=False) as loaded:
            found = {field: loaded[name] for field, name in ARRAYS.items()}
    except (ValueError, OSError, EOFError, KeyError, BadZipFile) as error:
        raise BadRecord(f"not an .npz file with s1 and s2: {error}") from error
    found = {name: array if array.ndim == SEASON_AXES else array[None] for name, array in found.items()}
    optical, radar = found.values()
    if {each.dtype for each in found.values()} != {np.dtype(np.uint8)} or {each.ndim for each in found.values()} != {SEASON_AXES}:
        raise BadRecord(f"s2 {optical.dtype} {optical.shape} and s1 {radar.dtype} {radar.shape} must be uint8 [seasons, channels, H, W]")
    if len(optical) != len(radar) or optical.shape[2:] != radar.shape[2:]:
        raise BadRecord(f"s2 {optical.shape} and s1 {radar.shape} are not of the same seasons and size")
    return {name: array.transpose(0, 2, 3, 1) for name, array in found.items()}


@dataclass(frozen=True)
class PlacesSource:
    """Places in files below `root`; `side` pixels of each, its middle for evaluation and a random window for training; 0: all."""

    root: Path
    files: tuple[str, ...]
    side: int
    spec: DataSpec

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        place = self._place(index)
        room = self._room(place)
        return self._window(place, 0, room // 2, room // 2)

    def sample(self, index: int, generator: np.random.Generator) -> Record:
        """A random season and window of a place, the same in both sensors."""
        place = self._place(index)
        season = generator.integers(0, len(next(iter(place.values()))))
        row, column = generator.integers(0, self._room(place) + 1, 2)
        return self._window(place, int(season), int(row), int(column))

    def name(self, index: int) -> str:
        """The file."""
        return str(self.root / self.files[index])

    def _place(self, index: int) -> dict[str, np.ndarray]:
        place = read_place(self.root / self.files[index])
        for name, array in place.items():
            whole = (*array.shape[1:3], array.shape[3])
            wanted = self.spec.fields[name].shape
            if whole[0] < wanted[0] or whole[1] < wanted[1] or whole[2] != wanted[2] or (not self.side and whole != wanted):
                raise BadRecord(f"{ARRAYS[name]} has {whole[0]} x {whole[1]} pixels of {whole[2]} channels, the set {wanted}")
        return place

    def _room(self, place: dict[str, np.ndarray]) -> int:
        height, width = next(iter(place.values())).shape[1:3]
        return min(height, width) - self.side if self.side else 0

    def _window(self, place: dict[str, np.ndarray], season: int, row: int, column: int) -> Record:
        end = self.side or None
        rows, columns = (slice(start, start + end if end else None) for start in (row, column))
        record: dict[str, Any] = {name: np.ascontiguousarray(array[season, rows, columns]) for name, array in place.items()}
        return record | {LABEL: NO_LABEL}


def open_places(arguments: SourceArguments, folder: Path, side: int | None) -> Source:
    """The places of a split. Raises UserError where there are none, or the first one cannot be read."""
    files = files_below(folder, (".npz",))
    if not files:
        raise UserError(f"{arguments.name}: no .npz files in {folder}")
    try:
        first = read_place(folder / files[0])
    except BadRecord as error:
        raise UserError(f"{arguments.name}: {folder / files[0]}: {error}") from error
    height, width = next(iter(first.values())).shape[1:3]
    if side and side > min(height, width):
        raise UserError(f"{arguments.name}: a window of {side} pixels does not fit into places of {height} x {width}")
    shape = (side, side) if side else (height, width)
    parts = dict(zip(SPLITS, stratified_split(np.zeros(len(files), np.int32), arguments.val_percent, arguments.split_seed), strict=True))
    spec = DataSpec(
        name=arguments.name,
        image_shape=None,
        channels=0,
        mean=(),
        std=(),
        counts={split: len(part) for split, part in parts.items()},
        split_hash=split_hash(*([(files[i], NO_LABEL) for i in parts[split]] for split in SPLITS)),
        fields={name: Field((*shape, array.shape[-1]), "uint8") for name, array in first.items()},
        details={"optical_colours": [3, 2, 1]},
    )
    return PlacesSource(folder, tuple(files[i] for i in parts[arguments.split]), side or 0, spec)
