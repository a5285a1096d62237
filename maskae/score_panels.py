"""Pictures of score fields and of samples drawn with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from maskae.densities import DENSITIES, score
from maskae.panels import panel_sheet
from maskae.plots import COLOURS, draw_embedding, draw_picture

WALKS = ("Metropolis-Hastings", "Langevin")
GRID, BINS, SHOWN = 21, 40, 12
ARROW_SHARE = 0.5  # of arrows' lengths are longer than the unit that they are drawn in


def draw_samples(data: np.ndarray, walked: Mapping[str, np.ndarray], spec: Any) -> np.ndarray:
    """Data [N, d] beside the ends of walks that started there: images as images, lines as histograms, others as points; uint8 [H, W, 3].

    walked: `metropolis` [N, d], `langevin` [N, d], and the `acceptance` of the former.
    """
    ends = {name: walked[key] for name, key in zip(WALKS, ("metropolis", "langevin"), strict=True)}
    title = f"walks from data, acceptance {float(walked['acceptance']):.2f}"
    if spec.image_shape is not None:
        columns = {name: rows.reshape(-1, *spec.image_shape)[:SHOWN] for name, rows in {"data": data, **ends}.items()}
        return panel_sheet(columns, mean=spec.mean, std=spec.std, rows=min(SHOWN, len(data)), caption=title)
    if data.shape[1] == 1:
        return draw_picture(lambda axes: _histograms(axes, {"data": data, **ends}), title=title)
    rows = np.concatenate([data, *ends.values()])
    return draw_embedding(rows, np.repeat(np.arange(3), len(data)), title=title, names=("data", *WALKS))


def _histograms(axes: Any, groups: Mapping[str, np.ndarray]) -> None:
    low, high = (edge(np.concatenate(list(groups.values()))) for edge in (np.min, np.max))
    for (name, values), colour in zip(groups.items(), COLOURS, strict=False):
        axes.hist(values[:, 0], bins=BINS, range=(low, high), density=True, histtype="step", color=colour, label=name)
    axes.set_xlabel("x")
    axes.legend(frameon=False, fontsize=7)


def draw_score(data: np.ndarray, field: Callable[[np.ndarray], np.ndarray], spec: Any) -> np.ndarray:
    """The estimated score around data [N, d] of one or two dimensions, with the closed form where `spec.details` names a density.

    In one dimension curves, in two arrows; uint8 [H, W, 3].
    """
    low, high = data.min(0), data.max(0)
    name = spec.details.get("density")
    true = (lambda x: np.asarray(score(DENSITIES[name](), jnp.asarray(x, jnp.float32)))) if name in DENSITIES else None
    if data.shape[1] == 1:
        x = np.linspace(low, high, 10 * GRID).astype(np.float32)
        lines = {"estimated": field(x)} | ({"gradient of log p": true(x)} if true else {})
        return draw_picture(lambda axes: _lines(axes, x, lines), title="score")
    x = np.stack(np.meshgrid(*np.linspace(low, high, GRID).T), -1).reshape(-1, 2).astype(np.float32)  # [GRID * GRID, 2]
    fields = {"estimated": field(x)} | ({"gradient of log p": true(x)} if true else {})
    return draw_picture(lambda axes: _arrows(axes, data, x, fields), title="score, arrows of one half to one grid step", size=(5.2, 5.2))


def _lines(axes: Any, x: np.ndarray, lines: Mapping[str, np.ndarray]) -> None:
    for (name, values), colour in zip(lines.items(), COLOURS, strict=False):
        axes.plot(x[:, 0], values[:, 0], color=colour, label=name, linewidth=1.4)
    axes.set_xlabel("x")
    axes.legend(frameon=False, fontsize=7)


def _arrows(axes: Any, data: np.ndarray, x: np.ndarray, fields: Mapping[str, np.ndarray]) -> None:
    axes.scatter(*data.T, s=4, color="#bbbbbb", linewidths=0)
    spacing = (x.max(0) - x.min(0)).max() / (GRID - 1)
    for (name, vectors), colour in zip(fields.items(), COLOURS, strict=False):
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        # Lengths differ by orders of magnitude off the data: squeezed into one half to one step of the grid.
        drawn = vectors / np.maximum(lengths, 1e-12) * spacing * (1 - ARROW_SHARE / (1 + lengths / max(np.median(lengths), 1e-12)))
        axes.quiver(*x.T, *drawn.T, color=colour, label=name, angles="xy", scale_units="xy", scale=1, width=0.003)
    axes.legend(frameon=False, fontsize=7, loc="upper right")
    axes.set_aspect("equal")
