"""Slices of volumes as images: `slices:FILE` (all of them, unlabelled) and `organs:FILE` (organ by organ, from the volume's mask).

FILE is an .npz, a NIfTI file or a folder of NIfTI files (`maskae.data.volume_files`); `FILE#ct_` takes the volumes whose name begins so.
Values become 8-bit pictures as in Wolf et al. 2023: a straight line from the slice's own minimum to its maximum, which hides absolute
Hounsfield units. `FILE#ct_@-160:240` maps that fixed window instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from maskae.data.contract import SPLITS, Source, SourceArguments, measure
from maskae.data.spec import NO_LABEL, DataSpec, split_hash
from maskae.data.volume_files import Volume, read_volumes
from maskae.errors import UserError, nearest

VAL_SHARE = 4  # the last 1/4 of an organ's slices along the body validate
GAP = 2  # slices between the training and the validation part that belong to neither: neighbours look alike
MIN_SLICES = 24  # an organ seen in fewer slices is no class
MARGIN = 1.5  # side of an organ's square, as a multiple of the larger side of its bounding box
MIN_SIDE = 24  # voxels

Window = tuple[float, float] | None


class Picture(NamedTuple):
    """One labelled image with the text that names it in a log."""

    image: np.ndarray
    label: int
    name: str


def hounsfield_units(stored: np.ndarray, slope: float, intercept: float, padding: float = -2000) -> np.ndarray:
    """Hounsfield units of stored CT values of any type; padding outside of the scanner's circle is set to a stored 0 first."""
    values = np.where(stored == padding, 0, stored).astype(np.float64)
    return values * slope + intercept


def stretch(values: np.ndarray, window: Window = None) -> np.ndarray:
    """A slice mapped to 0..255, float64: from its own minimum and maximum, or from a fixed window. A constant slice gives 0."""
    low, high = window or (float(values.min()), float(values.max()))
    return np.clip((values.astype(np.float64) - low) / max(high - low, 1e-12), 0, 1) * 255


def organ_square(mask: np.ndarray) -> tuple[slice, slice]:
    """The square around what is true in a mask [H, W], `MARGIN` times its bounding box and at least `MIN_SIDE`, cut at the borders."""
    places = np.nonzero(mask)
    low, high = (np.array([edge(axis) for axis in places]) for edge in (np.min, np.max))
    half = max(MARGIN * float((high - low + 1).max()), MIN_SIDE) / 2
    center = (low + high + 1) / 2
    first = np.maximum(np.round(center - half).astype(int), 0)
    last = np.round(center + half).astype(int)
    return slice(first[0], last[0]), slice(first[1], last[1])


def plane(volume: np.ndarray, axis: int, index: int) -> np.ndarray:
    """Slice `index` across `axis` of a volume in RAS order, drawn with the patient's head (or front) up."""
    return np.rot90(np.take(volume, index, axis))


def all_slices(volumes: Sequence[Volume], window: Window) -> Iterator[Picture]:
    """Every slice in all three directions."""
    for volume in volumes:
        for axis in range(3):
            for index in range(volume.values.shape[axis]):
                values = plane(volume.values, axis, index)
                image = np.rint(stretch(values, window)).astype(np.uint8)[..., None]
                yield Picture(image, NO_LABEL, f"{volume.name} axis {axis} slice {index}")


def organ_slices(volumes: Sequence[Volume], window: Window) -> dict[str, list[Picture]]:
    """One square per organ and axial slice, labelled by the organ's number in the mask, by split; see `VAL_SHARE`."""
    parts: dict[str, list[Picture]] = {split: [] for split in SPLITS}
    for volume in volumes:
        if volume.mask is None:
            continue
        count = volume.values.shape[2]
        drawn = [np.rint(stretch(plane(volume.values, 2, index), window)).astype(np.uint8)[..., None] for index in range(count)]
        masks = [plane(volume.mask, 2, index) for index in range(count)]
        present = [set(np.unique(mask).tolist()) for mask in masks]
        for organ in sorted(set().union(*present) - {0}):
            indices = [index for index in range(count) if organ in present[index]]
            if len(indices) < MIN_SLICES:
                continue
            held = len(indices) - len(indices) // VAL_SHARE
            for split, chosen in zip(SPLITS, (indices[:held], indices[held + GAP :]), strict=True):
                for index in chosen:
                    image = drawn[index][organ_square(masks[index] == organ)]
                    parts[split].append(Picture(image, organ, f"{volume.name} organ {organ} slice {index}"))
    return parts


