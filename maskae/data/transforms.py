"""Host transforms, named and put together: a config's (name, arguments) pairs become one callable.

    make_transform((("random_resized_crop", {"size": 224, "scale": (0.2, 1.0)}), ("flip", {})), channels=3)

A crop that comes first sees the image undecoded (`Picture`), so that no more is decoded than it needs; other steps see uint8 [H, W, C].
All frames of a clip are changed by the same draws. All random numbers come from the generator given with the image, which the pipeline
makes from (seed, element).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskae.data import augment, crops
from maskae.data.images import Box, Picture
from maskae.data.resizing import interpolation_filter
from maskae.errors import UserError, check_arguments, check_choice

Pair = tuple[float, float]
DEFAULT_RATIO = (3 / 4, 4 / 3)


def _check_range(step: str, name: str, pair: Pair, low: float, high: float) -> None:
    if len(pair) != 2 or not low < pair[0] <= pair[1] <= high:
        raise UserError(f"{step}: {name} {pair} must be two growing numbers above {low} and at most {high}")


@dataclass(frozen=True)
class RandomResizedCrop:
    """A box with a share `scale` of the area and a width/height in `ratio`, resized to size x size (torchvision's rule)."""

    size: int
    scale: Pair = (0.2, 1.0)
    ratio: Pair = DEFAULT_RATIO
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        _check_range("random_resized_crop", "scale", self.scale, 0, 1)
        _check_range("random_resized_crop", "ratio", self.ratio, 0, float("inf"))
        interpolation_filter(self.interpolation)

    def crop(self, picture: Picture, generator: np.random.Generator) -> np.ndarray:
        """uint8 [size, size, C]."""
        box = crops.random_crop_box(generator, *picture.size, self.scale, self.ratio)
        return picture.crop(box, self.size, self.size, self.interpolation)


@dataclass(frozen=True)
class ProbeCrop:
    """The crop of MAE's linear probe: one draw, cut to the image, instead of draws until one fits."""

    size: int
    scale: Pair = (0.08, 1.0)
    ratio: Pair = DEFAULT_RATIO
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        _check_range("probe_crop", "scale", self.scale, 0, 1)
        _check_range("probe_crop", "ratio", self.ratio, 0, float("inf"))
        interpolation_filter(self.interpolation)

    def crop(self, picture: Picture, generator: np.random.Generator) -> np.ndarray:
        """uint8 [size, size, C]."""
        box = crops.probe_crop_box(generator, *picture.size, self.scale, self.ratio)
        return picture.crop(box, self.size, self.size, self.interpolation)


@dataclass(frozen=True)
class ResizeCenterCrop:
    """Short side to `resize` pixels, then the central size x size; by default `resize` is size * 256/224 up to 224 and `size` above."""

    size: int
    resize: int | None = None
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < self.size:
            raise UserError(f"resize_center_crop: resize {self.resize} must be at least size {self.size}")
        interpolation_filter(self.interpolation)

    def crop(self, picture: Picture, generator: np.random.Generator) -> np.ndarray:
        """uint8 [size, size, C]; draws nothing."""
        height, width = picture.size
        short = self.resize or (int(self.size * 256 / 224) if self.size <= 224 else self.size)
        tall, wide = (short, short * width // height) if height <= width else (short * height // width, short)
        top, left = round((tall - self.size) / 2), round((wide - self.size) / 2)
        x, y = width / wide, height / tall
        region = (left * x, top * y, (left + self.size) * x, (top + self.size) * y)
        return picture.window(region, self.size, self.size, self.interpolation)


@dataclass(frozen=True)
class Resize:
    """The whole image to size x size, whatever its shape."""

    size: int
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        interpolation_filter(self.interpolation)

    def crop(self, picture: Picture, generator: np.random.Generator) -> np.ndarray:
        """uint8 [size, size, C]; draws nothing."""
        return picture.crop(Box(0, 0, *picture.size), self.size, self.size, self.interpolation)


@dataclass(frozen=True)
class Flip:
    """Left to right, with `probability`."""

    probability: float = 0.5

    def __call__(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return image[:, ::-1] if generator.random() < self.probability else image


@dataclass(frozen=True)
class ColorJitter:
    """torchvision's ColorJitter, with `probability`."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    probability: float = 1.0

    def __call__(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        if generator.random() >= self.probability:
            return image
        return augment.color_jitter(
            image, generator, brightness=self.brightness, contrast=self.contrast, saturation=self.saturation, hue=self.hue
        )


@dataclass(frozen=True)
class RandAugment:
    """timm's `rand-m9-n2-mstd0.5-inc1`; `fill` is the colour of what rotations and shifts bring in."""

    operations: int = 2
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    probability: float = 0.5
    fill: tuple[int, ...] = augment.IMAGENET_FILL
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if not 0 <= self.magnitude <= augment.MAX_MAGNITUDE:
            raise UserError(f"rand_augment: magnitude {self.magnitude} must be within 0..10")
        interpolation_filter(self.interpolation)

    def __call__(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return augment.rand_augment(image, generator, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})


@dataclass(frozen=True)
class Grayscale:
    """Luma in every channel, with `probability`."""

    probability: float = 0.2

    def __call__(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return augment.grayscale(image) if generator.random() < self.probability else image


@dataclass(frozen=True)
class GaussianBlur:
    """Blur with a standard deviation in pixels drawn from `sigma`, with `probability`."""

    sigma: Pair = (0.1, 2.0)
    probability: float = 0.5

    def __post_init__(self) -> None:
        _check_range("gaussian_blur", "sigma", self.sigma, 0, float("inf"))

    def __call__(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        if generator.random() >= self.probability:
            return image
        return augment.gaussian_blur(image, generator.uniform(*self.sigma))


@dataclass(frozen=True)
class Solarize:
    """Inverts values at or above `threshold`, with `probability`."""

    threshold: int = 128
    probability: float = 0.2

    def __call__(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return augment.solarize(image, self.threshold) if generator.random() < self.probability else image


STEPS: dict[str, type] = {
    "random_resized_crop": RandomResizedCrop,
    "probe_crop": ProbeCrop,
    "resize_center_crop": ResizeCenterCrop,
    "resize": Resize,
    "flip": Flip,
    "color_jitter": ColorJitter,
    "rand_augment": RandAugment,
    "grayscale": Grayscale,
    "gaussian_blur": GaussianBlur,
    "solarize": Solarize,
}


@dataclass(frozen=True)
class Transform:
    """Steps applied in order. `channels` is what images are converted to; None keeps those of an array and reads files as RGB."""

    steps: tuple[Any, ...] = ()
    channels: int | None = None

    def __call__(self, image: bytes | np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """`image`: the bytes of an image file or uint8 [H, W, c]. Returns uint8 [H', W', C]. Raises BadRecord for a damaged file.

        A clip uint8 [T, H, W, c] becomes [T, H', W', C]: every frame goes through the same draws, from a copy of the generator.
        """
        if isinstance(image, np.ndarray) and image.ndim == 4:
            # Copies cost more than nothing, and most clips have no steps.
            return np.stack([self(frame, copy.deepcopy(generator)) for frame in image]) if self.steps else image
        channels = self.channels or (image.shape[-1] if isinstance(image, np.ndarray) else 3)
        picture = Picture(image, channels)
        array = None
        for step in self.steps:
            if hasattr(step, "crop"):
                array = step.crop(picture if array is None else Picture(array, channels), generator)
            else:
                array = step(picture.read() if array is None else array, generator)
        return np.ascontiguousarray(picture.read() if array is None else array)


def make_step(name: str, arguments: Mapping[str, Any]) -> Any:
    """One step by its name. Raises UserError for an unknown step or argument, a missing one, or a value out of range."""
    check_choice("transform", name, STEPS)
    known = {f.name: f for f in dataclasses.fields(STEPS[name])}
    check_arguments(f"transform '{name}'", arguments, STEPS[name])
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in arguments]
    if missing:
        raise UserError(f"transform '{name}' needs '{missing[0]}'")
    # Configs hold lists where the steps hold tuples.
    step = STEPS[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()})
    if "size" in known and step.size < 1:
        raise UserError(f"transform '{name}': size must be at least 1, not {step.size}")
    if "probability" in known and not 0 <= step.probability <= 1:
        raise UserError(f"transform '{name}': probability must be within 0..1, not {step.probability}")
    return step


def make_transform(steps: Sequence[tuple[str, Mapping[str, Any]]], channels: int | None = None, size: int | None = None) -> Transform:
    """The transform of (name, arguments) pairs; `channels` as in `Transform`; `size` goes to steps that take one and were given none.

    Raises UserError as `make_step` does.
    """
    sized = {name for name, step in STEPS.items() if any(field.name == "size" for field in dataclasses.fields(step))}
    common = {} if size is None else {"size": size}
    return Transform(tuple(make_step(name, {**(common if name in sized else {}), **arguments}) for name, arguments in steps), channels)
