"""Published files fetched where there are none, each checked against the contents that are known."""

from __future__ import annotations

import hashlib
import logging
import urllib.request
from pathlib import Path

from maskae.errors import UserError


def blob_name(content: bytes) -> str:
    """Git's name of a file's contents: the SHA-1 of "blob <size>\\0" and the bytes."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def download(url: str, path: Path, blob: str, source: str) -> None:
    """Fetches `url` to `path`, unless that is there. `source` names the data in messages.

    Raises UserError where it cannot be fetched, or its contents are not those that Git calls `blob`; nothing is written then.
    """
    if path.is_file():
        return
    logging.info("fetching %s", url)
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content = answer.read()
    except OSError as error:
        raise UserError(f"{source}: {path} is not there, and {url} cannot be fetched: {error}") from error
    if blob_name(content) != blob:
        raise UserError(f"{source}: {url} is not the published file: its contents are {blob_name(content)}, not {blob}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
