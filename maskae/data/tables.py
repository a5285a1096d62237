"""Images with a row of a table each: `image`, `label`, `table` float32 [N] and `table_missing` bool [N].

    table_images:PATH@LABEL:COLUMN,...#PATTERN@SHARE    a folder with one .csv and its images, in images.zip or as files
    digits_table:PATTERN@SHARE                          the scanned digits with a table derived from them

The .csv has a column `file`; where it has a column `split`, rows with `train` train and all others validate. `@LABEL` is the column of the
class; `@LABEL=VALUE` asks whether it holds VALUE, `@LABEL=VALUE*` whether it begins so. COLUMN,... are the columns of the table, in any
order; a column whose cells are all numbers, with more than ten different ones, is continuous, and `COLUMN=code` or `COLUMN=number` says it
outright. An empty cell is missing. `#PATTERN@SHARE` takes cells away (`maskae.data.missing_cells`).

In a row categorical columns come first, as codes of the values in the training rows, sorted; continuous ones follow, standardised by the
training rows. A missing cell is 0, and so is one whose value no training row has. `details` name the columns and what codes stand for.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskae.data.archive import ARCHIVE, members, read_member
from maskae.data.contract import SPLITS, Record, Source, SourceArguments, measure_sample, stratified_split
from maskae.data.folder import read_bytes
from maskae.data.missing_cells import parse_removal, removed_cells
from maskae.data.spec import IMAGE, LABEL, NO_LABEL, DataSpec, Field, split_hash
from maskae.errors import UserError, nearest

TABLE, MISSING = "table", "table_missing"
MOST_CODES = 10
KINDS = ("code", "number")
DIGITS_COLUMNS = ("even", "loops", "strokes", "ink", "row", "column", "height", "width", "top", "left")
# Of the digits 0 to 9: closed loops; 0 curved, 1 straight, 2 both.
LOOPS, STROKES = (1, 0, 0, 0, 1, 0, 1, 0, 2, 1), (0, 1, 2, 0, 1, 2, 0, 1, 0, 0)
DIGITS_ERRORS = 0.25  # share of the codes of the derived table that are drawn at random


class Cells(NamedTuple):
    """A table: `values` float32 [M, N] (0 where missing), `missing` bool [M, N], `details` for the spec."""

    values: np.ndarray
    missing: np.ndarray
    details: dict[str, Any]


@dataclass(frozen=True)
class TableSource:
    """Images of `read(i)` or of a parent, with rows of a table.

    Attributes:
        files: of each record, below `folder` or in its zip file.
        cells: of this split.
        labels: int32 [M].
    """

    folder: Path
    files: tuple[str, ...]
    zipped: bool
    cells: Cells
    labels: np.ndarray
    spec: DataSpec

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        image = read_file(self.folder, self.files[index], self.zipped)
        return {IMAGE: image, LABEL: int(self.labels[index]), TABLE: self.cells.values[index], MISSING: self.cells.missing[index]}

    def name(self, index: int) -> str:
        """The folder and the file in it."""
        return f"{self.folder}:{self.files[index]}"


@dataclass(frozen=True)
class WithTable:
    """The records of another source with a row each."""

    parent: Source
    cells: Cells
    spec: DataSpec

    def __len__(self) -> int:
        return len(self.parent)

    def __getitem__(self, index: int) -> Record:
        return {**self.parent[index], TABLE: self.cells.values[index], MISSING: self.cells.missing[index]}

    def name(self, index: int) -> str:
        """The parent's name of the record."""
        return self.parent.name(index)


def read_file(folder: Path, file: str, zipped: bool) -> bytes:
    """The bytes of an image. Raises BadRecord where it cannot be read."""
    return read_member(folder / ARCHIVE, file) if zipped else read_bytes(folder / file)


def table_fields(columns: int) -> dict[str, Field]:
    """The fields of a record."""
    return {TABLE: Field((columns,), "float32"), MISSING: Field((columns,), "bool")}


