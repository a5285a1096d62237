"""Two aligned sensors of one place: `sensor_optical` and `sensor_radar`, uint8 [H, W, c] each, scaled per channel.

    two_sensor:PATH[@SIDE]       natural images made two-sensor (`archive:PATH` or `folder:PATH`): the colour planes, and luminance with the
                                 energy of its local gradient; short side to SIDE pixels (64), centre
    sentinel_pairs:FILE[@SIDE]   an .npz of Sentinel-1/2 rasters; training reads random windows of SIDE pixels, evaluation regular ones;
                                 without SIDE the whole rasters. Of the places val_percent are held out
    sentinel_pairs:FOLDER[@SIDE] an .npz or two GeoTIFF rasters for every place, see `maskae.data.sensor_places`

The scaling is `maskae.data.sensor_scale`'s, measured on training records.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any
from zipfile import BadZipFile

import cv2
import numpy as np

from maskae.data.archive import ARCHIVE, open_archive
from maskae.data.contract import SPLITS, Record, Source, SourceArguments, statistics_rows, stratified_split
from maskae.data.folder import open_folder
from maskae.data.images import Picture
from maskae.data.sensor_places import open_places
from maskae.data.sensor_scale import ClippedScale, sensor_details
from maskae.data.spec import LABEL, NO_LABEL, DataSpec, Field, split_hash
from maskae.data.transforms import ResizeCenterCrop
from maskae.errors import UserError, nearest

OPTICAL, RADAR, LABELS = "sensor_optical", "sensor_radar", "labels"
DEFAULT_SIDE = 64
LUMA = np.asarray([0.299, 0.587, 0.114], np.float32)

Arrays = dict[str, np.ndarray]


def luminance_and_energy(colours: np.ndarray) -> np.ndarray:
    """A second sensor for an image: its luminance, and the root mean square of its gradient over 3 x 3 pixels.

    [H, W, 3] -> float32 [H, W, 2].
    """
    grey = colours.astype(np.float32) @ LUMA
    rows, columns = np.gradient(grey)
    energy = np.sqrt(cv2.boxFilter(rows**2 + columns**2, -1, (3, 3), borderType=cv2.BORDER_REFLECT))
    return np.stack([grey, energy], axis=-1)


def split_side(path: str, name: str) -> tuple[str, int | None]:
    """`PATH@SIDE` as its parts; None without a side. Raises UserError for a side that is no positive number."""
    stem, at, side = path.rpartition("@")
    if not at:
        return path, None
    if not side.isdigit() or int(side) < 1:
        raise UserError(f"{name}: '{side}' after the @ must be a side in pixels")
    return stem, int(side)


@dataclass(frozen=True)
class TwoSensorSource:
    """Images of another source as two sensors."""

    parent: Source
    crop: ResizeCenterCrop
    scales: dict[str, ClippedScale]
    spec: DataSpec

    def __len__(self) -> int:
        return len(self.parent)

    def __getitem__(self, index: int) -> Record:
        record = self.parent[index]
        colours = colours_of(record, self.crop)
        raw = {OPTICAL: colours, RADAR: luminance_and_energy(colours)}
        return {name: scale(raw[name]) for name, scale in self.scales.items()} | {LABEL: record[LABEL]}

    def name(self, index: int) -> str:
        """The image's name."""
        return self.parent.name(index)


def colours_of(record: Record, crop: ResizeCenterCrop) -> np.ndarray:
    """The image as uint8 [side, side, 3]."""
    return crop.crop(Picture(record["image"], 3), np.random.default_rng(0))


def _open_images(arguments: SourceArguments) -> Source:
    return open_archive(arguments) if (arguments.resolve("folder") / ARCHIVE).is_file() else open_folder(arguments)


@functools.lru_cache(maxsize=8)
def _measure_images(arguments: SourceArguments, crop: ResizeCenterCrop) -> tuple[ClippedScale, ClippedScale]:
    # Cached: the training and the validation source of a run are opened one after the other, with the same statistics.
    train = _open_images(arguments)
    colours = [colours_of(train[int(index)], crop) for index in statistics_rows(len(train))]
    return ClippedScale.measured(colours), ClippedScale.measured(map(luminance_and_energy, colours))


def open_two_sensor(arguments: SourceArguments) -> Source:
    """Natural images as two sensors. Raises UserError where the images are not there."""
    path, side = split_side(arguments.path, arguments.name)
    inner = dataclasses.replace(arguments, path=path, channels=3, statistics="imagenet")
    crop = ResizeCenterCrop(side or DEFAULT_SIDE, side or DEFAULT_SIDE)
    scales = dict(zip((OPTICAL, RADAR), _measure_images(dataclasses.replace(inner, split="train"), crop), strict=True))
    images = _open_images(inner)
    spec = dataclasses.replace(
        images.spec,
        name=arguments.name,
        channels=0,
        mean=(),
        std=(),
        fields=_fields(crop.size, {OPTICAL: 3, RADAR: 2}),
        details=sensor_details(scales, (0, 1, 2)),
    )
    return TwoSensorSource(images, crop, scales, spec)


def _fields(side: int, channels: dict[str, int]) -> dict[str, Field]:
    return {name: Field((side, side, count), "uint8") for name, count in channels.items()}


