"""`archive:PATH`: the images of one zip file with a table beside it.

    PATH/images.zip    image files, at any depth
    PATH/labels.csv    with the columns file and label (whole numbers from 0 on), and where there are such: class, split

Records whose split is `train` train, those of any other split validate; without the column val_percent of each label are held out.
"""

from __future__ import annotations

import csv
import functools
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskae.data.contract import SPLITS, Record, Source, SourceArguments, measure_sample, stratified_split
from maskae.data.spec import IMAGE, LABEL, BadRecord, DataSpec, split_hash
from maskae.errors import UserError, nearest

ARCHIVE, TABLE = "images.zip", "labels.csv"


@functools.lru_cache(maxsize=64)
def _archive(path: Path, process: int) -> zipfile.ZipFile:
    # One handle per process: forked workers would move each other's file position. Within a process zipfile has a lock.
    return zipfile.ZipFile(path)


def read_member(path: Path, member: str) -> bytes:
    """The bytes of a file of a zip file. Raises BadRecord where it cannot be read."""
    try:
        return _archive(path, os.getpid()).read(member)
    except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise BadRecord(f"{member}: {error}") from error


def members(path: Path, name: str) -> set[str]:
    """The files in a zip file. Raises UserError, which names the source `name`, where it is none."""
    try:
        return set(_archive(path, os.getpid()).namelist())
    except zipfile.BadZipFile as error:
        raise UserError(f"{name}: {path} is no zip file: {error}") from error


@dataclass(frozen=True)
class ArchiveSource:
    """Image files of the zip file `path`. labels: int32 [N]."""

    path: Path
    files: tuple[str, ...]
    labels: np.ndarray
    spec: DataSpec

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        return {IMAGE: read_member(self.path, self.files[index]), LABEL: int(self.labels[index])}

    def name(self, index: int) -> str:
        """The archive and the file in it."""
        return f"{self.path}:{self.files[index]}"


def read_rows(path: Path, name: str) -> list[dict[str, str]]:
    """The lines of the table. Raises UserError, which names the source `name`, for a missing column or a label that is no number."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        for wanted in ("file", "label"):
            if wanted not in columns:
                raise UserError(f"{name}: {path} has no column '{wanted}'{nearest(wanted, columns)}; it has {', '.join(columns)}")
        rows = list(reader)
    for row in rows:
        if not row["label"].isdigit():
            raise UserError(f"{name}: {path}: the label of {row['file']} is '{row['label']}', not a whole number from 0 on")
    return rows


def open_archive(arguments: SourceArguments) -> Source:
    """The split of a zip file of images. Raises UserError for a missing or unusable archive or table."""
    folder = arguments.resolve("folder")
    path = folder / ARCHIVE
    for part in (path, folder / TABLE):
        if not part.is_file():
            raise UserError(f"{arguments.name}: no file {part}; archive: reads {ARCHIVE} and {TABLE}")
    rows = read_rows(folder / TABLE, arguments.name)
    known_files = members(path, arguments.name)
    if absent := [row["file"] for row in rows if row["file"] not in known_files]:
        raise UserError(f"{arguments.name}: {len(absent)} files of {TABLE} are not in {path}, for example {absent[0]}")
    labels = np.asarray([int(row["label"]) for row in rows], np.int32)
    if rows and "split" in rows[0]:
        trains = np.asarray([row["split"] == "train" for row in rows], bool)
        parts = dict(zip(SPLITS, (np.flatnonzero(trains), np.flatnonzero(~trains)), strict=True))
    else:
        parts = dict(zip(SPLITS, stratified_split(labels, arguments.val_percent, arguments.split_seed), strict=True))
    files = [row["file"] for row in rows]
    channels = arguments.channels or 3
    train = parts["train"]
    known = arguments.known_statistics(channels)
    mean, std = known or measure_sample(lambda index: read_member(path, files[train[index]]), len(train), channels)
    names = {int(row["label"]): row["class"] for row in rows if row.get("class")}
    classes = int(np.max(labels, initial=-1)) + 1
    spec = DataSpec(
        name=arguments.name,
        image_shape=None,
        channels=channels,
        mean=mean,
        std=std,
        num_classes=classes or None,
        class_names=tuple(names.get(number, str(number)) for number in range(classes)) if names else (),
        counts={split: len(part) for split, part in parts.items()},
        split_hash=split_hash(*([(files[i], int(labels[i])) for i in parts[split]] for split in SPLITS)),
    )
    chosen = parts[arguments.split]
    return ArchiveSource(path, tuple(files[i] for i in chosen), labels[chosen], spec)
