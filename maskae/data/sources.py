"""Opens data sets by their name: `digits`, `folder:PATH`, `npz:PATH`, `arrayrecord:PATH or gs://PATH`, `tfds:NAME`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from zipfile import BadZipFile

import numpy as np

from maskae.data.archive import open_archive
from maskae.data.audio import open_audio
from maskae.data.clips import open_clips
from maskae.data.contract import SPLITS, STATISTICS, Record, Source, SourceArguments, measure, sample_record, stratified_split
from maskae.data.densities import open_density
from maskae.data.domains import open_domains
from maskae.data.downloads import parse_downloads, provide
from maskae.data.folder import open_folder
from maskae.data.forgeries import open_forgeries
from maskae.data.graphs import open_graph_set, open_planetoid
from maskae.data.neighbourhoods import open_neighbourhood, open_node_rows
from maskae.data.points import open_points
from maskae.data.records import open_array_record
from maskae.data.remote import open_remote_records
from maskae.data.sensors import open_sentinel_pairs, open_two_sensor
from maskae.data.slices import open_organs, open_slices
from maskae.data.spec import IMAGE, LABEL, NO_LABEL, DataSpec, split_hash
from maskae.data.spoken_digits import open_spoken_digits
from maskae.data.tables import open_digits_table, open_table_images
from maskae.data.tfds import open_tfds
from maskae.errors import UserError, nearest

DIGITS_MAX_VALUE = 16
DIGITS_VAL_COUNT = 360
CACHES = ("none", "ram")


@dataclass(frozen=True)
class ArraySource:
    """Records held in memory.

    Attributes:
      images: uint8 [N, H, W, C].
      labels: int32 [N], -1 where there is none.
      origin: int64 [N], the number of each record in the whole data set before it was split.
      spec: of the whole data set.
    """

    images: np.ndarray
    labels: np.ndarray
    origin: np.ndarray
    spec: DataSpec

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        return {IMAGE: self.images[index], LABEL: int(self.labels[index])}

    def name(self, index: int) -> str:
        """`digits record 17`: the number is the one in the whole data set."""
        return f"{self.spec.name} record {int(self.origin[index])}"


@dataclass(frozen=True)
class LimitedSource:
    """`count` records of another source, evenly spaced: a folder is in the order of its classes, and its first records are of one."""

    parent: Source
    count: int

    @property
    def spec(self) -> DataSpec:
        """The parent's spec: the statistics stay those of all records."""
        return self.parent.spec

    def __len__(self) -> int:
        return min(self.count, len(self.parent))

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.parent[self._spaced(index)]

    def sample(self, index: int, generator: np.random.Generator) -> Record:
        """A random part of the parent's record, where it has parts."""
        return sample_record(self.parent, self._spaced(index), generator)

    def name(self, index: int) -> str:
        """The parent's name of the record."""
        return self.parent.name(self._spaced(index))

    def _spaced(self, index: int) -> int:
        return index * len(self.parent) // len(self)


@dataclass(frozen=True)
class CachedSource:
    """Keeps records in memory after their first reading, encoded as they were read, until `limit` bytes are full.

    What does not fit is read anew each time. The order is global, so every host comes to read every record, and each worker process has a
    cache of its own.
    """

    parent: Source
    limit: float
    kept: dict[int, Record] = field(default_factory=dict)
    used: list[int] = field(default_factory=lambda: [0])  # bytes
    lock: Any = field(default_factory=threading.Lock, compare=False, repr=False)

    @property
    def spec(self) -> DataSpec:
        """The parent's spec."""
        return self.parent.spec

    def __len__(self) -> int:
        return len(self.parent)

    def __getitem__(self, index: int) -> Record:
        record = self.kept.get(index)
        if record is None:
            record = self.parent[index]
            size = sum(len(value) if isinstance(value, bytes) else value.nbytes for value in record.values() if not isinstance(value, int))
            with self.lock:
                if index not in self.kept and self.used[0] + size <= self.limit:
                    self.kept[index] = record
                    self.used[0] += size
        return dict(record)

    def sample(self, index: int, generator: np.random.Generator) -> Record:
        """A random part of a record, read anew; the record as it is kept where the parent has no parts."""
        return sample_record(self.parent, index, generator) if hasattr(self.parent, "sample") else self[index]

    def __reduce__(self) -> Any:
        return CachedSource, (self.parent, self.limit)

    def name(self, index: int) -> str:
        """The parent's name of the record."""
        return self.parent.name(index)


