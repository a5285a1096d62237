"""`arrayrecord:PATH`: shards of image files with their labels, and the `spec.json` beside them.

    PATH/spec.json  PATH/shards.json  PATH/train-00000-of-00004.arrayrecord  ...  PATH/val-00000-of-00001.arrayrecord

`tools/prepare_data.py` writes them; shards.json says how many records and bytes each shard has, and its SHA-256.
A record is a msgpack map {"image": bytes of an image file, "label": int, "name": text}.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgpack
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from maskae.data.contract import Record, Source, SourceArguments
from maskae.data.spec import IMAGE, LABEL, BadRecord, DataSpec
from maskae.errors import UserError

SPEC_FILE = "spec.json"
SHARDS_FILE = "shards.json"


@dataclass(frozen=True)
class ArrayRecordSource:
    """The records of some shards, in the order of their names."""

    shards: tuple[str, ...]
    spec: DataSpec

    @cached_property
    def _records(self) -> Any:
        return ArrayRecordDataSource(list(self.shards))

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to worker processes; each opens its own.
        return {"shards": self.shards, "spec": self.spec}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __len__(self) -> int:
        return len(self._records)

    def _unpack(self, index: int) -> dict[str, Any]:
        try:
            return msgpack.unpackb(self._records[index])
        # What the reader raises for a damaged shard depends on where the damage is.
        except (RuntimeError, ValueError, IndexError, OSError, msgpack.UnpackException) as error:
            raise BadRecord(f"damaged record: {error}") from error

    def __getitem__(self, index: int) -> Record:
        record = self._unpack(index)
        return {IMAGE: record["image"], LABEL: record["label"]}

    def name(self, index: int) -> str:
        """The name the record had in its own data set, or its number where the record is damaged."""
        return f"{self.spec.name} record {index}{self.origin(index)}"

    def origin(self, index: int) -> str:
        """` (name in its own data set)`, or nothing where the record is damaged."""
        try:
            return f" ({self._unpack(index)['name']})"
        except BadRecord:
            return ""


class RecordWriter:
    """Writes records to numbered shards of one split; records go to the shards in turn blocks of equal length."""

    def __init__(self, folder: Path, split: str, count: int, shards: int):
        """`count` records are expected; a shard takes count / shards of them, rounded up."""
        self._per_shard = -(-count // shards)
        self._paths = [folder / f"{split}-{shard:05d}-of-{shards:05d}.arrayrecord" for shard in range(shards)]
        self._writer: ArrayRecordWriter | None = None
        self.written = 0
        self._opened = 0

    def write(self, image: bytes, label: int, name: str) -> None:
        """Appends one record."""
        if self._writer is None or (self.written >= self._opened * self._per_shard and self._opened < len(self._paths)):
            self._next_shard()
        assert self._writer is not None
        self._writer.write(msgpack.packb({"image": image, "label": label, "name": name}))
        self.written += 1

    def _next_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
        # One record per group: random access reads whole groups.
        self._writer = ArrayRecordWriter(str(self._paths[self._opened]), "group_size:1")
        self._opened += 1

    def close(self) -> None:
        """Ends the last shard; shards that got no record are written empty, so that the numbers in the names hold."""
        while self._opened < len(self._paths):
            self._next_shard()
        if self._writer is not None:
            self._writer.close()


def list_shards(folder: Path) -> str:
    """The text of shards.json for the shards in a folder: {file: {"records", "bytes", "sha256"}}."""
    listed = {}
    for path in sorted(folder.glob("*.arrayrecord")):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        listed[path.name] = {"records": len(ArrayRecordDataSource([str(path)])), "bytes": path.stat().st_size, "sha256": digest}
    return json.dumps(listed, indent=1) + "\n"


def open_array_record(arguments: SourceArguments) -> Source:
    """The split as it was prepared (val_percent and split_seed were chosen then). Raises UserError for a folder without spec or shards."""
    folder = arguments.resolve("folder")
    if not (folder / SPEC_FILE).is_file():
        raise UserError(f"{arguments.name}: no {SPEC_FILE} in {folder}: make the folder with tools/prepare_data.py")
    spec = DataSpec.from_json((folder / SPEC_FILE).read_text())
    if arguments.channels not in (None, spec.channels):
        raise UserError(f"{arguments.name}: prepared with {spec.channels} channels, not {arguments.channels}")
    shards = sorted(str(path) for path in folder.glob(f"{arguments.split}-*-of-*.arrayrecord"))
    if not shards:
        have = ", ".join(split for split, count in spec.counts.items() if count)
        raise UserError(f"{arguments.name}: no shards of split '{arguments.split}' in {folder}, which has {have}")
    expected = int(shards[0].rpartition("-of-")[2].partition(".")[0])
    if len(shards) != expected:
        raise UserError(f"{arguments.name}: {len(shards)} of {expected} shards of split '{arguments.split}' are in {folder}")
    known = arguments.known_statistics(spec.channels)
    mean, std = known or (spec.mean, spec.std)
    source = ArrayRecordSource(tuple(shards), dataclasses.replace(spec, name=arguments.name, mean=mean, std=std))
    if len(source) != spec.counts[arguments.split]:
        raise UserError(
            f"{arguments.name}: {len(source)} records, but {SPEC_FILE} says {spec.counts[arguments.split]}: the copy is incomplete"
        )
    return source
