"""Published files, fetched where there are none: each checked against a known checksum, and at its place whole or not at all.

A recipe lists them in `data.downloads` as (place, URL, SHA-256). The place is below the data root; where it ends in a slash it is a folder,
into which the file, a zip or tar archive, is unpacked. What is at a place already is left alone, whatever it holds.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import lzma
import os
import platform
import re
import shutil
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from maskae.errors import UserError, describe

TIMEOUT_SECONDS = 60.0
BLOCK_BYTES = 1 << 20
SHA256 = re.compile(r"[0-9a-f]{64}")
UNPACKING_ERRORS = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Published:
    """A published file and its place.

    Attributes:
      path: of the file, or with `unpacked` of the folder that the archive's members go into.
      checksum: the SHA-256 of what is fetched, 64 hexadecimal digits; or 40, Git's name of it.
    """

    path: Path
    url: str
    checksum: str
    unpacked: bool = False


def parse_downloads(entries: Iterable[Any], base: Path) -> list[Published]:
    """The entries of `data.downloads` as files below `base`. Raises UserError for one that is no (place, URL, SHA-256)."""
    return [_parse_entry(entry, base) for entry in entries]


def _parse_entry(entry: Any, base: Path) -> Published:
    if not isinstance(entry, (tuple, list)) or len(entry) != 3 or not all(isinstance(part, str) for part in entry):
        raise UserError(f"data.downloads: {entry!r} is not (place, URL, SHA-256)")
    place, url, checksum = entry
    parts = PurePosixPath(place).parts
    if not parts or parts[0].startswith(("/", "~")) or ".." in parts:
        raise UserError(f"data.downloads: '{place}' must be a place below the data root, like photos/train.npz, or photos/ for an archive")
    if not url.startswith(("https://", "http://")):
        raise UserError(f"data.downloads: {place}: '{url}' must begin with https:// or http://")
    if not SHA256.fullmatch(checksum):
        raise UserError(f"data.downloads: {place}: '{checksum}' is no SHA-256, which has 64 hexadecimal digits in lower case")
    return Published(base / place, url, checksum, unpacked=place.endswith("/"))


def provide(file: Published, source: str, *, fetch: bool = True) -> None:
    """Fetches `file` unless something is at its place; `source` names the data in messages. The folders above it are made.

    Processes of one host take turns, so that one of them fetches. Hosts that share the disk may fetch at once, each for itself: their
    partial files have different names, and file systems do not all know of locks that other hosts hold.

    Raises UserError where the file cannot be fetched, or may not be (`fetch`), or is not what the checksum says; nothing is left then.
    """
    if file.path.exists():
        return
    if not fetch:
        raise UserError(f"{source}: {file.path} is not there; a run fetches it from {file.url}")
    partial = _hidden(file.path, "partial")
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        while not file.path.exists():
            with partial.open("ab") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)  # let go when its process dies
                if not _is_at(stream, partial):
                    continue  # it was another process's, which is done with it
                try:
                    if not file.path.exists():
                        _bring(file, stream, partial, source)
                finally:
                    partial.unlink(missing_ok=True)
    except (OSError, HTTPException) as error:
        raise UserError(f"{source}: {file.path} is not there, and {file.url} cannot be fetched: {describe(error)}") from error


def checksum_of(path: Path, like: str) -> str:
    """A file's checksum of the same kind as `like`: its SHA-256, or Git's name, the SHA-1 of "blob <size>\\0" and the bytes."""

    def start() -> Any:
        return hashlib.sha256() if SHA256.fullmatch(like) else hashlib.sha1(b"blob %d\0" % path.stat().st_size)

    with path.open("rb") as file:
        return hashlib.file_digest(file, start).hexdigest()


def _hidden(path: Path, ending: str) -> Path:
    """A name beside `path` that is this host's own."""
    return path.with_name(f".{path.name}.{platform.node()}.{ending}")


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _bring(file: Published, stream: BinaryIO, partial: Path, source: str) -> None:
    """Fetches `file` to `stream`, which is open at `partial`, checks it and puts it in its place."""
    logging.info("fetching %s to %s", file.url, file.path)
    stream.truncate(0)  # of what a killed process left
    with urllib.request.urlopen(file.url, timeout=TIMEOUT_SECONDS) as answer:
        shutil.copyfileobj(answer, stream, BLOCK_BYTES)
        expected = answer.headers["Content-Length"]
    stream.flush()
    size = partial.stat().st_size
    if expected and size != int(expected):
        raise UserError(f"{source}: {file.path} is not there, and {file.url} ended after {size} of {expected} bytes")
    found = checksum_of(partial, file.checksum)
    if found != file.checksum:
        raise UserError(f"{source}: {file.url} is not the published file: its checksum is {found}, not {file.checksum}")
    if file.unpacked:
        _unpack(file, partial, source)
    else:
        partial.replace(file.path)


def _unpack(file: Published, archive: Path, source: str) -> None:
    """The folder appears when everything is in it."""
    partial = _hidden(file.path, "unpacked")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        if tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                tar.extractall(partial, filter="data")
        else:
            _unpack_zip(archive, partial)
        partial.rename(file.path)
    except UNPACKING_ERRORS as error:
        raise UserError(f"{source}: {file.url} cannot be unpacked to {file.path}: {describe(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as members:
        for name in members.namelist():
            # The library would put it somewhere inside instead.
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise zipfile.BadZipFile(f"'{name}' leaves the folder")
        members.extractall(folder)
