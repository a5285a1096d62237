"""Recipes of random views, by name: what contrastive systems make their pairs and crops with (pieces: `maskae.nn.augmentations`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from maskae.errors import check_choice
from maskae.nn import augmentations as pieces


@dataclass(frozen=True)
class View:
    """Probabilities and strengths of one view; its steps are done in the order of these fields, unless `crop_last`.

    Attributes:
        rotation: probability of a turn by up to `degrees`.
        crop: share of the area that the crop takes, from and to; None takes the whole image.
        horizontal_flip, vertical_flip: probabilities.
        jitter: brightness, contrast, saturation, hue; `jitter_probability` of applying it.
        order: of the four steps of the jitter, "random" or "fixed".
        additive: the jitter's brightness is added to the pixels, as TensorFlow's is, in place of a factor.
        gray, blur, noise: probabilities; `blur_window` is the number of the blur's taps, None a tenth of the image's side.
        crop_last: the colours are changed before the crop and the flips.
    """

    rotation: float = 0.0
    degrees: float = 180.0
    crop: tuple[float, float] | None = (0.2, 1.0)
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_probability: float = 0.8
    order: str = "random"
    additive: bool = False
    gray: float = 0.2
    blur: float = 0.5
    blur_window: int | None = None
    noise: float = 0.0
    crop_last: bool = False

    def __call__(self, images: jax.Array, example: jax.Array, key: jax.Array, size: int, crop: Sequence[float] | None = None) -> jax.Array:
        """One view of each image, units 0..1: [B, H, W, C] -> float32 [B, size, size, C]. `crop` in place of the recipe's own."""
        keys = jax.random.split(key, 8)
        if self.crop_last:
            return self._place(self._colour(images, example, keys), example, keys, size, crop)
        return self._colour(self._place(images, example, keys, size, crop), example, keys)

    def _place(self, x: jax.Array, example: jax.Array, keys: jax.Array, size: int, crop: Sequence[float] | None) -> jax.Array:
        if self.rotation:
            x = pieces.rotate(x, example, keys[0], self.degrees, probability=self.rotation)
        if share := crop or self.crop:
            x = pieces.random_resized_crop(x, example, keys[1], size, (share[0], share[1]))
        elif x.shape[1:3] != (size, size):
            x = jax.image.resize(x, (x.shape[0], size, size, x.shape[-1]), "bilinear")
        if self.horizontal_flip:
            x = pieces.flip(x, example, keys[2], self.horizontal_flip)
        if self.vertical_flip:
            x = pieces.vertical_flip(x, example, keys[3], self.vertical_flip)
        return x

    def _colour(self, x: jax.Array, example: jax.Array, keys: jax.Array) -> jax.Array:
        if any(self.jitter):
            options: dict[str, Any] = dict(zip(pieces.JITTERS, self.jitter, strict=True))
            options |= {"probability": self.jitter_probability, "order": self.order, "additive": self.additive}
            x = pieces.color_jitter(x, example, keys[4], **options)
        if self.gray and x.shape[-1] > 1:
            x = pieces.grayscale(x, example, keys[5], self.gray)
        if self.blur:
            x = pieces.gaussian_blur(x, example, keys[6], window=self.blur_window, probability=self.blur)
        return pieces.gaussian_noise(x, example, keys[7], probability=self.noise) if self.noise else x


VIEWS = {
    # SimCLR's and MoCo v2's list for photographs.
    "natural": View(),
    # The CT study's list for MoCo, BYOL and SimCLR, and its list for SwAV (which does not flip).
    "ct": View(rotation=0.5, vertical_flip=0.5, jitter_probability=1.0, noise=0.5),
    "ct_swav": View(crop=(0.9, 1.0), horizontal_flip=0.0, jitter=(0.4, 0.4, 0.2, 0.2)),
    # For X-rays, which have an upright direction and one channel: crops, and weak changes of brightness and contrast.
    "radiograph": View(crop=(0.4, 1.0), jitter=(0.3, 0.3, 0.0, 0.0), order="fixed", gray=0.0, blur=0.0),
    # No change of colour at all: cheap, and the choice where colour is what separates the classes.
    "crop_flip": View(jitter=(0.0, 0.0, 0.0, 0.0), gray=0.0, blur=0.0),
    # TIP's lists: photographs of cars, and three short-axis slices of a heart as channels.
    "cars": View(crop=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.0), blur_window=29, crop_last=True),
    "heart": View(rotation=1.0, degrees=45.0, jitter=(0.5, 0.5, 0.5, 0.0), jitter_probability=1.0, gray=0.0, blur=0.0, crop_last=True),
    # G-SimCLR's lists for CIFAR-10, whose grey step computes grey and throws it away, and for ImageNet. Contrast is that around the mean
    # grey and saturation a mixture with the own grey, where TensorFlow's are per channel and of HSV.
    "guided_cifar": View(
        crop=None, jitter=(0.16, 0.16, 0.16, 0.04), jitter_probability=0.5, order="fixed", additive=True, gray=0.0, blur=0.0
    ),
    "guided_imagenet": View(crop=None, jitter=(0.8, 0.8, 0.8, 0.2), order="fixed", additive=True, blur=0.0),
    # For characters, which mirrored are other characters.
    "crop": View(crop=(0.6, 1.0), horizontal_flip=0.0, jitter=(0.0, 0.0, 0.0, 0.0), gray=0.0, blur=0.0),
}


def view_called(name: str) -> View:
    """The recipe of that name. Raises UserError where there is none."""
    check_choice("views", name, VIEWS)
    return VIEWS[name]