def read_csv(path: Path, name: str) -> list[dict[str, str]]:
    """Its rows. Raises UserError where it is no table with a column `file`."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{name}: {path} is no table: {error}") from error
    if "file" not in columns:
        raise UserError(f"{name}: {path} has no column 'file'{nearest('file', columns)}; it has {', '.join(columns)}")
    if not rows:
        raise UserError(f"{name}: {path} has no rows")
    if any(None in row or None in row.values() for row in rows):
        raise UserError(f"{name}: {path} has rows with more or fewer cells than columns")
    return rows


def check_column(column: str, row: dict[str, str], name: str) -> None:
    """Raises UserError where the table has no such column."""
    if column not in row:
        raise UserError(f"{name}: the table has no column '{column}'{nearest(column, row)}; it has {', '.join(row)}")


def labels_of(rows: Sequence[dict[str, str]], wanted: str, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels int32 [M] (-1 where the cell is empty) and the names of the classes, by what stands behind the @."""
    if not wanted:
        return np.full(len(rows), NO_LABEL, np.int32), ()
    column, asked, value = wanted.partition("=")
    check_column(column, rows[0], name)
    texts = [row[column] for row in rows]
    if not asked:
        classes = tuple(sorted({text for text in texts if text}))
        return np.asarray([classes.index(text) if text else NO_LABEL for text in texts], np.int32), classes
    stem = value.removesuffix("*")
    holds = [text.startswith(stem) if value.endswith("*") else text == value for text in texts]
    if not any(holds):
        raise UserError(f"{name}: no row has {column} '{value}'{nearest(value, set(texts))}")
    labels = [int(hold) if text else NO_LABEL for hold, text in zip(holds, texts, strict=True)]
    return np.asarray(labels, np.int32), ("other", stem)


def numbers_in(texts: Sequence[str]) -> np.ndarray | None:
    """float64 [M], NaN for an empty cell; None where a cell holds no finite number."""
    try:
        numbers = np.asarray([float(text) if text else np.nan for text in texts])
    except ValueError:
        return None
    return None if any(text and not np.isfinite(number) for text, number in zip(texts, numbers, strict=True)) else numbers


def encode_table(rows: Sequence[dict[str, str]], wanted: Sequence[str], trains: np.ndarray, name: str) -> Cells:
    """The wanted columns of all rows, categorical ones first; see the top of this module. trains: bool [M]."""
    coded: list[tuple[str, np.ndarray, np.ndarray, list[str]]] = []
    scaled: list[tuple[str, np.ndarray, np.ndarray, list[float]]] = []
    for each in wanted:
        column, _, kind = each.partition("=")
        check_column(column, rows[0], name)
        if kind and kind not in KINDS:
            raise UserError(f"{name}: {column}={kind}: a column is one of {', '.join(KINDS)}{nearest(kind, KINDS)}")
        texts = [row[column].strip() for row in rows]
        numbers = None if kind == "code" else numbers_in(texts)
        if kind == "number" and numbers is None:
            raise UserError(f"{name}: column '{column}' has cells that are no numbers")
        known = sorted({text for text, train in zip(texts, trains, strict=True) if text and train})
        if not known:
            raise UserError(f"{name}: column '{column}' is empty in every training row")
        if numbers is not None and (kind == "number" or len(known) > MOST_CODES):
            there = numbers[trains & ~np.isnan(numbers)]
            mean, deviation = float(there.mean()), float(there.std()) or 1.0
            scaled.append((column, (numbers - mean) / deviation, np.isnan(numbers), [mean, deviation]))
        else:
            codes = np.asarray([known.index(text) if text in known else -1 for text in texts])
            coded.append((column, codes.astype(np.float64), codes < 0, known))
    missing = np.stack([each[2] for each in (*coded, *scaled)], 1)
    values = np.where(missing, 0.0, np.stack([each[1] for each in (*coded, *scaled)], 1)).astype(np.float32)
    details = {
        "columns": [each[0] for each in (*coded, *scaled)],
        "cardinalities": [len(each[3]) for each in coded],
        "codes": {each[0]: each[3] for each in coded},
        "mean_and_deviation": {each[0]: each[3] for each in scaled},
    }
    return Cells(values, missing, details)


def with_removed(cells: Cells, parts: dict[str, np.ndarray], labels: np.ndarray, text: str, name: str) -> Cells:
    """Cells [M, N] without those that `PATTERN@SHARE` takes; rows int [m] of each split in `parts`."""
    removal = parse_removal(text, name)
    if removal is None:
        return cells
    tables = {split: cells.values[rows] for split, rows in parts.items()}
    missing = cells.missing.copy()
    for split, taken in removed_cells(removal, tables, labels[parts["train"]]).items():
        missing[parts[split]] |= taken
    return Cells(np.where(missing, 0.0, cells.values).astype(np.float32), missing, cells.details)


def take(cells: Cells, rows: np.ndarray) -> Cells:
    """Some rows."""
    return Cells(cells.values[rows], cells.missing[rows], cells.details)


def _table_file(folder: Path, name: str) -> Path:
    found = sorted(folder.glob("*.csv"))
    if len(found) != 1:
        raise UserError(f"{name}: {folder} must hold one .csv file, not {len(found)}: {', '.join(path.name for path in found) or 'none'}")
    return found[0]


def _files(folder: Path, rows: Sequence[dict[str, str]], name: str) -> tuple[list[str], bool]:
    """The images' names, and whether they are in a zip file. Raises UserError where one is absent."""
    files, zipped = [row["file"] for row in rows], (folder / ARCHIVE).is_file()
    known = members(folder / ARCHIVE, name) if zipped else None
    absent = [file for file in files if (file not in known if known is not None else not (folder / file).is_file())]
    if absent:
        place = folder / ARCHIVE if zipped else folder
        raise UserError(f"{name}: {len(absent)} files of the table are not in {place}, for example {absent[0]}")
    return files, zipped


