"""Point files: coordinates of one cloud from .npy, .npz, .ply, .off, .txt, .xyz, .pts and .csv."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from maskae.data.spec import BadRecord

POINT_SUFFIXES = (".npy", ".npz", ".ply", ".off", ".txt", ".xyz", ".pts", ".csv")
ARRAY_NAMES = ("points", "xyz", "pos", "arr_0")
PLY_TYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "i2"),
    **dict.fromkeys(("ushort", "uint16"), "u2"),
    **dict.fromkeys(("int", "int32"), "i4"),
    **dict.fromkeys(("uint", "uint32"), "u4"),
    **dict.fromkeys(("float", "float32"), "f4"),
    **dict.fromkeys(("double", "float64"), "f8"),
}
PLY_ORDERS = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}


def read_points(path: Path) -> np.ndarray:
    """The points of one file, float32 [N, 3]: its first three columns, or its vertices; further columns (normals, colours) are left out.

    Raises BadRecord, with the reason, where the file cannot be read or holds no finite points.
    """
    readers = {".npy": _read_array, ".npz": _read_archive, ".ply": _read_ply, ".off": _read_off}
    try:
        points = readers.get(path.suffix.lower(), _read_text)(path)
    except (OSError, ValueError, BadZipFile, IndexError, EOFError) as error:
        raise BadRecord(f"no readable point file: {error}") from error
    if points.ndim != 2 or points.shape[1] < 3 or not len(points) or points.dtype.kind not in "fiu":
        raise BadRecord(f"no point cloud: {points.dtype} {points.shape} in place of at least one row of three numbers")
    points = points[:, :3].astype(np.float32)
    if not np.isfinite(points).all():
        raise BadRecord("a coordinate is not a finite number")
    return points


def _read_array(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, allow_pickle=False))


def _read_archive(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        for name in ARRAY_NAMES:
            if name in arrays:
                return np.asarray(arrays[name])
        raise BadRecord(f"it has no array called {' or '.join(ARRAY_NAMES)}; it has {', '.join(arrays.files)}")


def _read_text(path: Path) -> np.ndarray:
    """Rows of numbers between spaces or commas; a first row with their count or with column names is passed over."""
    text = path.read_text().replace(",", " ")
    rows = [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if rows and (len(rows[0]) < 3 or not _is_number(rows[0][0])):
        rows = rows[1:]
    return np.asarray([row[:3] for row in rows], np.float32)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _read_off(path: Path) -> np.ndarray:
    """Points spread over the mesh's faces by area, at least 4,096 and the same at every reading; without faces its vertices."""
    words = path.read_text().split()
    # Some files of ModelNet lack the line break after the first word: "OFF490 518 0".
    if not words or not words[0].startswith("OFF"):
        raise ValueError("it does not begin with OFF")
    words = words[1:] if words[0] == "OFF" else [words[0][3:], *words[1:]]
    count, faces = int(words[0]), int(words[1])
    vertices = np.asarray(words[3 : 3 + 3 * count], np.float32).reshape(count, 3)
    triangles, at = [], 3 + 3 * count
    for _ in range(faces):
        corners = [int(word) for word in words[at + 1 : at + 1 + int(words[at])]]
        triangles += [(corners[0], b, c) for b, c in zip(corners[1:], corners[2:], strict=False)]
        at += 1 + len(corners)
    return spread_over(vertices[np.asarray(triangles)], max(count, 4096)) if triangles else vertices


def spread_over(triangles: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """`count` points drawn uniformly over the area of triangles float [T, 3, 3] -> float32 [count, 3]. Raises ValueError without area."""
    generator = np.random.default_rng(seed)
    a, b, c = triangles.astype(np.float64).transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    if not area.sum() > 0:
        raise ValueError("its faces have no area")
    chosen = generator.choice(len(area), count, p=area / area.sum())
    u, v = generator.random((2, count, 1))
    # A uniform point of the triangle: the square folded along its diagonal.
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    return (a[chosen] + u * (b - a)[chosen] + v * (c - a)[chosen]).astype(np.float32)


def _read_ply(path: Path) -> np.ndarray:
    """The x, y, z of the vertices, which must be the first element; text or binary."""
    data = path.read_bytes()
    end = data.find(b"end_header")
    if not data.startswith(b"ply") or end < 0:
        raise ValueError("it has no PLY header")
    body = data[data.index(b"\n", end) + 1 :]
    lines = [line.split() for line in data[:end].decode("ascii").splitlines()]
    form = next((line[1] for line in lines if line[:1] == ["format"]), "")
    elements = [number for number, line in enumerate(lines) if line[:1] == ["element"]]
    if form not in PLY_ORDERS or not elements or lines[elements[0]][1] != "vertex":
        raise ValueError(f"PLY format '{form}' or its first element is not known")
    count = int(lines[elements[0]][2])
    stop = elements[1] if len(elements) > 1 else len(lines)
    properties = [line for line in lines[elements[0] + 1 : stop] if line[:1] == ["property"]]
    names = [line[-1] for line in properties]
    if form == "ascii":
        rows = np.asarray(body.split()[: count * len(names)], np.float64).reshape(count, len(names))
        return rows[:, [names.index(axis) for axis in "xyz"]]
    layout = np.dtype([(line[-1], PLY_ORDERS[form] + PLY_TYPES[line[1]]) for line in properties if line[1] != "list"])
    if len(layout.names or ()) != len(properties):
        raise ValueError("a vertex property is a list")
    vertices = np.frombuffer(body, layout, count)
    return np.stack([vertices[axis].astype(np.float32) for axis in "xyz"], axis=1)
