"""Curves over steps, drawn by matplotlib without a display; it is imported only when something is drawn."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

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
