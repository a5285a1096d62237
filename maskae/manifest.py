"""Integrity of a folder: a manifest of every file's size and SHA-256, written last, checked before the files are trusted."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

from etils import epath

MANIFEST = "maskae_manifest.json"


def write_manifest(folder: epath.Path) -> None:
    """Records every file below `folder`. It appears by an atomic rename, so that it is either absent or whole."""
    files = {name: {"size": (folder / name).stat().length, "sha256": _digest(folder / name)} for name in _files(folder)}
    draft = folder / f"{MANIFEST}.draft"
    draft.write_text(json.dumps({"files": files}, indent=1))
    draft.replace(folder / MANIFEST)


def find_damage(folder: epath.Path) -> str | None:
    """What is wrong, naming the first bad file (missing, truncated, changed, unreadable), or None. Reads every byte."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so its save never finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    with ThreadPoolExecutor(max_workers=4) as pool:
        problems = pool.map(lambda item: _find_file_damage(folder / item[0], *item[1]), expected.items())
        return next((f"{name} {problem}" for name, problem in zip(expected, problems, strict=True) if problem), None)


def _find_file_damage(path: epath.Path, size: int, digest: str) -> str | None:
    try:
        if (length := path.stat().length) != size:
            return f"has {length} bytes instead of {size}"
        return "has changed (its SHA-256 differs)" if _digest(path) != digest else None
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _files(folder: epath.Path) -> list[str]:
    found, pending = [], [folder]
    while pending:
        for child in pending.pop().iterdir():
            if child.is_dir():
                pending.append(child)
            elif not child.name.startswith(MANIFEST):
                found.append(child.relative_to(folder).as_posix())
    return sorted(found)


def _digest(path: epath.Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
