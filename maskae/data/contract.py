"""What a source of records is, and what all kinds of sources share: their arguments, the split and the statistics."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from maskae.data.images import Picture
from maskae.data.spec import IMAGENET_MEAN, IMAGENET_STD, BadRecord, DataSpec
from maskae.errors import UserError, nearest

# {"image": uint8 [H, W, C] or the bytes of an image file, "label": int, and the arrays of the source's `spec.fields`}; both may be absent.
Record = dict[str, Any]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation per channel, in units where 1 is max_value

SPLITS = ("train", "val")
STATISTICS = ("measured", "imagenet", "unit")
STATISTICS_EXAMPLES = 512
STATISTICS_SIDE = 256


class Source(Protocol):
    """A random-access sequence of records; picklable, so that worker processes can read it.

    A source may also have `sample(index, generator) -> Record`: what training reads in place of `[index]`, where a record is a random part
    of something larger (a second of sound, some of the points). It depends on its two arguments alone.
    """

    @property
    def spec(self) -> DataSpec:
        """What the data set is; the same for all of its splits."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Record `index`. Raises BadRecord where it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """What to call record `index` in a log: a path where there is one."""
        ...


def sample_record(source: Source, index: int, generator: np.random.Generator) -> Record:
    """What training reads of record `index`: a random part of it where the source has parts, else the record. Raises BadRecord."""
    sample: Callable[[int, np.random.Generator], Record] | None = getattr(source, "sample", None)
    return source[index] if sample is None else sample(index, generator)


@dataclass(frozen=True)
class SourceArguments:
    """What every kind of source is opened with; `path` is the text after the colon of `name`.

    `own_crop` False: a transform sees the training records, so a source that crops them itself gives them whole.
    Without `fetch` a source must not fetch the files that it knows to be published.
    """

    name: str
    path: str
    split: str
    root: str | None
    val_percent: float
    split_seed: int
    channels: int | None
    statistics: str
    shard_folder: str | None = None
    shard_gigabytes: float = 0.0
    own_crop: bool = True
    fetch: bool = True

    @property
    def url(self) -> str | None:
        """The address without a slash at its end, where the path or the root is one (`gs://bucket/photos`); None for local paths."""
        if "://" in self.path:
            return self.path.rstrip("/")
        root = self.root or os.environ.get("MASKAE_DATA") or ""
        return f"{root.rstrip('/')}/{self.path}".rstrip("/") if "://" in root else None

    @property
    def base(self) -> Path:
        """What relative paths start from."""
        return Path(self.root or os.environ.get("MASKAE_DATA") or ".").expanduser()

    def resolve(self, kind: str) -> Path:
        """The file or folder on disk. Raises UserError where there is none, naming the nearest one beside it."""
        if not self.path:
            raise UserError(f"{self.name}: name the {kind} after a colon, as in {self.name.partition(':')[0]}:PATH")
        if self.url:
            raise UserError(f"{self.name}: only arrayrecord: reads {self.url}; tools/prepare_data.py makes its shards")
        path = self.base / Path(self.path).expanduser()
        if not (path.is_dir() if kind == "folder" else path.is_file()):
            parent = path.parent
            if not parent.is_dir():
                raise UserError(f"{self.name}: no {kind} {path}: there is no folder {parent}")
            raise UserError(f"{self.name}: no {kind} {path}{nearest(path.name, sorted(p.name for p in parent.iterdir()))}")
        return path

    def known_statistics(self, channels: int) -> Statistics | None:
        """ImageNet's where they were asked for, None where they are to be measured. Raises UserError where they cannot fit.

        "unit" leaves values in 0..1, which systems need that change colours on the device and normalise after that.
        """
        if self.statistics == "measured":
            return None
        if self.statistics == "unit":
            return (0.0,) * channels, (1.0,) * channels
        if channels != len(IMAGENET_MEAN):
            raise UserError(f"{self.name}: statistics 'imagenet' are for 3 channels, not {channels}")
        return IMAGENET_MEAN, IMAGENET_STD


def stratified_split(labels: np.ndarray, val_percent: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training and of the validation records, each in growing order.

    labels: int [N]. Of every label `val_percent` are held out, rounded; a label with one record keeps it for training. Where that holds
    out nothing at all although val_percent is positive, one record is.
    """
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(int(len(rows) * val_percent / 100 + 0.5), len(rows) - 1)
        held_out[np.random.default_rng([seed, int(label) + 1]).permutation(rows)[:count]] = True
    if val_percent > 0 and len(labels) > 1 and not held_out.any():
        held_out[np.random.default_rng(seed).integers(len(labels))] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def measure(images: Iterable[np.ndarray], channels: int, max_value: int = 255) -> Statistics:
    """Mean and standard deviation per channel over all pixels, in units where 1 is `max_value`. images: uint8 [..., channels] each."""
    count, total, squares = 0, np.zeros(channels), np.zeros(channels)
    for image in images:
        values = image.reshape(-1, channels).astype(np.float64) / max_value
        count += len(values)
        total += values.sum(0)
        squares += np.square(values).sum(0)
    if count == 0:
        raise UserError("not one image can be read to measure the statistics of the data")
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    return tuple(mean.tolist()), tuple(std.tolist())


def statistics_rows(count: int) -> np.ndarray:
    """Of `count` records at most 512, evenly spaced: those that statistics are measured on; int [N]."""
    return np.unique(np.linspace(0, count - 1, min(count, STATISTICS_EXAMPLES)).round().astype(int))


def measure_sample(read: Callable[[int], bytes | np.ndarray], count: int, channels: int) -> Statistics:
    """`measure` over at most 512 of `count` records, evenly spaced; large ones are decoded smaller, broken ones left out."""

    def readable() -> Iterable[np.ndarray]:
        for index in statistics_rows(count):
            try:
                picture = Picture(read(int(index)), channels)
                side = min(picture.size)
                yield picture.read(next(shrink for shrink in (8, 4, 2, 1) if side >= shrink * STATISTICS_SIDE or shrink == 1))
            except BadRecord:
                continue

    return measure(readable(), channels)
