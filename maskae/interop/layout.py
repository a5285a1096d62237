"""How another library names and shapes the same parameters.

A layout is a list of rules, each from a pattern of our parameter paths to one or more foreign names and the change of shape between them.
Both directions come from the same rule, so that what is written can be read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskae.nn.positions import resize_positions, sincos_2d

Flat = dict[str, Any]


class Geometry(NamedTuple):
    """What a parameter's shape does not tell: `patch_size` in pixels and the patch `grid` as (rows, columns)."""

    patch_size: int
    grid: tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """A change of shape. `out`: our array -> the foreign ones (only `reshape`, `transpose` and slices, so it runs on abstract arrays).

    `back`: the foreign arrays and our shape -> our array.
    """

    out: Callable[[Any, Geometry], tuple[Any, ...]]
    back: Callable[[Sequence[Any], tuple[int, ...]], Any]


def _matrix(input_axes: int) -> Shape:
    """A weight matrix, stored (outputs, inputs) elsewhere; ours has `input_axes` axes of inputs before those of the outputs."""
    return Shape(
        lambda x, _: (x.reshape(math.prod(x.shape[:input_axes]), -1).transpose(1, 0),),
        lambda parts, shape: parts[0].transpose(1, 0).reshape(shape),
    )


VALUE = Shape(lambda x, _: (x,), lambda parts, shape: parts[0])
VECTOR = Shape(lambda x, _: (x.reshape(-1),), lambda parts, shape: parts[0].reshape(shape))
# A leading axis of length 1 that the other library does not have.
FIRST = Shape(lambda x, _: (x.reshape(x.shape[1:]),), lambda parts, shape: parts[0].reshape(shape))
LINEAR = _matrix(1)
OUT_PROJECTION = _matrix(2)
# A strided convolution (width, channels, rows, columns) and the linear map of a patch's values ordered (row, column, channel).
PATCH = Shape(
    lambda x, geometry: (x.reshape(geometry.patch_size, geometry.patch_size, -1, x.shape[-1]).transpose(3, 2, 0, 1),),
    lambda parts, shape: parts[0].transpose(2, 3, 1, 0).reshape(shape),
)
# One fused qkv map here, three separate ones there.
SPLIT_KERNEL = Shape(
    lambda x, _: tuple(x[:, i].reshape(x.shape[0], -1).transpose(1, 0) for i in range(3)),
    lambda parts, shape: np.stack([part.transpose(1, 0).reshape(shape[0], *shape[2:]) for part in parts], axis=1),
)
SPLIT_BIAS = Shape(
    lambda x, _: tuple(x[i].reshape(-1) for i in range(3)),
    lambda parts, shape: np.stack([part.reshape(shape[1:]) for part in parts]),
)


class Rule(NamedTuple):
    """`ours`: a path in which `{i}` stands for a number and `{path}` for anything; `theirs`: foreign names with the same placeholders."""

    ours: str
    theirs: tuple[str, ...]
    shape: Shape


@dataclass(frozen=True)
class Layout:
    """A naming scheme.

    Attributes:
        rules: the first rule whose pattern matches a path counts.
        positions: fixed position tables that the other library stores and ours computes: foreign name -> the token parameter whose width
            the table has. Left out where the parameters hold a table of their own.
        prefixes: what may stand before every foreign name in a file and is ignored.
    """

    rules: tuple[Rule, ...]
    positions: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ("module.", "_orig_mod.")

    def names(self, path: str) -> tuple[tuple[str, ...], Shape] | None:
        """The foreign names of our parameter `path` and the change of shape; None where the layout has no such parameter."""
        for rule in self.rules:
            pattern = re.escape(rule.ours).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{path\}", r"(?P<path>.+)")
            if found := re.fullmatch(pattern, path):
                return tuple(name.format(**found.groupdict()) for name in rule.theirs), rule.shape
        return None

    def bare(self, name: str) -> str:
        """A name of a file without the prefixes that wrappers add."""
        for prefix in self.prefixes:
            name = name.removeprefix(prefix)
        return name


@dataclass
class LoadReport:
    """What became of every leaf: `loaded` and `missing` name our parameters, `unexpected` the file's tensors, the others are lines."""

    layout: str = ""
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """One line per fact, for the log."""
        lines = [f"{len(self.loaded)} parameters loaded from the {self.layout} layout"]
        lines += self.notes
        lines += [f"not loaded, other shape: {line}" for line in self.mismatched]
        lines += [f"not in the file, left as initialised: {name}" for name in self.missing]
        return lines + [f"in the file but not in the model: {name}" for name in self.unexpected]


