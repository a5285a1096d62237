"""Writes a contact sheet of what the model really sees: one training batch after the host and the device transforms, in order.

    python tools/show_data.py --config configs/mae.py:tiny --out sheet.png [--step 100] [--images 32] [--config.data.source=folder:photos]

Under each image stands its label and its record number. Exit status: 0, or 2 for bad input.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

# So that it also works in a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image, ImageDraw

from maskae.errors import UserError
from maskae.panels import to_pixels

if TYPE_CHECKING:
    from ml_collections import ConfigDict

GAP = 4
CAPTION = 14
SMALLEST_SIDE = 64


def contact_sheet(pictures: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """A near-square grid of pictures, each with its caption below; small ones are enlarged pixel by pixel.

    Args:
      pictures: uint8 [B, H, W, 3].
      captions: one line per picture.

    Returns: uint8 [height, width, 3].
    """
    scale = max(1, math.ceil(SMALLEST_SIDE / min(pictures.shape[1:3])))
    pictures = pictures.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width = pictures.shape[:3]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + CAPTION + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = GAP + number % columns * (width + GAP), GAP + number // columns * (height + CAPTION + GAP)
        sheet.paste(Image.fromarray(picture), (left, top))
        draw.text((left, top + height + 1), caption, fill="black")
    return np.asarray(sheet)


def seen_images(config: ConfigDict, step: int, count: int) -> tuple[np.ndarray, list[str]]:
    """(uint8 [count, H, W, 3], captions) of the first images of the batch of a step, as the loss gets them. Raises UserError."""
    import jax

    from maskae.experiment import build
    from maskae.keys import purpose_key

    experiment = build(config)
    batch = experiment.pipeline.batch(step)
    key = purpose_key(jax.random.fold_in(experiment.root_key, step), "augment")
    prepared = jax.jit(experiment.prepare)({name: value for name, value in batch.items()}, key)
    spec = experiment.spec
    pictures = to_pixels(prepared["image"][:count], spec.mean, spec.std)
    names = spec.class_names
    labels = [names[label] if 0 <= label < len(names) else str(label) for label in batch["label"][:count].tolist()]
    return pictures, [f"{label} #{index}" for label, index in zip(labels, batch["index"][:count].tolist(), strict=True)]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    from maskae.config import load_config, split_arguments

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        plain, overrides = split_arguments(sys.argv[1:] if arguments is None else arguments)
        parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="such as configs/mae.py:tiny")
        parser.add_argument("--out", required=True, type=Path, help="PNG file to write")
        parser.add_argument("--step", type=int, default=0, help="the batch of which step; default: 0")
        parser.add_argument("--images", type=int, default=36, help="at most so many; default: 36")
        flags = parser.parse_args(plain)
        if flags.step < 0 or flags.images < 1:
            raise UserError("--step must not be negative and --images at least 1")
        pictures, captions = seen_images(load_config(flags.config, overrides), flags.step, flags.images)
        try:
            Image.fromarray(contact_sheet(pictures, captions)).save(flags.out)
        except (OSError, ValueError) as error:
            raise UserError(f"--out={flags.out}: {error}") from error
        print(f"{flags.out}: {len(pictures)} images")
        return 0
    except UserError as error:
        print(f"show_data: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
