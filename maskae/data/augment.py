"""Changes of colour and shape on the host, in PIL's arithmetic, which is what the papers' numbers were made with.

RandAugment is timm's `rand-m9-mstd0.5-inc1` (Cubuk et al., "RandAugment", 2020, with the "increasing" operations: every operation is
stronger at a larger magnitude). Images are uint8 [H, W, C] with 1 or 3 channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from maskae.data.resizing import interpolation_filter
from maskae.errors import UserError, check_choice

MAX_MAGNITUDE = 10.0
IMAGENET_FILL = (124, 116, 104)  # round(255 * ImageNet's mean)
SOLARIZE_ADD_BELOW = 128

Fill = int | tuple[int, ...]
Operation = Callable[[Image.Image, float, Fill, Image.Resampling], Image.Image]


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Fill, resample: Image.Resampling) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=fill)


def _posterize(image: Image.Image, bits: float, fill: Fill, resample: Image.Resampling) -> Image.Image:
    # Not ImageOps.posterize: it refuses 0 bits (black), which is what the largest magnitude asks for.
    table = [value & ~(2 ** (8 - int(bits)) - 1) for value in range(256)]
    return image.point(table * len(image.getbands()))


def _solarize_add(image: Image.Image, amount: float, fill: Fill, resample: Image.Resampling) -> Image.Image:
    table = [min(255, i + int(amount)) if i < SOLARIZE_ADD_BELOW else i for i in range(256)]
    return image.point(table * len(image.getbands()))


# name -> (image, argument, fill, filter) -> image. timm's increasing set, in its order.
OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda image, _, fill, resample: ImageOps.autocontrast(image),
    "Equalize": lambda image, _, fill, resample: ImageOps.equalize(image),
    "Invert": lambda image, _, fill, resample: ImageOps.invert(image),
    "Rotate": lambda image, degrees, fill, resample: image.rotate(degrees, resample=resample, fillcolor=fill),
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": lambda image, threshold, fill, resample: ImageOps.solarize(image, int(threshold)),
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": lambda image, factor, fill, resample: ImageEnhance.Color(image).enhance(factor),
    "ContrastIncreasing": lambda image, factor, fill, resample: ImageEnhance.Contrast(image).enhance(factor),
    "BrightnessIncreasing": lambda image, factor, fill, resample: ImageEnhance.Brightness(image).enhance(factor),
    "SharpnessIncreasing": lambda image, factor, fill, resample: ImageEnhance.Sharpness(image).enhance(factor),
    "ShearX": lambda image, share, fill, resample: _affine(image, (1, share, 0, 0, 1, 0), fill, resample),
    "ShearY": lambda image, share, fill, resample: _affine(image, (1, 0, 0, share, 1, 0), fill, resample),
    "TranslateXRel": lambda image, share, fill, resample: _affine(image, (1, 0, share * image.width, 0, 1, 0), fill, resample),
    "TranslateYRel": lambda image, share, fill, resample: _affine(image, (1, 0, 0, 0, 1, share * image.height), fill, resample),
}


def operation_argument(name: str, magnitude: float, sign: int = 1) -> float | None:
    """timm's argument of an operation at a magnitude in 0..10; `sign` (1 or -1) turns rotations, shears, shifts and enhancements round.

    Returns None for the operations without one. Raises UserError for an unknown name.
    """
    level = magnitude / MAX_MAGNITUDE
    arguments: dict[str, float | None] = {
        "AutoContrast": None,
        "Equalize": None,
        "Invert": None,
        "Rotate": sign * level * 30.0,
        "PosterizeIncreasing": 4 - int(level * 4),
        "SolarizeIncreasing": 256 - int(level * 256),
        "SolarizeAdd": int(level * 110),
        "ShearX": sign * level * 0.3,
        "ShearY": sign * level * 0.3,
        "TranslateXRel": sign * level * 0.45,
        "TranslateYRel": sign * level * 0.45,
    }
    if name in arguments:
        return arguments[name]
    check_choice("RandAugment operation", name, OPERATIONS)
    return 1.0 + sign * level * 0.9


def _to_pil(image: np.ndarray) -> Image.Image:
    if image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise UserError(f"colour changes need images with 1 or 3 channels, not {image.shape}")
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _from_pil(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def apply_operation(
    image: np.ndarray,
    name: str,
    argument: float | None = None,
    *,
    fill: Sequence[int] = IMAGENET_FILL,
    interpolation: str = "bicubic",
) -> np.ndarray:
    """One RandAugment operation with the argument as given (`operation_argument` makes it from a magnitude).

    image: uint8 [H, W, C], C 1 or 3; same shape back. `fill` is the colour of what comes in from outside (its mean for one channel).
    Raises UserError for an unknown name.
    """
    check_choice("RandAugment operation", name, OPERATIONS)
    picture = _to_pil(image)
    colour: Fill = tuple(fill) if picture.mode == "RGB" else round(sum(fill) / len(fill))
    return _from_pil(OPERATIONS[name](picture, 0.0 if argument is None else argument, colour, interpolation_filter(interpolation)))


def rand_augment(
    image: np.ndarray,
    generator: np.random.Generator,
    *,
    operations: int = 2,
    magnitude: float = 9.0,
    magnitude_std: float = 0.5,
    probability: float = 0.5,
    fill: Sequence[int] = IMAGENET_FILL,
    interpolation: str = "bicubic",
) -> np.ndarray:
    """timm's RandAugment: operations drawn with replacement, each applied with `probability` at N(magnitude, std) cut to 0..10."""
    names = tuple(OPERATIONS)
    for name in [names[i] for i in generator.integers(len(names), size=operations)]:
        if generator.random() >= probability:
            continue
        drawn = float(np.clip(generator.normal(magnitude, magnitude_std), 0.0, MAX_MAGNITUDE))
        sign = 1 if generator.random() < 0.5 else -1
        image = apply_operation(image, name, operation_argument(name, drawn, sign), fill=fill, interpolation=interpolation)
    return image


