"""A pretrained encoder's parameters put into another system's encoder of the same architecture."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from maskae.errors import UserError
from maskae.nn.positions import resize_positions, sincos_2d
from maskae.paths import flatten_paths, unflatten_paths

Grid = tuple[int, int]


def adopt_encoder(
    own: dict[str, Any], given: dict[str, Any], grid: Grid, given_grid: Grid | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The encoder `own` with the values of `given`, its position table resized to `grid` (bicubic, the CLS row untouched).

    Args:
        own: parameters of a `ViTEncoder` with `trainable_position`, whose shapes and dtypes are kept.
        given: pretrained parameters (numpy or jax) of such an encoder, with `position` or with MAE's fixed table (no `position`).
        grid: rows and columns of patches of `own`.
        given_grid: those of `given`; None takes `grid` for the fixed table and for one of its length, else a square.

    Returns:
        The parameters, and a line for the log about everything that was not simply copied. A missing final norm (a fine-tuned, mean-pooled
        encoder has none) stays as in `own`.

    Raises:
        UserError: listing every leaf of `own` that is missing in `given` or has another shape there.
    """
    source = flatten_paths(given)
    notes: list[str] = []
    if "position" in source:
        count = source["position"].shape[1] - 1
        given_grid = given_grid or (grid if count == grid[0] * grid[1] else _square(count))
    else:
        given_grid = given_grid or grid
        source["position"] = sincos_2d(source["cls_token"].shape[-1], given_grid)[None] if "cls_token" in source else None
    if given_grid != grid and source["position"] is not None:
        source["position"] = resize_positions(jnp.asarray(source["position"], jnp.float32), given_grid, grid)
        notes.append(f"position table resized from {given_grid[0]} x {given_grid[1]} to {grid[0]} x {grid[1]} patches")

    adopted: dict[str, Any] = {}
    differing: list[str] = []
    for path, leaf in flatten_paths(own).items():
        value = source.pop(path, None)
        if value is None and path.startswith("norm/"):
            adopted[path] = leaf
            notes.append(f"{path} is not in the pretrained encoder and stays as it is")
        elif value is None:
            differing.append(f"{path}: missing, expected {tuple(leaf.shape)}")
        elif tuple(value.shape) != tuple(leaf.shape):
            differing.append(f"{path}: {tuple(value.shape)} there, {tuple(leaf.shape)} here")
        else:
            adopted[path] = jnp.asarray(value, leaf.dtype)
    if differing:
        raise UserError(f"the pretrained encoder does not fit; {len(differing)} leaves differ: " + "; ".join(differing))
    notes += [f"{path} of the pretrained encoder is not used" for path in source]
    return unflatten_paths(adopted), notes


def _square(length: int) -> Grid:
    side = math.isqrt(length)
    if side * side != length:
        raise UserError(f"a position table of {length} patches is not square: give the pretrained encoder's grid")
    return side, side


def adopt_parameters(own: dict[str, Any], given: dict[str, Any], skip: tuple[str, ...] = (), what: str = "encoder") -> dict[str, Any]:
    """The tree `own` with the values of `given`, but for the top-level names to skip; what `given` has beside that is not used.

    Raises UserError listing every leaf that is missing in `given` or has another shape there; `what` names the tree.
    """
    have, need = flatten_paths(given), flatten_paths(own)
    taken = [path for path in need if path.split("/")[0] not in skip]
    shapes = {path: tuple(have[path].shape) if path in have else "missing" for path in taken}
    wrong = [f"{path}: {shapes[path]} there, {tuple(need[path].shape)} here" for path in taken if shapes[path] != tuple(need[path].shape)]
    if wrong:
        raise UserError(f"the pretrained {what} does not fit; {len(wrong)} leaves differ: {'; '.join(wrong)}")
    return unflatten_paths(need | {path: jnp.asarray(have[path], need[path].dtype) for path in taken})
