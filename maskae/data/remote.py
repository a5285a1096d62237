"""`arrayrecord:gs://BUCKET/PATH`: shards in a bucket, copied to a local folder when a record of theirs is first asked for.

ArrayRecord's reader is C++ that opens local files (reading buckets takes a build of one's own), and its index is compressed inside the
file, so reading single records over the network would mean a second implementation of the format. A shard is read many times in a run and
fetched once; the price is local disk for the split: the order is global, so every host comes to need every shard sooner or later.

Any file system that fsspec knows will do (gs:// by the package gcsfs, s3:// by s3fs); TensorFlow is not asked, as etils would where it is
installed. Copies are named by their SHA-256 and checked against it, appear under their name only when they are whole, are shared by all
processes of a host, and make room for new ones when the folder is full, least recently opened first.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec

from maskae.data.contract import Record, Source, SourceArguments
from maskae.data.records import SHARDS_FILE, SPEC_FILE, ArrayRecordSource
from maskae.data.spec import BadRecord, DataSpec
from maskae.errors import UserError, describe

FETCH_ATTEMPTS = 3
FETCH_PAUSE_SECONDS = 2.0
BLOCK_BYTES = 1 << 22
PACKAGES = {"gs": "gcsfs (pip install 'maskae[tpu]')", "gcs": "gcsfs (pip install 'maskae[tpu]')", "s3": "s3fs"}


@dataclass(frozen=True)
class Shard:
    """A shard in a bucket: where it is, and what its copy must be."""

    url: str
    records: int
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class ShardFolder:
    """Local copies of shards; processes and threads may share it.

    Attributes:
      path: the folder, made when needed.
      limit: bytes of all copies in it; shards on their way come on top.
    """

    path: Path
    limit: int

    @contextmanager
    def copy(self, shard: Shard, keep: frozenset[str]) -> Iterator[Path]:
        """The local copy of a shard, fetched where it is missing; nobody removes it inside the `with`, in which it is to be opened.

        Copies with a SHA-256 in `keep` are not removed to make room. Raises UserError where the shard cannot be fetched, or is not what
        the list of shards says.
        """
        target = self.path / f"{shard.sha256}.arrayrecord"
        self.path.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not _is_whole(target, shard):
                self._make_room(shard.size, keep)
                _copy_checked(shard, target)
            os.utime(target)
            yield target

    def _make_room(self, size: int, keep: frozenset[str]) -> None:
        with _locked(self.path / "room.lock"):
            copies = sorted(self.path.glob("*.arrayrecord"), key=lambda path: path.stat().st_mtime)
            total = sum(path.stat().st_size for path in copies)
            for path in copies:
                if total + size <= self.limit:
                    return
                if path.stem in keep:
                    continue
                with suppress(BlockingIOError), _locked(path.with_suffix(".lock"), fcntl.LOCK_NB):
                    total -= path.stat().st_size
                    path.unlink()  # who has it open goes on reading it


@contextmanager
def _locked(path: Path, flags: int = 0) -> Iterator[None]:
    # A lock of the file system is let go when its process dies, unlike a file that says "locked".
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
        yield


def _is_whole(path: Path, shard: Shard) -> bool:
    try:
        return path.stat().st_size == shard.size
    except FileNotFoundError:
        return False


def _copy_checked(shard: Shard, target: Path) -> None:
    """Copies the shard to `target`, which appears when the copy is whole and its SHA-256 right. Raises UserError after some attempts."""
    partial = target.with_suffix(".partial")
    for attempt in range(1, FETCH_ATTEMPTS + 1):
        digest = hashlib.sha256()
        try:
            system, path = open_file_system(shard.url)
            with system.open(path, "rb") as remote, partial.open("wb") as local:
                while block := remote.read(BLOCK_BYTES):
                    digest.update(block)
                    local.write(block)
            if digest.hexdigest() == shard.sha256:
                os.replace(partial, target)
                return
            reason = f"its SHA-256 is not the one in {SHARDS_FILE}: damaged, or replaced since"
        except UserError:
            raise
        # Every store has its own exceptions for networks, credentials and missing files.
        except Exception as error:
            reason = describe(error)
        partial.unlink(missing_ok=True)
        logging.warning("%s: %s (attempt %d of %d)", shard.url, reason, attempt, FETCH_ATTEMPTS)
        if attempt < FETCH_ATTEMPTS:
            time.sleep(FETCH_PAUSE_SECONDS * attempt)
    raise UserError(f"{shard.url} cannot be fetched: {reason}")


def open_file_system(url: str) -> tuple[Any, str]:
    """(file system, path in it). Raises UserError where the scheme is unknown or its package is not installed."""
    scheme = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: reading {scheme}:// needs the package {PACKAGES.get(scheme) or describe(error)}") from error
    except ValueError as error:
        raise UserError(f"{url}: {describe(error)}") from error


def read_text(url: str) -> str | None:
    """The text of a small remote file; None where there is none. Raises UserError where the store cannot be read."""
    system, path = open_file_system(url)
    try:
        return system.cat_file(path).decode()
    except FileNotFoundError:
        return None
    # As in _copy_checked; nothing has been trained yet, so there is no second attempt.
    except Exception as error:
        raise UserError(f"{url} cannot be read: {describe(error)}") from error


@dataclass(frozen=True)
class RemoteRecordSource:
    """The records of shards in a bucket, in the order of their names; a shard is fetched when one of its records is asked for."""

    shards: tuple[Shard, ...]
    folder: ShardFolder
    spec: DataSpec
    _opened: dict[int, ArrayRecordSource] = field(default_factory=dict, compare=False, repr=False)
    _lock: Any = field(default_factory=threading.Lock, compare=False, repr=False)

    def __post_init__(self) -> None:
        ends = [0]
        for shard in self.shards:
            ends.append(ends[-1] + shard.records)
        object.__setattr__(self, "_ends", tuple(ends[1:]))

    def __reduce__(self) -> Any:
        # Locks and open files do not travel to worker processes; each opens its own.
        return RemoteRecordSource, (self.shards, self.folder, self.spec)

    def __len__(self) -> int:
        return sum(shard.records for shard in self.shards)

    def _shard_of(self, index: int) -> tuple[ArrayRecordSource, int]:
        """(the shard that holds a record, the record's number in it)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        ends: tuple[int, ...] = self._ends  # type: ignore[attr-defined]
        number = bisect.bisect_right(ends, index)
        if number not in self._opened:
            with self._lock:
                if number not in self._opened:
                    self._opened[number] = self._open(self.shards[number])
        return self._opened[number], index - (ends[number] - self.shards[number].records)

    def _open(self, shard: Shard) -> ArrayRecordSource:
        with self.folder.copy(shard, frozenset(other.sha256 for other in self.shards)) as path:
            opened = ArrayRecordSource((str(path),), self.spec)
            if len(opened) != shard.records:
                raise UserError(f"{shard.url}: {len(opened)} records, but {SHARDS_FILE} says {shard.records}")
            with suppress(BadRecord):
                opened[0]  # the reader opens the file at its first record
            return opened

    def __getitem__(self, index: int) -> Record:
        shard, number = self._shard_of(index)
        return shard[number]

    def name(self, index: int) -> str:
        """As of a local ArrayRecord source: the name in its own data set, where the record can be read."""
        shard, number = self._shard_of(index)
        return f"{self.spec.name} record {index}{shard.origin(number)}"


def open_remote_records(arguments: SourceArguments) -> Source:
    """The split as it was prepared. Raises UserError for a bucket that cannot be read, a folder without lists, or too little room."""
    folder = arguments.url
    assert folder is not None
    texts = {name: read_text(f"{folder}/{name}") for name in (SPEC_FILE, SHARDS_FILE)}
    for name, text in texts.items():
        if text is None:
            raise UserError(f"{arguments.name}: no {name} in {folder}: make the folder with tools/prepare_data.py, then copy it there")
    spec = DataSpec.from_json(texts[SPEC_FILE] or "")
    if arguments.channels not in (None, spec.channels):
        raise UserError(f"{arguments.name}: prepared with {spec.channels} channels, not {arguments.channels}")
    listed = json.loads(texts[SHARDS_FILE] or "")
    names = sorted(name for name in listed if name.startswith(f"{arguments.split}-") and listed[name]["records"])
    shards = tuple(Shard(f"{folder}/{name}", *(listed[name][key] for key in ("records", "bytes", "sha256"))) for name in names)
    if not shards:
        have = ", ".join(split for split, count in spec.counts.items() if count)
        raise UserError(f"{arguments.name}: no shards of split '{arguments.split}' in {folder}, which has {have}")
    total, limit = sum(shard.size for shard in shards), int(arguments.shard_gigabytes * 1e9)
    if total > limit:
        raise UserError(
            f"{arguments.name}: the shards of split '{arguments.split}' take {total / 1e9:.3g} GB on the local disk, more than "
            f"shard_gigabytes={arguments.shard_gigabytes:g}"
        )
    path = Path(arguments.shard_folder).expanduser() if arguments.shard_folder else Path.home() / ".cache" / "maskae" / "shards"
    known = arguments.known_statistics(spec.channels)
    mean, std = known or (spec.mean, spec.std)
    return RemoteRecordSource(shards, ShardFolder(path, limit), replace(spec, name=arguments.name, mean=mean, std=std))
