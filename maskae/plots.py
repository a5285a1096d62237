"""Curves over steps and maps of features, drawn by matplotlib without a display; it is imported only when something is drawn."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from maskae.monitor.tables import Curve

# Okabe and Ito's colours, told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FEW_POINTS = 40


@dataclass(frozen=True)
class Chart:
    """One set of axes.

    Args:
        title: written above.
        curves: label -> (steps, values).
        levels: label -> value to compare with, a dashed line. A legend is drawn where there is more than one line.
    """

    title: str
    curves: Mapping[str, Curve]
    levels: Mapping[str, float] = field(default_factory=dict)


def draw_charts(charts: Sequence[Chart], *, columns: int, kind: Literal["png", "svg"]) -> bytes:
    """Draws charts in a grid of `columns` columns and returns the file's bytes. Non-finite values leave gaps.

    Raises:
        ValueError: there is no chart.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not charts:
        raise ValueError("there is nothing to draw")
    rows = math.ceil(len(charts) / columns)
    # The salt makes the identifiers inside an SVG, and so the file, depend on its content alone.
    with matplotlib.rc_context({"svg.hashsalt": "maskae", "font.size": 9, "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.4 * columns, 2.7 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        for position, chart in enumerate(charts, start=1):
            _draw_chart(figure.add_subplot(rows, columns, position), chart)
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


def _draw_chart(axes: Any, chart: Chart) -> None:
    colours = itertools.cycle(COLOURS)
    # The first of several curves is broad and pale, so that it shows under an equal one.
    styles = itertools.chain([{"linewidth": 4.0, "alpha": 0.4}] if len(chart.curves) > 1 else [], itertools.repeat({"linewidth": 1.6}))
    for (label, (steps, values)), colour, style in zip(chart.curves.items(), colours, styles, strict=False):
        marker = "o" if len(steps) <= FEW_POINTS else None
        axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=3, **style)
    for (label, level), colour in zip(chart.levels.items(), colours, strict=False):
        axes.axhline(level, color=colour, label=label, linewidth=1.2, linestyle="--")
    axes.set_title(chart.title, fontsize=10, loc="left", color="#222222")
    axes.set_xlabel("step", color="#555555")
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors="#555555", length=0)
    axes.margins(x=0.02)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side == "bottom")
    axes.spines["bottom"].set_color("#bbbbbb")
    if len(chart.curves) + len(chart.levels) > 1:
        axes.legend(frameon=False, fontsize=8)


def draw_embedding(points: np.ndarray, labels: np.ndarray | None = None, *, title: str = "", names: Sequence[str] = ()) -> np.ndarray:
    """A map of feature vectors: their first two principal components, coloured by label.

    Args:
        points: float [N, D] with N of at least 2; where D is 2 they are drawn as they are.
        labels: int [N], negative where there is none; None draws one colour.
        title: written above.
        names: of the labels, for a legend of at most 12.

    Returns:
        uint8 [H, W, 3].
    """
    points = np.asarray(points, np.float64)
    if points.shape[1] != 2:
        centred = points - points.mean(0)
        points = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T  # [N, 2]
    groups = [("", np.ones(len(points), bool))]
    if labels is not None:
        groups = [(str(names[k]) if 0 <= k < len(names) else str(k), labels == k) for k in np.unique(labels)]

    def paint(axes: Any) -> None:
        colours = colour_wheel(len(groups))
        for (name, rows), colour in zip(groups, colours, strict=True):
            axes.scatter(*points[rows].T[:2], s=7, color=colour, label=name, linewidths=0)
        if 1 < len(groups) <= 12:
            axes.legend(frameon=False, fontsize=7, markerscale=2)
        axes.set_xticks([])
        axes.set_yticks([])

    return draw_picture(paint, title=title)


def draw_table(lines: Mapping[str, np.ndarray], names: Sequence[str], *, title: str = "") -> np.ndarray:
    """Rows of a table as coloured cells with their values, the versions of a row under each other.

    Args:
        lines: name of a version -> float [B, N], NaN where a cell is empty.
        names: of the N columns.
        title: written above.

    Returns:
        uint8 [H, W, 3].
    """
    versions = list(lines)
    stacked = np.stack([lines[name] for name in versions], 1)  # [B, versions, N]
    # A blank line parts the rows.
    spaced = np.pad(stacked, ((0, 0), (0, 1), (0, 0)), constant_values=np.nan).reshape(-1, stacked.shape[-1])[:-1]
    low, high = np.nanmin(stacked, (0, 1)), np.nanmax(stacked, (0, 1))

    def paint(axes: Any) -> None:
        axes.imshow((spaced - low) / np.where(high > low, high - low, 1.0), cmap="Blues", vmin=0, vmax=2, aspect="auto")
        for row, column in zip(*np.nonzero(~np.isnan(spaced)), strict=True):
            axes.text(column, row, f"{spaced[row, column]:.3g}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
        labels = [*versions, ""] * len(stacked)
        axes.set_yticks(range(len(spaced)), labels[:-1], fontsize=7)

    return draw_picture(paint, title=title, size=(1.5 + 0.5 * len(names), 1.2 + 0.2 * len(spaced)))


def colour_wheel(count: int) -> list[Any]:
    """So many colours that can be told apart: the charts' own where they suffice."""
    import matplotlib

    return list(COLOURS[:count]) if count <= len(COLOURS) else [matplotlib.colormaps["turbo"](i / count) for i in range(count)]


def draw_picture(paint: Callable[[Any], None], *, title: str = "", size: tuple[float, float] = (4.6, 4.2)) -> np.ndarray:
    """What `paint(axes)` draws, as uint8 [H, W, 3]. `size` is in inches of 130 pixels."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "font.family": "sans-serif"}):
        figure = Figure(figsize=size, layout="constrained", dpi=130)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_title(title, fontsize=10, loc="left", color="#222222")
        paint(axes)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