@dataclasses.dataclass(frozen=True)
class SliceSource:
    """Pictures in memory, each uint8 [H, W, C] of its own size."""

    pictures: tuple[Picture, ...]
    channels: int
    spec: DataSpec

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = self.pictures[index]
        return {"image": np.repeat(picture.image, self.channels, -1), "label": picture.label}

    def name(self, index: int) -> str:
        """Volume, organ and slice."""
        return self.pictures[index].name


def _chosen(arguments: SourceArguments) -> tuple[list[Volume], Window]:
    """The volumes and the window that a source's path names. Raises UserError."""
    path, _, choice = arguments.path.partition("#")
    prefix, _, limits = choice.partition("@")
    window = None
    if limits:
        try:
            low, high = (float(value) for value in limits.split(":"))
        except ValueError as error:
            raise UserError(f"{arguments.name}: the window '{limits}' is not LOW:HIGH in the volume's units") from error
        if low >= high:
            raise UserError(f"{arguments.name}: the window {limits} does not rise")
        window = (low, high)
    whole = dataclasses.replace(arguments, path=path)
    volumes = read_volumes(whole.resolve("folder" if (whole.base / path).is_dir() else "file"), arguments.name)
    found = [volume for volume in volumes if volume.name.startswith(prefix)]
    if not found:
        names = [volume.name for volume in volumes]
        raise UserError(f"{arguments.name}: no volume begins with '{prefix}'{nearest(prefix, names)}; there are {', '.join(names)}")
    return found, window


def _source(arguments: SourceArguments, parts: dict[str, list[Picture]], classes: Sequence[str]) -> Source:
    channels = arguments.channels or 1
    train = parts["train"]
    values = np.concatenate([picture.image.reshape(-1, 1) for picture in train[:: max(1, len(train) // 512)]])
    mean, std = arguments.known_statistics(channels) or measure(np.repeat(values[None, None], channels, -1), channels, 255)
    spec = DataSpec(
        name=arguments.name,
        image_shape=None,
        channels=channels,
        mean=mean,
        std=std,
        num_classes=len(classes) or None,
        class_names=tuple(classes),
        counts={split: len(pictures) for split, pictures in parts.items()},
        split_hash=split_hash(*([(picture.name, picture.label) for picture in parts[split]] for split in SPLITS)),
    )
    return SliceSource(tuple(parts[arguments.split]), channels, spec)


def open_slices(arguments: SourceArguments) -> Source:
    """All slices of the chosen volumes; a run of `val_percent` of them (from its middle on) validates in every direction of a volume."""
    volumes, window = _chosen(arguments)
    pictures = list(all_slices(volumes, window))
    every = max(2, round(100 / arguments.val_percent)) if arguments.val_percent else 0
    held = [bool(every) and number // 8 % every == every // 2 for number in range(len(pictures))]
    parts = {split: [p for p, out in zip(pictures, held, strict=True) if out == (split == "val")] for split in SPLITS}
    return _source(arguments, parts, ())


def open_organs(arguments: SourceArguments) -> Source:
    """The organs of the chosen volumes, split as `organ_slices` does. Raises UserError where there are none."""
    volumes, window = _chosen(arguments)
    parts = organ_slices(volumes, window)
    numbers = sorted({picture.label for picture in parts["train"]})
    if not numbers:
        raise UserError(f"{arguments.name}: no organ is seen in {MIN_SLICES} slices or more of a mask")
    for split, pictures in parts.items():
        parts[split] = [picture._replace(label=numbers.index(picture.label)) for picture in pictures]
    return _source(arguments, parts, [f"organ {number}" for number in numbers])
