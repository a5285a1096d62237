"""`domains:PATH[:HELD_OUT]`: real and fake images of several domains, one of which may be kept out of training.

    PATH/<domain>/real/...  PATH/<domain>/fake/...     image files at any depth
    PATH/images.zip  PATH/labels.csv                   or an archive with the columns file, label (0 real, 1 fake) and domain

Without a column `domain` the column `source` is read: it tells where real and where fake images come from, and the first source of the one,
in alphabetical order, makes a domain with the first of the other. Of every domain and label val_percent are held out; the domain HELD_OUT
does not train at all and validates with all of its records. Training records lie in one run per domain and label (`maskae.data.episodes`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskae.data.archive import ARCHIVE, TABLE, members, read_member, read_rows
from maskae.data.contract import SPLITS, Record, Source, SourceArguments, measure_sample, stratified_split
from maskae.data.folder import IMAGES, files_below, read_bytes
from maskae.data.spec import IMAGE, LABEL, DataSpec, Field, split_hash
from maskae.errors import UserError, check_choice

CLASSES = ("real", "fake")
DOMAIN, SEEN = "domain", "seen"
FIELDS = {DOMAIN: Field((), "int32"), SEEN: Field((), "int32")}


class Entry(NamedTuple):
    """One record: its domain and class, what it is made of, its name, and whether it validates."""

    domain: int
    label: int
    item: Any
    name: str
    validates: bool


@dataclass(frozen=True)
class DomainSource:
    """Records of one split: `make(entry)` gives the image; `seen` 0 marks those of a domain that is not trained on."""

    entries: tuple[Entry, ...]
    held_out: int
    make: Callable[[Entry], Any]
    spec: DataSpec

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Record:
        entry = self.entries[index]
        seen = np.int32(entry.domain != self.held_out)
        return {IMAGE: self.make(entry), LABEL: entry.label, DOMAIN: np.int32(entry.domain), SEEN: seen}

    def name(self, index: int) -> str:
        """What the record is made of."""
        return self.entries[index].name


def arrange(entries: Sequence[Entry], held_out: int) -> dict[str, tuple[Entry, ...]]:
    """Each split's records: training ones in one run per domain and class, validating ones of all domains and classes by turns."""
    trains = sorted((each for each in entries if not each.validates and each.domain != held_out), key=lambda each: each[:2])
    validating = [each for each in entries if each.validates or each.domain == held_out]
    counts: dict[tuple[int, int], int] = {}
    turns = []
    for each in validating:
        turns.append(counts.get(each[:2], 0))
        counts[each[:2]] = turns[-1] + 1
    by_turns = sorted(range(len(validating)), key=lambda i: (turns[i], *validating[i][:2]))
    return {"train": tuple(trains), "val": tuple(validating[i] for i in by_turns)}


def runs_of(entries: Sequence[Entry], domains: int) -> list[list[list[int]]]:
    """The first record and the number of records of each domain and class, of records in the order of `arrange`."""
    runs = [[[0, 0] for _ in CLASSES] for _ in range(domains)]
    for index, entry in enumerate(entries):
        run = runs[entry.domain][entry.label]
        if run[1] == 0:
            run[0] = index
        run[1] += 1
    return runs


def number_of(name: str, domains: Sequence[str], source: str) -> int:
    """The number of the domain called `name`, -1 for no name. Raises UserError for an unknown one."""
    if not name:
        return -1
    check_choice(f"held-out domain of {source}", name, domains)
    return list(domains).index(name)


def make_source(
    arguments: SourceArguments,
    entries: Sequence[Entry],
    domains: Sequence[str],
    held_out: str,
    make: Callable[[Entry], Any],
    image_shape: tuple[int, int, int] | None = None,
) -> Source:
    """The wanted split of `entries`. Raises UserError for an unknown domain, and for one without real or without fake records."""
    number = number_of(held_out, domains, arguments.name)
    for domain, name in enumerate(domains):
        for label, kind in enumerate(CLASSES):
            if not any(each[:2] == (domain, label) for each in entries):
                raise UserError(f"{arguments.name}: domain '{name}' has no {kind} images")
    parts = arrange(entries, number)
    channels = arguments.channels or 3
    train = parts["train"]
    if not train:
        raise UserError(f"{arguments.name}: no domain is left to train on")
    mean, std = arguments.known_statistics(channels) or measure_sample(lambda index: make(train[index]), len(train), channels)
    spec = DataSpec(
        name=arguments.name,
        image_shape=image_shape,
        channels=channels,
        mean=mean,
        std=std,
        num_classes=len(CLASSES),
        class_names=CLASSES,
        counts={split: len(parts[split]) for split in SPLITS},
        split_hash=split_hash(*([(each.name, each.label) for each in parts[split]] for split in SPLITS)),
        fields=FIELDS,
        details={"domains": list(domains), "held_out": held_out, "runs": runs_of(train, len(domains))},
    )
    return DomainSource(parts[arguments.split], number, make, spec)