def _array_source(arguments: SourceArguments, parts: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], **spec: Any) -> ArraySource:
    """The wanted one of the splits {name: (images uint8 [N, H, W, C], labels int32 [N], origin [N])}; `spec` adds to its DataSpec."""
    train = parts["train"][0]
    channels = train.shape[-1]
    if arguments.channels not in (None, channels):
        raise UserError(f"{arguments.name}: the images have {channels} channels, not {arguments.channels}")
    known = arguments.known_statistics(channels)
    mean, std = known or measure(train, channels, spec.get("max_value", 255))
    members = [[(str(origin), int(label)) for origin, label in zip(parts[s][2], parts[s][1], strict=True)] for s in SPLITS]
    made = DataSpec(
        name=arguments.name,
        image_shape=train.shape[1:],
        channels=channels,
        mean=mean,
        std=std,
        counts={split: len(part[0]) for split, part in parts.items()},
        split_hash=split_hash(*members),
        **spec,
    )
    return ArraySource(*parts[arguments.split], made)


def open_digits(arguments: SourceArguments) -> Source:
    """scikit-learn's 1,797 scanned 8x8 digits, stratified 1437/360 (val_percent is not used); one mean and std over all pixels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if arguments.path:
        raise UserError(f"{arguments.name}: digits takes no path (did you mean 'digits'?)")
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    rows = train_test_split(np.arange(len(labels)), test_size=DIGITS_VAL_COUNT, stratify=labels, random_state=arguments.split_seed)
    parts = {split: (images[part], labels[part], part) for split, part in zip(SPLITS, rows, strict=True)}
    names = tuple(str(digit) for digit in range(10))
    return _array_source(arguments, parts, max_value=DIGITS_MAX_VALUE, num_classes=10, class_names=names)


def _as_images(array: np.ndarray, what: str) -> np.ndarray:
    """uint8 [N, H, W, C] of an array [N, H, W] or [N, H, W, C] of whole numbers 0..255 or fractions 0..1. Raises UserError for others."""
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or not array.size:
        raise UserError(f"{what}: images must be [N, H, W] or [N, H, W, C], not {array.shape}")
    if array.dtype == np.uint8:
        return array
    low, high = array.min(), array.max()
    if array.dtype.kind in "iub" and low >= 0 and high <= 255:
        return array.astype(np.uint8)
    if array.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.round(array * 255).astype(np.uint8)
    raise UserError(f"{what}: {array.dtype} values {low}..{high} must be whole numbers in 0..255 or fractions in 0..1")


def _npz_part(arrays: Mapping[str, np.ndarray], prefix: str, what: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(images, labels) under a prefix, or None where there are no images."""
    key = next((prefix + name for name in ("image", "images") if prefix + name in arrays), None)
    if key is None:
        return None
    images = _as_images(arrays[key], f"{what}: {key}")
    label_key = next((prefix + name for name in ("label", "labels") if prefix + name in arrays), None)
    if label_key is None:
        return images, np.full(len(images), NO_LABEL, np.int32)
    labels = arrays[label_key].reshape(-1)
    if len(labels) != len(images) or labels.dtype.kind not in "iu" or (len(labels) and labels.min() < 0):
        raise UserError(f"{what}: {label_key} must be {len(images)} whole numbers from 0 on, not {labels.dtype} {arrays[label_key].shape}")
    return images, labels.astype(np.int32)


def open_npz(arguments: SourceArguments) -> Source:
    """Arrays `images` and maybe `labels`, split by label, or both with the prefixes `train_` and `val_`. Raises UserError for others."""
    path = arguments.resolve("file")
    try:
        with np.load(path, allow_pickle=False) as loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, BadZipFile, AttributeError, TypeError) as error:
        raise UserError(f"{arguments.name}: {path} is no .npz file of plain arrays: {error}") from error
    whole, train, val = (_npz_part(arrays, prefix, arguments.name) for prefix in ("", "train_", "val_"))
    whole = whole or (train if val is None else None)
    if whole is not None:
        rows = stratified_split(whole[1], arguments.val_percent, arguments.split_seed)
        parts = {split: (whole[0][part], whole[1][part], part) for split, part in zip(SPLITS, rows, strict=True)}
    elif train is not None and val is not None:
        parts = {split: (*part, np.arange(len(part[0]))) for split, part in (("train", train), ("val", val))}
    else:
        raise UserError(f"{arguments.name}: no array 'images' or 'train_images'{nearest('images', arrays)}; there are {', '.join(arrays)}")
    highest = max(int(part[1].max(initial=NO_LABEL)) for part in parts.values())
    return _array_source(arguments, parts, num_classes=highest + 1 if highest >= 0 else None)


def open_records(arguments: SourceArguments) -> Source:
    """ArrayRecord shards on disk or in a bucket."""
    return open_remote_records(arguments) if arguments.url else open_array_record(arguments)


