"""PyTorch's usual loader of image files, to measure against: PIL, torchvision's random-resized-crop and flip, a uint8 tensor.

torchvision itself is not needed: the crop's rule is the same, and its PIL transforms make the same calls of PIL as the ones here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maskae.data.crops import random_crop_box
from maskae.data.transforms import DEFAULT_RATIO


@dataclass
class ImageFiles:
    """A map-style data set: [i] is a uint8 tensor [3, size, size] of file i, cropped and flipped anew every time."""

    files: Sequence[Path]
    size: int
    scale: tuple[float, float]

    def __post_init__(self) -> None:
        self._generator = np.random.default_rng()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        import torch

        with self.files[index].open("rb") as file:
            image = Image.open(file).convert("RGB")
        box = random_crop_box(self._generator, image.height, image.width, self.scale, DEFAULT_RATIO)
        image = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if self._generator.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.as_tensor(np.array(image, copy=True)).permute(2, 0, 1)


def is_installed() -> bool:
    """Whether torch can be imported; it is not imported for that."""
    return importlib.util.find_spec("torch") is not None


def start(files: Sequence[Path], size: int, scale: tuple[float, float], batch_size: int, workers: int) -> Iterator[Any]:
    """Endless batches, uint8 [batch_size, 3, size, size], from a DataLoader with so many worker processes; 0 makes them when asked."""
    import torch
    from torch.utils.data import DataLoader, RandomSampler

    torch.set_num_threads(1)  # as in its workers; more would put them on cores that are not counted
    dataset: Any = ImageFiles(files, size, scale)
    return iter(
        DataLoader(
            dataset,
            batch_size,
            sampler=RandomSampler(dataset, replacement=True, num_samples=2**40),
            num_workers=workers,
            # Forking a process that has threads may hang.
            multiprocessing_context="spawn" if workers else None,
        )
    )