@dataclass(frozen=True)
class SentinelSource:
    """Windows of rasters held in memory.

    Attributes:
        arrays: by field, uint8 [places, H, W, c].
        labels: uint8 [places, K], 1 where a class is present; None without.
        places: the number of each place in the file.
        side: of a window in pixels.
        spec: of the whole file.
    """

    arrays: Arrays
    labels: np.ndarray | None
    places: np.ndarray
    side: int
    spec: DataSpec

    @property
    def starts(self) -> list[int]:
        """Where the regular windows of a raster begin, half a window apart, along either axis."""
        room = next(iter(self.arrays.values())).shape[1] - self.side
        return [*range(0, room, max(1, self.side // 2)), room]

    def __len__(self) -> int:
        return len(self.places) * len(self.starts) ** 2

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place, window = divmod(index, len(self.starts) ** 2)
        row, column = divmod(window, len(self.starts))
        return self.window(place, self.starts[row], self.starts[column])

    def sample(self, index: int, generator: np.random.Generator) -> Record:
        """A random window of the place that record `index` is of, the same in both sensors."""
        row, column = generator.integers(0, self.starts[-1] + 1, 2)
        return self.window(index // len(self.starts) ** 2, int(row), int(column))

    def window(self, place: int, row: int, column: int) -> Record:
        """The square of `side` pixels from (row, column) on."""
        rows, columns = slice(row, row + self.side), slice(column, column + self.side)
        record: Record = {name: np.ascontiguousarray(array[place, rows, columns]) for name, array in self.arrays.items()}
        return record | {LABEL: NO_LABEL} | ({} if self.labels is None else {LABELS: self.labels[place]})

    def name(self, index: int) -> str:
        """The place's number in the file."""
        return f"{self.spec.name} place {int(self.places[index // len(self.starts) ** 2])}"


def _sentinel_arrays(path: Any, name: str) -> dict[str, np.ndarray]:
    """The arrays s1 [N, c, H, W], s2 [N, C, H, W] and maybe y [N, K] and classes [K], by these names less a prefix such as `ben_`."""
    try:
        with np.load(path, allow_pickle=False) as loaded:
            prefix = next((key.removesuffix("s1") for key in loaded.files if key.endswith("s1")), "")
            arrays = {key: loaded[prefix + key] for key in ("s1", "s2", "y", "classes") if prefix + key in loaded.files}
            found = ", ".join(loaded.files)
    except (ValueError, OSError, BadZipFile) as error:
        raise UserError(f"{name}: {path} is no .npz file of plain arrays: {error}") from error
    for key in ("s1", "s2"):
        if key not in arrays:
            raise UserError(f"{name}: no array '{key}' in {path}{nearest(key, found.split(', '))}; there are {found}")
        if arrays[key].ndim != 4 or arrays[key].shape[2] != arrays[key].shape[3]:
            raise UserError(f"{name}: {key} must be [places, channels, side, side], not {arrays[key].shape}")
    shapes = arrays["s1"].shape, arrays["s2"].shape
    if shapes[0][0] != shapes[1][0] or shapes[0][2:] != shapes[1][2:]:
        raise UserError(f"{name}: s1 {shapes[0]} and s2 {shapes[1]} are not of the same places and size")
    return arrays


def open_sentinel_pairs(arguments: SourceArguments) -> Source:
    """Windows of Sentinel-1/2 pairs. Raises UserError for a file that holds none, or a window larger than the rasters."""
    path, side = split_side(arguments.path, arguments.name)
    found = dataclasses.replace(arguments, path=path)
    if not found.url and (found.base / path).is_dir():
        return open_places(arguments, found.resolve("folder"), side)
    arrays = _sentinel_arrays(found.resolve("file"), arguments.name)
    rasters = {OPTICAL: arrays["s2"].transpose(0, 2, 3, 1), RADAR: arrays["s1"].transpose(0, 2, 3, 1)}  # [N, H, W, c]
    count, whole = rasters[OPTICAL].shape[:2]
    if side and side > whole:
        raise UserError(f"{arguments.name}: a window of {side} pixels does not fit into rasters of {whole}")
    parts = dict(zip(SPLITS, stratified_split(np.zeros(count, np.int32), arguments.val_percent, arguments.split_seed), strict=True))
    scales = {name: ClippedScale.measured(raster[parts["train"]]) for name, raster in rasters.items()}
    fields = _fields(side or whole, {name: raster.shape[-1] for name, raster in rasters.items()})
    labels = arrays.get("y")
    if labels is not None:
        fields[LABELS] = Field(labels.shape[1:], "uint8")
    # Bands in the order of the satellite's numbers: B04, B03 and B02 are red, green and blue.
    details = sensor_details(scales, (3, 2, 1)) | {"label_names": [str(each) for each in arrays.get("classes", ())]}
    chosen = parts[arguments.split]
    made = SentinelSource(
        {name: scales[name](raster[chosen]) for name, raster in rasters.items()},
        None if labels is None else labels[chosen].astype(np.uint8),
        chosen,
        side or whole,
        DataSpec(
            name=arguments.name,
            image_shape=None,
            channels=0,
            mean=(),
            std=(),
            split_hash=split_hash(*([(str(place), NO_LABEL) for place in parts[split]] for split in SPLITS)),
            fields=fields,
            details=details,
        ),
    )
    windows = len(made.starts) ** 2
    return dataclasses.replace(made, spec=dataclasses.replace(made.spec, counts={s: len(part) * windows for s, part in parts.items()}))
