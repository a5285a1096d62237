"""`folder:PATH`: image files in folders.

    PATH/dog/1.jpg  PATH/cat/2.png        classes are the subfolders, sorted; val_percent of each class is held out
    PATH/train/dog/1.jpg  PATH/val/...    the split is as the folders say
    PATH/1.jpg                            no subfolders: no labels (also under train/ and val/)

Files are found at any depth below a class. Names that start with a dot are passed over.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maskae.data.contract import Record, Source, SourceArguments, Statistics, measure_sample, stratified_split
from maskae.data.images import SUFFIXES
from maskae.data.spec import IMAGE, LABEL, NO_LABEL, BadRecord, DataSpec, split_hash
from maskae.errors import UserError, nearest


class FileKind(NamedTuple):
    """Which files of a folder count: what to call them in a message, and the ends of their names, in lower case."""

    plural: str
    suffixes: tuple[str, ...]


IMAGES = FileKind("images", SUFFIXES)


@dataclass(frozen=True)
class FolderSource:
    """Image files. `files` are relative to `root`; labels: int32 [N], -1 where there are no classes."""

    root: Path
    files: tuple[str, ...]
    labels: np.ndarray
    spec: DataSpec

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        return {IMAGE: read_bytes(self.root / self.files[index]), LABEL: int(self.labels[index])}

    def name(self, index: int) -> str:
        """The path of the file."""
        return str(self.root / self.files[index])


@dataclass(frozen=True)
class Listing:
    """Files with their labels (int32 [N]) and the names of the classes."""

    files: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]

    def take(self, rows: np.ndarray) -> Listing:
        """The listing of some rows."""
        return Listing(tuple(self.files[i] for i in rows), self.labels[rows], self.class_names)

    def under(self, folder: str) -> Listing:
        """The same files as seen from the parent of `folder`."""
        return Listing(tuple(f"{folder}/{file}" for file in self.files), self.labels, self.class_names)


def read_bytes(path: Path) -> bytes:
    """The file's bytes. Raises BadRecord where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadRecord(error.strerror or str(error)) from error


def files_below(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Paths of all files of these suffixes below a folder, relative to it, with forward slashes, sorted; links to folders are followed."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = os.path.relpath(parent, folder).replace(os.sep, "/")
        prefix = "" if relative == "." else relative + "/"
        found += [prefix + name for name in files if name.lower().endswith(suffixes) and not name.startswith(".")]
    return sorted(found)


def list_folder(folder: Path, name: str, class_names: tuple[str, ...] | None = None, kind: FileKind = IMAGES) -> Listing:
    """The files of a kind below a folder, with the subfolders as classes (`class_names` gives them where they are already known).

    Raises UserError where there is no such file, where files lie beside class folders, or for a class that is not in `class_names`.
    """
    files = files_below(folder, kind.suffixes)
    if not files:
        raise UserError(f"{name}: no {kind.plural} in {folder} (of {', '.join(kind.suffixes)})")
    owners = [file.partition("/")[0] if "/" in file else "" for file in files]
    classes = tuple(sorted(set(owners) - {""}))
    if not classes and not class_names:
        return Listing(tuple(files), np.full(len(files), NO_LABEL, np.int32), ())
    if "" in owners:
        raise UserError(
            f"{name}: {owners.count('')} {kind.plural}, for example {files[owners.index('')]}, lie beside the class folders of {folder}"
        )
    known = class_names if class_names is not None else classes
    for label in classes:
        if label not in known:
            raise UserError(f"{name}: class '{label}' of {folder} is not among the training classes{nearest(label, known)}")
    numbers = {label: number for number, label in enumerate(known)}
    return Listing(tuple(files), np.asarray([numbers[owner] for owner in owners], np.int32), known)


def split_folder(root: Path, arguments: SourceArguments, kind: FileKind = IMAGES) -> dict[str, Listing]:
    """The training and the validation files: from `train/` and `val/` where both are there, else by `stratified_split`."""
    if not (root / "train").is_dir():
        whole = list_folder(root, arguments.name, kind=kind)
    elif (root / "val").is_dir():
        train = list_folder(root / "train", arguments.name, kind=kind)
        val = list_folder(root / "val", arguments.name, train.class_names, kind)
        return {"train": train.under("train"), "val": val.under("val")}
    else:
        whole = list_folder(root / "train", arguments.name, kind=kind).under("train")
    rows = stratified_split(whole.labels, arguments.val_percent, arguments.split_seed)
    return {"train": whole.take(rows[0]), "val": whole.take(rows[1])}


@functools.lru_cache(maxsize=8)
def _measure_files(root: Path, files: tuple[str, ...], channels: int) -> Statistics:
    # Cached: the training and the validation source of a run are opened one after the other, with the same statistics.
    return measure_sample(lambda index: read_bytes(root / files[index]), len(files), channels)


def open_folder(arguments: SourceArguments) -> Source:
    """The split of a folder of images. Raises UserError for a folder that is missing or has no images."""
    root = arguments.resolve("folder")
    parts = split_folder(root, arguments)
    channels = arguments.channels or 3
    if channels not in (1, 3):
        raise UserError(f"{arguments.name}: image files are read with 1 or 3 channels, not {channels}")
    train = parts["train"]
    mean, std = arguments.known_statistics(channels) or _measure_files(root, train.files, channels)
    members = [list(zip(parts[split].files, parts[split].labels.tolist(), strict=True)) for split in ("train", "val")]
    spec = DataSpec(
        name=arguments.name,
        image_shape=None,
        channels=channels,
        mean=mean,
        std=std,
        num_classes=len(train.class_names) or None,
        class_names=train.class_names,
        counts={split: len(part.files) for split, part in parts.items()},
        split_hash=split_hash(*members),
    )
    chosen = parts[arguments.split]
    return FolderSource(root, chosen.files, chosen.labels, spec)