def open_table_images(arguments: SourceArguments) -> Source:
    """The split of a folder of images with a table. Raises UserError for a missing or unusable folder, table or column."""
    rest, _, removal = arguments.path.partition("#")
    place, _, listed = rest.partition(":")
    place, _, wanted_label = place.partition("@")
    wanted = [column.strip() for column in listed.split(",") if column.strip()]
    name = arguments.name
    if not wanted:
        raise UserError(f"{name}: name the table's columns, as in table_images:PATH@LABEL:age,sex")
    folder = dataclasses.replace(arguments, path=place).resolve("folder")
    rows = read_csv(_table_file(folder, name), name)
    labels, classes = labels_of(rows, wanted_label, name)
    if "split" in rows[0]:
        trains = np.asarray([row["split"] == "train" for row in rows], bool)
        halves = np.flatnonzero(trains), np.flatnonzero(~trains)
    else:
        halves = stratified_split(labels, arguments.val_percent, arguments.split_seed)
        trains = np.isin(np.arange(len(rows)), halves[0])
    parts = dict(zip(SPLITS, halves, strict=True))
    cells = with_removed(encode_table(rows, wanted, trains, name), parts, labels, removal, name)
    files, zipped = _files(folder, rows, name)
    channels = arguments.channels or 3
    train = parts["train"]
    known = arguments.known_statistics(channels)
    mean, std = known or measure_sample(lambda i: read_file(folder, files[train[i]], zipped), len(train), channels)
    spec = DataSpec(
        name=name,
        image_shape=None,
        channels=channels,
        mean=mean,
        std=std,
        num_classes=len(classes) or None,
        class_names=classes,
        counts={split: len(part) for split, part in parts.items()},
        split_hash=split_hash(*([(files[i], int(labels[i])) for i in parts[split]] for split in SPLITS)),
        fields=table_fields(cells.values.shape[1]),
        details=cells.details,
    )
    chosen = parts[arguments.split]
    return TableSource(folder, tuple(files[i] for i in chosen), zipped, take(cells, chosen), labels[chosen], spec)


def derived_row(image: np.ndarray, label: int, number: int) -> list[float]:
    """A digit's row: three codes of what the digit is, of which some are wrong, and seven measures of its image.

    image: uint8 [8, 8, 1]; `number` of the record, which decides what is wrong.
    """
    ink = image[..., 0].astype(np.float64) / image.max()
    weight, (rows, columns) = ink / ink.sum(), np.indices(ink.shape)
    row, column = (weight * rows).sum(), (weight * columns).sum()
    height, width = (np.sqrt((weight * (axis - middle) ** 2).sum()) for axis, middle in ((rows, row), (columns, column)))
    generator = np.random.default_rng([2024, number])
    true = (label % 2, LOOPS[label], STROKES[label])
    wrong, other = generator.random(3) < DIGITS_ERRORS, generator.integers(0, (2, 3, 3))
    codes = [int(o if w else t) for t, w, o in zip(true, wrong, other, strict=True)]
    half = ink.shape[0] // 2
    return [*codes, ink.sum(), row, column, height, width, weight[:half].sum(), weight[:, :half].sum()]


def open_digits_table(arguments: SourceArguments, open_digits: Callable[[SourceArguments], Any]) -> Source:
    """The digits that `open_digits` gives, with `derived_row`s, continuous columns standardised."""
    sources = {split: open_digits(dataclasses.replace(arguments, path="", split=split)) for split in SPLITS}
    records = [(source[i], int(source.origin[i])) for source in sources.values() for i in range(len(source))]
    values = np.asarray([derived_row(record[IMAGE], record[LABEL], number) for record, number in records])
    ends = np.cumsum([len(source) for source in sources.values()])
    parts = {"train": np.arange(ends[0]), "val": np.arange(ends[0], ends[1])}
    numbers = values[parts["train"], 3:]
    values[:, 3:] = (values[:, 3:] - numbers.mean(0)) / numbers.std(0)
    details = {"columns": list(DIGITS_COLUMNS), "cardinalities": [2, 3, 3]}
    labels = np.asarray([record[LABEL] for record, _ in records])
    whole = Cells(values.astype(np.float32), np.zeros(values.shape, bool), details)
    cells = with_removed(whole, parts, labels, arguments.path, arguments.name)
    chosen = sources[arguments.split]
    spec = dataclasses.replace(chosen.spec, name=arguments.name, fields=table_fields(values.shape[1]), details=details)
    return WithTable(chosen, take(cells, parts[arguments.split]), spec)
