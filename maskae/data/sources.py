"""Where records come from: `open_source("digits", "train")` and its sisters.

A source is a random-access sequence. Record i is `{"image": uint8 [H, W, C] array or the bytes of an image file, "label": int}`; it raises
`BadRecord` where the record cannot be read. Sources are picklable, so that worker processes can read them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from maskae.data.spec import IMAGE, LABEL, DataSpec, split_hash
from maskae.errors import UserError, nearest

Record = dict[str, Any]

SPLITS = ("train", "val")
DIGITS_MAX_VALUE = 16
DIGITS_VAL_COUNT = 360


class Source(Protocol):
    """A random-access sequence of records."""

    @property
    def spec(self) -> DataSpec:
        """What the data set is; the same for all of its splits."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def name(self, index: int) -> str:
        """What to call record `index` in a log: a path where there is one."""
        ...


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
    """The first `count` records of another source."""

    parent: Source
    count: int

    @property
    def spec(self) -> DataSpec:
        """The parent's spec: the statistics stay those of all records."""
        return self.parent.spec

    def __len__(self) -> int:
        return min(self.count, len(self.parent))

    def __getitem__(self, index: int) -> Record:
        return self.parent[index]

    def name(self, index: int) -> str:
        """The parent's name of the record."""
        return self.parent.name(index)


@dataclass(frozen=True)
class SourceArguments:
    """What every kind of source is opened with; `path` is the text after the colon."""

    name: str
    path: str
    split: str
    root: str | None
    val_percent: float
    split_seed: int
    channels: int | None

    def resolve(self, kind: str) -> Path:
        """The file or folder on disk; raises UserError where there is none, naming the nearest one beside it."""
        base = Path(self.root or os.environ.get("MASKAE_DATA") or ".")
        path = base / Path(self.path).expanduser()
        exists = path.is_dir() if kind == "folder" else path.is_file()
        if not exists:
            beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
            raise UserError(f"{self.name}: no {kind} {path}{nearest(path.name, beside)}")
        return path


def scalar_statistics(images: np.ndarray, max_value: int) -> tuple[float, float]:
    """Mean and standard deviation over all values, in units where 1 is `max_value`. images: uint8, any shape."""
    values = images.astype(np.float64) / max_value
    return float(values.mean()), float(values.std())


def open_digits(arguments: SourceArguments) -> Source:
    """scikit-learn's 1,797 scanned 8x8 digits, stratified 1437/360; one mean and std over all training pixels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if arguments.path:
        raise UserError(f"{arguments.name}: digits takes no path (did you mean 'digits'?)")
    if arguments.channels not in (None, 1):
        raise UserError(f"{arguments.name}: the digits have 1 channel, not {arguments.channels}")
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    chosen = train_test_split(np.arange(len(labels)), test_size=DIGITS_VAL_COUNT, stratify=labels, random_state=arguments.split_seed)
    parts = dict(zip(SPLITS, chosen, strict=True))
    mean, std = scalar_statistics(images[parts["train"]], DIGITS_MAX_VALUE)
    members = [[(str(i), int(labels[i])) for i in parts[split]] for split in SPLITS]
    spec = DataSpec(
        name=arguments.name,
        image_shape=(8, 8, 1),
        channels=1,
        mean=(mean,),
        std=(std,),
        max_value=DIGITS_MAX_VALUE,
        num_classes=10,
        class_names=tuple(str(i) for i in range(10)),
        counts={split: len(parts[split]) for split in SPLITS},
        split_hash=split_hash(*members),
    )
    rows = parts[arguments.split]
    return ArraySource(images[rows], labels[rows], rows, spec)


SOURCES: dict[str, Callable[[SourceArguments], Source]] = {"digits": open_digits}


def open_source(
    source: str,
    split: str,
    *,
    root: str | None = None,
    val_percent: float = 10.0,
    split_seed: int = 0,
    channels: int | None = None,
    max_examples: int | None = None,
) -> Source:
    """Opens one split of a data set.

    Args:
      source: `digits`, `folder:PATH`, `npz:PATH`, `arrayrecord:PATH` or `tfds:NAME`.
      split: `train` or `val`.
      root: what relative paths start from; by default the environment variable MASKAE_DATA, else the current folder.
      val_percent: share held out where the data has no validation split of its own (the digits always hold out 360).
      split_seed: chooses which records are held out.
      channels: 1 or 3 to convert every image; None keeps what the source has (3 for images in files).
      max_examples: keep only the first so many records of the split.

    Raises UserError for an unknown source or split, a missing or empty folder, or a split without records.
    """
    kind, _, path = source.partition(":")
    if kind not in SOURCES:
        raise UserError(f"unknown data source '{source}'{nearest(kind, SOURCES)}; there are {', '.join(sorted(SOURCES))}")
    if split not in SPLITS:
        raise UserError(f"{source}: unknown split '{split}'{nearest(split, SPLITS)}; there are {', '.join(SPLITS)}")
    if not 0 <= val_percent < 100:
        raise UserError(f"{source}: val_percent must be at least 0 and below 100, not {val_percent}")
    if max_examples is not None and max_examples < 1:
        raise UserError(f"{source}: max_examples must be at least 1, not {max_examples}")
    opened = SOURCES[kind](SourceArguments(source, path, split, root, val_percent, split_seed, channels))
    if len(opened) == 0:
        raise UserError(f"{source}: no records in split '{split}' (val_percent is {val_percent})")
    return opened if max_examples is None else LimitedSource(opened, max_examples)