def open_table_of_digits(arguments: SourceArguments) -> Source:
    """The digits with a derived table."""
    return open_digits_table(arguments, open_digits)


SOURCES: dict[str, Callable[[SourceArguments], Source]] = {
    "density": open_density,
    "digits": open_digits,
    "digits_table": open_table_of_digits,
    "table_images": open_table_images,
    "domains": open_domains,
    "folder": open_folder,
    "forgeries": open_forgeries,
    "archive": open_archive,
    "audio": open_audio,
    "clips": open_clips,
    "npz": open_npz,
    "points": open_points,
    "arrayrecord": open_records,
    "spoken_digits": open_spoken_digits,
    "tfds": open_tfds,
    "planetoid": open_planetoid,
    "node_rows": open_node_rows,
    "neighbourhood": open_neighbourhood,
    "tu": open_graph_set,
    "two_sensor": open_two_sensor,
    "sentinel_pairs": open_sentinel_pairs,
    "slices": open_slices,
    "organs": open_organs,
}


def open_source(
    source: str,
    split: str,
    *,
    root: str | None = None,
    val_percent: float = 10.0,
    split_seed: int = 0,
    channels: int | None = None,
    statistics: str = "measured",
    max_examples: int | None = None,
    cache: str = "none",
    cache_gigabytes: float = 16.0,
    shard_folder: str | None = None,
    shard_gigabytes: float = 500.0,
    own_crop: bool = True,
    downloads: Sequence[tuple[str, str, str]] = (),
    fetch: bool = True,
) -> Source:
    """Opens one split of a data set.

    Args:
      source: `digits`, `folder:PATH`, `npz:PATH`, `arrayrecord:PATH` or `tfds:NAME`.
      split: `train` or `val`.
      root: what relative paths start from; by default the environment variable MASKAE_DATA, else the current folder.
      val_percent: share held out where the data has no validation split of its own (the digits always hold out 360).
      split_seed: chooses which records are held out.
      channels: 1 or 3, what image files are read with; None takes what the source has (3 for `folder:`).
      statistics: `measured` on the training records (on 512 of them where they are files), `imagenet`, or `unit` (values stay in 0..1).
      max_examples: keep only so many records of the split, evenly spaced.
      cache: `ram` keeps records in memory after their first reading, as they are stored; `none` does not.
      cache_gigabytes: of one such cache (10^9 bytes); what does not fit is read anew each time. Each worker process has one.
      shard_folder: where shards from a bucket are kept; by default `.cache/maskae/shards` in the home folder.
      shard_gigabytes: of all shards kept there.
      own_crop: False where a transform takes the place of the crop that `clips:` training records have by themselves.
      downloads: (place below the root, URL, SHA-256) of the files that the source reads, see `maskae.data.downloads`.
      fetch: False for a source that is to be opened only where its files are there.

    Raises UserError for an unknown source or split, a missing or empty folder, a file that cannot be fetched, or a split without records.
    """
    kind, _, path = source.partition(":")
    if kind not in SOURCES:
        raise UserError(f"unknown data source '{source}'{nearest(kind, SOURCES)}; there are {', '.join(sorted(SOURCES))}")
    for what, word, options in (("split", split, SPLITS), ("statistics", statistics, STATISTICS), ("cache", cache, CACHES)):
        if word not in options:
            raise UserError(f"{source}: unknown {what} '{word}'{nearest(word, options)}; there are {', '.join(options)}")
    if not 0 <= val_percent < 100:
        raise UserError(f"{source}: val_percent must be at least 0 and below 100, not {val_percent}")
    if max_examples is not None and max_examples < 1:
        raise UserError(f"{source}: max_examples must be at least 1, not {max_examples}")
    for what, value in (("cache_gigabytes", cache_gigabytes), ("shard_gigabytes", shard_gigabytes)):
        if value <= 0:
            raise UserError(f"{source}: {what} must be positive, not {value}")
    rest: dict[str, Any] = {"shard_folder": shard_folder, "shard_gigabytes": shard_gigabytes, "own_crop": own_crop, "fetch": fetch}
    arguments = SourceArguments(source, path, split, root, val_percent, split_seed, channels, statistics, **rest)
    if downloads and arguments.url:
        raise UserError(f"{source}: data.downloads are put into folders on disk, not into {arguments.url}")
    for file in parse_downloads(downloads, arguments.base):
        provide(file, source, fetch=fetch)
    opened = SOURCES[kind](arguments)
    if len(opened) == 0:
        raise UserError(f"{source}: no records in split '{split}' (val_percent is {val_percent})")
    if cache == "ram":
        opened = CachedSource(opened, cache_gigabytes * 1e9)
    return opened if max_examples is None else LimitedSource(opened, max_examples)
