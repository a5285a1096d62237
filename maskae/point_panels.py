"""Sheets of point clouds to look at: rows of clouds, titled columns, seen from one oblique direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from maskae.panels import panel_sheet

SIDE = 176  # pixels
RADIUS = 2  # of a point, in pixels
AZIMUTH, ELEVATION = 0.6, 0.35  # of the eye, in radians
BLUE, ORANGE = (0, 114, 178), (213, 94, 0)
GREY = (150, 150, 150)
Coloured = tuple[np.ndarray, tuple[int, int, int]]  # points float [N, 3] and their colour


def render(parts: Sequence[Coloured], extent: float) -> np.ndarray:
    """One picture, float32 [SIDE, SIDE, 3] in 0..1, of coloured points by parallel projection; y points up, farther points are paler.

    Args:
        parts: points and their colour.
        extent: points within this distance from the origin are inside of the picture.
    """
    picture = np.ones((SIDE, SIDE, 3), np.float32)
    points = np.concatenate([np.asarray(each, np.float32).reshape(-1, 3) for each, _ in parts])
    colours = np.concatenate([np.tile(np.asarray(colour, np.float32) / 255, (len(each), 1)) for each, colour in parts])
    right = np.asarray([np.cos(AZIMUTH), 0, -np.sin(AZIMUTH)])
    toward = np.asarray([np.sin(AZIMUTH) * np.cos(ELEVATION), np.sin(ELEVATION), np.cos(AZIMUTH) * np.cos(ELEVATION)])
    up = np.cross(toward, right)
    across, height, depth = points @ right, points @ up, points @ toward
    pale = np.clip(0.5 - 0.5 * depth / extent, 0, 1)[:, None] * 0.6
    shaded = colours + (1 - colours) * pale
    columns, rows = (np.round((0.5 + 0.46 * each / extent) * SIDE).astype(int) for each in (across, -height))
    disc = [(i, j) for i in range(-RADIUS, RADIUS + 1) for j in range(-RADIUS, RADIUS + 1) if i * i + j * j <= RADIUS * RADIUS]
    for n in np.argsort(depth):  # the nearest last, over the others
        for i, j in disc:
            row, column = rows[n] + i, columns[n] + j
            if 0 <= row < SIDE and 0 <= column < SIDE:
                picture[row, column] = shaded[n]
    return picture


def cloud_sheet(columns: Mapping[str, Sequence[Sequence[Coloured]]], *, caption: str = "") -> np.ndarray:
    """A sheet, uint8 [height, width, 3]: title -> for each cloud what `render` takes. A row has the scale of its first cloud."""
    first = next(iter(columns.values()))
    extents = [max(float(np.max(np.linalg.norm(points, axis=-1), initial=1e-6)) for points, _ in parts) for parts in first]
    pictures = {
        title: np.stack([render(parts, extent) for parts, extent in zip(clouds, extents, strict=True)])
        for title, clouds in columns.items()
    }
    return panel_sheet(pictures, mean=(0.0,) * 3, std=(1.0,) * 3, rows=len(first), caption=caption)