def to_foreign(params: Flat, layout: Layout, geometry: Geometry) -> tuple[Flat, list[str]]:
    """Our parameters by path -> arrays by foreign name, fixed position tables included, and the paths that the layout has no name for."""
    foreign: Flat = {}
    unnamed: list[str] = []
    for path, leaf in params.items():
        found = layout.names(path)
        if found is None:
            unnamed.append(path)
            continue
        names, shape = found
        foreign.update(zip(names, shape.out(leaf, geometry), strict=True))
    for name, token in layout.positions.items():
        if token in params and name not in foreign:
            foreign[name] = sincos_2d(params[token].shape[-1], geometry.grid)[None]
    return foreign, unnamed


def from_foreign(
    tensors: Flat, template: Flat, layout: Layout, geometry: Geometry, file_grid: tuple[int, int] | None = None
) -> tuple[Flat, LoadReport]:
    """Arrays by foreign name -> our parameters by path, where they fit; the template's own values elsewhere.

    Args:
        tensors: numpy arrays by name.
        template: our parameters by path; their shapes and dtypes are kept.
        layout: the naming scheme.
        geometry: of the model that the template belongs to.
        file_grid: patch grid of the file's position table; None takes it as square.

    Returns:
        The parameters by path, and what happened to each leaf.
    """
    given = {layout.bare(name): value for name, value in tensors.items()}
    report = LoadReport()
    params = dict(template)
    for path, leaf in template.items():
        found = layout.names(path)
        names, shape = found if found else ((), VALUE)
        names = tuple(layout.bare(name) for name in names)
        if not names or any(name not in given for name in names):
            report.missing.append(path)
            continue
        parts = [given.pop(name) for name in names]
        if path.rsplit("/", 1)[-1] == "position":
            parts = [_fit_positions(parts[0], geometry.grid, file_grid, report)]
        expected = jax.eval_shape(lambda x, out=shape.out: out(x, geometry), leaf)
        wrong = [
            f"{name}: {tuple(part.shape)} in the file, {tuple(want.shape)} in the model ({path})"
            for name, part, want in zip(names, parts, expected, strict=True)
            if tuple(part.shape) != tuple(want.shape)
        ]
        report.mismatched += wrong
        if wrong and shape is PATCH and parts[0].ndim == 4:
            rows, columns = parts[0].shape[2:]
            report.notes.append(f"the file has patches of {rows} x {columns} pixels, the model of {geometry.patch_size}")
        if not wrong:
            params[path] = np.asarray(shape.back(parts, tuple(leaf.shape)), leaf.dtype)
            report.loaded.append(path)
    _check_fixed_positions(given, layout, template, geometry, report)
    report.unexpected = sorted(given)
    return params, report


def _fit_positions(table: Any, grid: tuple[int, int], file_grid: tuple[int, int] | None, report: LoadReport) -> Any:
    """A position table [1, 1+N, D], or CLIP's [1+N, D], on the model's grid; unchanged, to be reported as a mismatch, where its own grid
    is unknown.
    """
    if table.ndim == 2:
        return _fit_positions(table[None], grid, file_grid, report)[0]
    count = table.shape[1] - 1
    side = math.isqrt(count)
    source = file_grid or (grid if count == grid[0] * grid[1] else (side, side))
    if source[0] * source[1] != count or source == grid:
        return table
    report.notes.append(f"position table resized from {source[0]} x {source[1]} to {grid[0]} x {grid[1]} patches")
    return np.asarray(resize_positions(jnp.asarray(table, jnp.float32), source, grid))


def _check_fixed_positions(given: Flat, layout: Layout, template: Flat, geometry: Geometry, report: LoadReport) -> None:
    """Take fixed tables out of `given`; say so where the file's differs from what the model computes."""
    for name, token in layout.positions.items():
        name = layout.bare(name)
        if name not in given or token not in template:
            continue
        table = np.asarray(given.pop(name), np.float32)
        own = sincos_2d(template[token].shape[-1], geometry.grid)[None]
        if table.shape != own.shape:
            report.notes.append(f"{name} is for {table.shape[1] - 1} patches; the model computes its own table for {own.shape[1] - 1}")
        elif np.abs(table - own).max() > 1e-5:
            report.notes.append(f"{name} is not the fixed sine-cosine table that the model computes: the features will differ")
