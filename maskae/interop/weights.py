"""Weights in and out as safetensors, under the names of the papers' code, timm, Hugging Face, or ours."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from maskae.errors import UserError, check_choice
from maskae.interop import vit
from maskae.interop.conv_layout import MCMAE
from maskae.interop.layout import Flat, Geometry, Layout, LoadReport, from_foreign, to_foreign
from maskae.interop.point_layout import POINT_LAYOUTS
from maskae.paths import flatten_paths, unflatten_paths

LAYOUTS: dict[str, Layout] = vit.LAYOUTS | POINT_LAYOUTS | {"mcmae": MCMAE}

logger = logging.getLogger(__name__)


def read_tensors(path: str | Path) -> tuple[Flat, dict[str, str]]:
    """Every tensor of a safetensors file as numpy, and the file's metadata. Raises UserError where it is missing or no such file."""
    path = Path(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        raise UserError(f"{path} is a PyTorch file: convert it with `python -m maskae.interop.torch_file {path} OUT.safetensors`")
    if not path.is_file():
        raise UserError(f"no weights file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error


def layout_called(name: str) -> Layout:
    """The layout of that name. Raises UserError where there is none."""
    check_choice("layout", name, LAYOUTS)
    return LAYOUTS[name]


def detect_layout(tensors: Flat, template: Flat) -> str:
    """The layout under which most of the file's tensors are parameters of the model."""

    def matches(layout: Layout) -> int:
        given = {layout.bare(name) for name in tensors}
        found = [layout.names(path) for path in template]
        return sum(layout.bare(name) in given for each in found if each for name in each[0])

    return max(LAYOUTS, key=lambda name: matches(LAYOUTS[name]))


def load_weights(path: str | Path, params: Any, geometry: Geometry, layout: str | None = None) -> tuple[Any, LoadReport]:
    """Put a file's weights into `params`.

    A file of the encoder alone or of a fine-tuned classifier is fine: what the file lacks stays as in `params`. A position table of another
    resolution is resized. Everything that was not simply loaded is logged, leaf by leaf.

    Args:
        path: a safetensors file.
        params: nested dict of the model's parameters (freshly initialised, say); shapes and dtypes are kept.
        geometry: of that model.
        layout: a name of `LAYOUTS`; None finds out.

    Returns:
        The parameters as a nested dict of numpy arrays, and what became of each leaf.

    Raises:
        UserError: the file cannot be read, the layout is unknown, or no parameter at all could be loaded.
    """
    tensors, metadata = read_tensors(path)
    template = flatten_paths(params)
    name = layout or detect_layout(tensors, template)
    grid = tuple(int(side) for side in metadata["grid"].split("x")) if "grid" in metadata else None
    loaded, report = from_foreign(tensors, template, layout_called(name), geometry, (grid[0], grid[1]) if grid else None)
    report.layout = name
    if not report.loaded:
        reasons = report.mismatched or [f"its first tensors are {', '.join(list(tensors)[:3])}"]
        raise UserError(f"nothing in {path} fits the model in any known layout ({', '.join(LAYOUTS)}): {'; '.join(reasons[:3])}")
    for line in report.lines():
        logger.info("%s: %s", path, line)
    return unflatten_paths(loaded), report


def export_weights(
    params: Any, path: str | Path, geometry: Geometry, layout: str = "paper", metadata: dict[str, str] | None = None
) -> list[str]:
    """Write parameters as safetensors under another library's names, fixed position tables included.

    Args:
        params: nested dict of float arrays.
        path: the file to write; its folder must exist.
        geometry: of the model.
        layout: a name of `LAYOUTS`.
        metadata: stored in the file (training config, commit), beside patch size, grid and layout.

    Returns:
        Our parameters that the layout has no name for and that were left out (a decoder in timm, say).

    Raises:
        UserError: the file exists, its folder does not, the layout is unknown, or it has a name for no parameter.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists; weights are not overwritten")
    if not path.parent.is_dir():
        raise UserError(f"no folder {path.parent} to write {path.name} into")
    arrays = {name: np.asarray(leaf) for name, leaf in flatten_paths(jax.device_get(params)).items()}
    tensors, unnamed = to_foreign(arrays, layout_called(layout), geometry)
    if len(unnamed) == len(arrays):
        raise UserError(f"the {layout} layout has no name for any of these parameters, such as {unnamed[0] if unnamed else '(none)'}")
    about = {"layout": layout, "patch_size": str(geometry.patch_size), "grid": f"{geometry.grid[0]}x{geometry.grid[1]}"}
    partial = path.with_name(path.name + ".partial")
    # safetensors writes the memory as it lies: a transposed view would be stored in the wrong order. (`ascontiguousarray` would make
    # vectors of scalars.)
    save_file({name: np.asarray(array, order="C") for name, array in tensors.items()}, partial, metadata=about | (metadata or {}))
    os.replace(partial, path)
    for name in unnamed:
        logger.info("%s: the %s layout has no name for %s; left out", path, layout, name)
    return unnamed