def shift_hue(image: np.ndarray, turn: float) -> np.ndarray:
    """Turns the colour circle by `turn` (1 is the whole circle) through 8-bit HSV, as torchvision does on PIL images. uint8 [H, W, C]."""
    picture = _to_pil(image)
    if picture.mode == "L":
        return image
    hsv = np.array(picture.convert("HSV"))
    hsv[..., 0] += np.uint8(int(turn * 255) % 256)  # wraps round, as hue does
    return np.asarray(Image.merge("HSV", [Image.fromarray(hsv[..., c]) for c in range(3)]).convert("RGB"))


def color_jitter(
    image: np.ndarray,
    generator: np.random.Generator,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> np.ndarray:
    """torchvision's ColorJitter: factors U(max(0, 1 - s), 1 + s), a hue turn U(-hue, hue), in random order. uint8 [H, W, C], C 1 or 3."""
    enhancers = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}
    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
    names = [name for name, strength in strengths.items() if strength > 0]
    for position in generator.permutation(len(names)):
        name = names[position]
        strength = strengths[name]
        if name == "hue":
            image = shift_hue(image, generator.uniform(-strength, strength))
        else:
            factor = generator.uniform(max(0.0, 1.0 - strength), 1.0 + strength)
            image = _from_pil(enhancers[name](_to_pil(image)).enhance(factor))
    return image


def grayscale(image: np.ndarray) -> np.ndarray:
    """Luma in every channel. uint8 [H, W, C], C 1 or 3."""
    return np.repeat(_from_pil(_to_pil(image).convert("L")), image.shape[-1], axis=-1)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur with a standard deviation in pixels; borders are mirrored. uint8 [H, W, C], any C."""
    blurred = cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)
    return blurred.reshape(image.shape)


def solarize(image: np.ndarray, threshold: int = 128) -> np.ndarray:
    """Inverts the values at or above the threshold. uint8, any shape."""
    return np.where(image >= threshold, 255 - image, image).astype(np.uint8)
