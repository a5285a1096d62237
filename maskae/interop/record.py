"""Reading what the record of a reference case says in words or under official names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from maskae.errors import UserError
from maskae.interop.layout import Geometry, to_foreign
from maskae.interop.vit import LAYOUTS
from maskae.paths import flatten_paths
from maskae.schedules import Schedule, warmup_cosine

KEY_BIAS = "key bias: its true gradient is 0 and Adam turns rounding noise into steps"


def numbers_of(text: str, pattern: str) -> tuple[float, ...]:
    """The numbers that `pattern`'s groups match in a sentence of the record. Raises UserError where it does not match."""
    found = re.search(pattern, text)
    if found is None:
        raise UserError(f"the reference case says {text!r}, in which no {pattern!r} is found")
    return tuple(float(group) for group in found.groups())


def adam_constants(text: str) -> dict[str, Any]:
    """b1, b2 and eps of a recorded "AdamW betas (0.9, 0.95) eps 1e-8"."""
    return dict(zip(("b1", "b2", "eps"), numbers_of(text, r"betas \(([\d.]+), ([\d.]+)\) eps ([\d.e-]+)"), strict=True))


def recorded_schedule(options: Mapping[str, Any]) -> Schedule:
    """The warm-up cosine of a recorded training, its epochs in steps."""
    per_epoch = options["steps_per_epoch"]
    return warmup_cosine(options["lr"], options["min_lr"], options["warmup_epochs"] * per_epoch, options["epochs"] * per_epoch)


def image_size_of(options: Mapping[str, Any]) -> int | tuple[int, int]:
    """The recorded image size, one number or (height, width)."""
    size = options["img_size"]
    return size if isinstance(size, int) else (size[0], size[1])


def official_names(tree: Any, geometry: Geometry) -> dict[str, np.ndarray]:
    """Parameters or their gradients under the names and in the shapes of MAE's released code, without the fixed position tables."""
    layout = dataclasses.replace(LAYOUTS["paper"], positions={})
    flat = {path: np.asarray(leaf) for path, leaf in flatten_paths(tree).items()}
    return {name: np.asarray(value) for name, value in to_foreign(flat, layout, geometry)[0].items()}


def key_bias(name: str, size: int) -> np.ndarray | None:
    """Where a fused qkv bias [3D] belongs to the keys, which the softmax does not see; None for every other parameter."""
    return np.arange(size) // (size // 3) == 1 if name.endswith("qkv.bias") else None