def split_path(arguments: SourceArguments) -> tuple[str, str]:
    """(path, held-out domain or "") of `path:domain`."""
    path, _, held_out = arguments.path.partition(":")
    return path, held_out


def _validating(found: Sequence[tuple[int, int, Any, str]], arguments: SourceArguments) -> list[Entry]:
    strata = np.asarray([domain * len(CLASSES) + label for domain, label, _, _ in found])
    chosen = set(stratified_split(strata, arguments.val_percent, arguments.split_seed)[1].tolist())
    return [Entry(*each, index in chosen) for index, each in enumerate(found)]


def _read_file(root: Path, entry: Entry) -> bytes:
    return read_bytes(root / entry.item)


def _read_member(path: Path, entry: Entry) -> bytes:
    return read_member(path, entry.item)


def _paired(rows: Sequence[dict[str, str]], name: str) -> list[str]:
    """The domain of each row by the sources of its label."""
    sources = [sorted({row["source"] for row in rows if row["label"] == str(label)}) for label in range(len(CLASSES))]
    if len(sources[0]) != len(sources[1]):
        counts = f"{len(sources[0])} sources of real and {len(sources[1])} of fake images"
        raise UserError(f"{name}: {counts} make no pairs; add a column 'domain'")
    pairs = {source: f"{fake}+{real}" for real, fake in zip(*sources, strict=True) for source in (real, fake)}
    return [pairs[row["source"]] for row in rows]


def open_domains(arguments: SourceArguments) -> Source:
    """The split of a folder or an archive of domains. Raises UserError for one without domains, or a domain that lacks a class."""
    path, held_out = split_path(arguments)
    root = dataclasses.replace(arguments, path=path).resolve("folder")
    if (root / ARCHIVE).is_file() and (root / TABLE).is_file():
        rows = read_rows(root / TABLE, arguments.name)
        known = members(root / ARCHIVE, arguments.name)
        if absent := [row["file"] for row in rows if row["file"] not in known]:
            raise UserError(f"{arguments.name}: {len(absent)} files of {TABLE} are not in {ARCHIVE}, for example {absent[0]}")
        if not rows or not {"domain", "source"} & set(rows[0]):
            raise UserError(f"{arguments.name}: {root / TABLE} has no column 'domain' and no column 'source'")
        if wrong := [row["file"] for row in rows if int(row["label"]) >= len(CLASSES)]:
            raise UserError(f"{arguments.name}: the label of {wrong[0]} is neither 0 (real) nor 1 (fake)")
        owners = [row["domain"] for row in rows] if "domain" in rows[0] else _paired(rows, arguments.name)
        domains = sorted(set(owners))
        found: list[tuple[int, int, Any, str]] = [
            (domains.index(owner), int(row["label"]), row["file"], row["file"]) for owner, row in zip(owners, rows, strict=True)
        ]
        return make_source(arguments, _validating(found, arguments), domains, held_out, partial(_read_member, root / ARCHIVE))
    files = [file for file in files_below(root, IMAGES.suffixes) if file.count("/") >= 2 and file.split("/")[1] in CLASSES]
    if not files:
        raise UserError(f"{arguments.name}: no images in {root}/<domain>/real and {root}/<domain>/fake")
    domains = sorted({file.split("/")[0] for file in files})
    found = [(domains.index(file.split("/")[0]), CLASSES.index(file.split("/")[1]), file, file) for file in files]
    return make_source(arguments, _validating(found, arguments), domains, held_out, partial(_read_file, root))
