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
    """What is wrong, naming the file (missing, truncated, changed), or None. Reads every byte, after the sizes, which cost nothing."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so its save never finished"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    for name, (size, _) in expected.items():
        if not (folder / name).exists():
            return f"{name} is missing"
        if (length := (folder / name).stat().length) != size:
            return f"{name} has {length} bytes instead of {size}"
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = pool.map(lambda name: _digest(folder / name), expected)
        changed = [name for name, digest in zip(expected, digests, strict=True) if digest != expected[name][1]]
    return f"{changed[0]} has changed (its SHA-256 differs)" if changed else None


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
