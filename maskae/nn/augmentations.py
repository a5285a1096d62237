"""Random views of images, made on the device inside a system's loss: pure functions of (images, example, key).

Images are float32 [B, H, W, C] in units where 0 is black and 1 white; geometric functions take any units. `example` int32 [B] are the
positions in the global batch: every draw of image i comes from `fold_in(key, example[i])`, so that it does not depend on devices or hosts.
Two images with the same number get the same draws: `jnp.zeros_like(example)` draws once for the whole batch. Give each call a key of its
own. Papers' `p` is `probability`, per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from maskae.data.device import flip
from maskae.errors import UserError, check_choice
from maskae.vectors import at_least_float32

__all__ = [
    "color_jitter",
    "draw_crop_boxes",
    "flip",
    "gaussian_blur",
    "gaussian_noise",
    "grayscale",
    "normalise",
    "random_resized_crop",
    "rotate",
    "rotate90",
    "solarize",
    "square_crop",
    "vertical_flip",
]

CROP_ATTEMPTS = 10
RESIZINGS = ("bilinear", "bicubic")
LUMA = (0.299, 0.587, 0.114)
ORDERS = ("random", "fixed")


def each(draw: Callable[[Array], Any], example: Array, key: Array) -> Any:
    """`draw(key of the image)` for every image: leaves gain the leading axis B."""
    return jax.vmap(lambda i: draw(jax.random.fold_in(key, i)))(example)


def chosen(example: Array, key: Array, probability: float) -> Array:
    """bool [B, 1, 1, 1], True with `probability`."""
    return each(lambda k: jax.random.bernoulli(k, probability), example, key)[:, None, None, None]


def normalise(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """(images - mean) / std per channel; one value stands for all channels. float [B, H, W, C], at least float32."""
    wide = at_least_float32(images)
    return (wide - jnp.asarray(mean, wide.dtype)) / jnp.asarray(std, wide.dtype)


def draw_crop_boxes(
    example: Array, key: Array, shape: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Array:
    """Boxes int32 [B, 4] (top, left, height, width) by torchvision's rule: ten draws of area and aspect, else the central crop.

    Args:
        shape: (H, W) of the images.
        scale: share of the area, uniform.
        ratio: width / height, uniform in its logarithm.
    """
    height, width = shape
    if width / height < ratio[0]:
        whole = (round(width / ratio[0]), width)
    elif width / height > ratio[1]:
        whole = (height, round(height * ratio[1]))
    else:
        whole = (height, width)

    def one(key: Array) -> Array:
        area_key, ratio_key, place_key = jax.random.split(key, 3)
        area = height * width * jax.random.uniform(area_key, (CROP_ATTEMPTS,), minval=scale[0], maxval=scale[1])
        log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
        aspect = jnp.exp(jax.random.uniform(ratio_key, (CROP_ATTEMPTS,), minval=log_ratio[0], maxval=log_ratio[1]))
        wide = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)  # [10]
        tall = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)  # [10]
        fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
        first = jnp.argmax(fits)
        size = jnp.where(fits.any(), jnp.stack([tall[first], wide[first]]), jnp.asarray(whole, jnp.int32))
        room = jnp.asarray(shape, jnp.int32) - size
        place = jax.random.randint(place_key, (2,), 0, room + 1)
        return jnp.concatenate([jnp.where(fits.any(), place, room // 2), size])

    return each(one, example, key)


def random_resized_crop(
    images: Array,
    example: Array,
    key: Array,
    size: int | tuple[int, int],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    method: str = "bilinear",
) -> Array:
    """A random part of each image resized to `size`, antialiased where it shrinks (as Pillow does). [B, H, W, C] -> [B, h, w, C].

    See `draw_crop_boxes` for `scale` and `ratio`; `method` is "bilinear" or "bicubic". Raises UserError for another one.
    """
    check_choice("resizing", method, RESIZINGS)
    target = (size, size) if isinstance(size, int) else (size[0], size[1])
    boxes = draw_crop_boxes(example, key, (images.shape[1], images.shape[2]), scale, ratio)
    return resized_boxes(images, boxes, target, method)


def square_crop(images: Array, example: Array, key: Array, size: int, sides: tuple[int, int]) -> Array:
    """A random square whose side in pixels is uniform in `sides` (smallest, largest; at most the image's), resized bilinearly to `size`.

    [B, H, W, C] -> [B, size, size, C].
    """
    height, width = images.shape[1:3]
    low, high = (min(side, height, width) for side in sides)

    def one(key: Array) -> Array:
        side_key, place_key = jax.random.split(key)
        side = jnp.broadcast_to(jax.random.randint(side_key, (), low, high + 1), (2,))
        room = jnp.asarray((height, width), jnp.int32) - side
        return jnp.concatenate([jax.random.randint(place_key, (2,), 0, room + 1), side])

    return resized_boxes(images, each(one, example, key), (size, size))


def resized_boxes(images: Array, boxes: Array, size: tuple[int, int], method: str = "bilinear") -> Array:
    """The box of each image as `size`, computed as Pillow does: [B, H, W, C], int [B, 4] (top, left, height, width) -> [B, h, w, C]."""

    def one(image: Array, box: Array) -> Array:
        rows = _taps(box[0], box[2], image.shape[0], size[0], method)  # [h, H]
        columns = _taps(box[1], box[3], image.shape[1], size[1], method)  # [w, W]
        # Three passes of bfloat16 on a TPU: one would cost the last bits of an 8-bit image.
        return jnp.einsum("hi,wj,ijc->hwc", rows, columns, image, precision=jax.lax.Precision.HIGH)

    return jax.vmap(one)(images.astype(jnp.float32), boxes)


def _taps(start: Array, length: Array, inputs: int, outputs: int, method: str) -> Array:
    """The matrix [outputs, inputs] that resizes inputs start..start+length-1 along one axis; nothing outside of them has weight."""
    ratio = length.astype(jnp.float32) / outputs
    center = start + (jnp.arange(outputs) + 0.5) * ratio
    place = jnp.arange(inputs)
    distance = jnp.abs(place + 0.5 - center[:, None]) / jnp.maximum(ratio, 1.0)
    if method == "bilinear":
        weight = jnp.maximum(0.0, 1 - distance)
    else:
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weight = jnp.where(distance < 1, near, jnp.where(distance < 2, far, 0.0))
    weight = jnp.where((place >= start) & (place < start + length), weight, 0.0)
    return weight / weight.sum(1, keepdims=True)


def vertical_flip(images: Array, example: Array, key: Array, probability: float = 0.5) -> Array:
    """Mirrors each image top to bottom with `probability` (`flip` mirrors left to right)."""
    return flip(images.swapaxes(1, 2), example, key, probability).swapaxes(1, 2)


def rotate90(images: Array, example: Array, key: Array) -> Array:
    """Turns each image by 0, 90, 180 or 270 degrees. Raises UserError unless they are square."""
    if images.shape[1] != images.shape[2]:
        raise UserError(f"rotate90 needs square images, not {images.shape[1]} x {images.shape[2]}")
    turns = each(lambda k: jax.random.randint(k, (), 0, 4), example, key)[:, None, None, None]
    return jnp.select([turns == n for n in range(4)], [jnp.rot90(images, n, (1, 2)) for n in range(4)])


def rotate(images: Array, example: Array, key: Array, degrees: float = 180.0, probability: float = 1.0) -> Array:
    """Turns each image about its centre by U(-degrees, degrees); bilinear, with 0 outside of the image. Sizes stay."""
    angle_key, chance_key = jax.random.split(key)
    limit = math.radians(degrees)
    angles = each(lambda k: jax.random.uniform(k, (), minval=-limit, maxval=limit), example, angle_key)  # [B]
    height, width = images.shape[1:3]
    row, column = jnp.meshgrid(jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij")

    def one(image: Array, angle: Array) -> Array:
        cosine, sine = jnp.cos(angle), jnp.sin(angle)
        places = [cosine * row - sine * column + (height - 1) / 2, sine * row + cosine * column + (width - 1) / 2]
        sample = jax.vmap(lambda plane: jax.scipy.ndimage.map_coordinates(plane, places, order=1), -1, -1)
        return sample(image)

    turned = jax.vmap(one)(images, angles)
    return jnp.where(chosen(example, chance_key, probability), turned, images)


def luma(images: Array) -> Array:
    """Grey values [..., 1] of colours [..., 3] by Rec. 601 (Pillow's and torchvision's weights); one channel stays as it is."""
    if images.shape[-1] == 1:
        return images
    if images.shape[-1] != len(LUMA):
        raise UserError(f"colour augmentations are for 1 or 3 channels, not {images.shape[-1]}")
    return (images * jnp.asarray(LUMA, images.dtype)).sum(-1, keepdims=True)


def grayscale(images: Array, example: Array, key: Array, probability: float = 0.2) -> Array:
    """Replaces colours by their grey value with `probability`."""
    return jnp.where(chosen(example, key, probability), luma(images), images)


def solarize(images: Array, example: Array, key: Array, threshold: float = 0.5, probability: float = 0.2) -> Array:
    """Inverts the pixel values from `threshold` on with `probability` (BYOL)."""
    return jnp.where(chosen(example, key, probability) & (images >= threshold), 1 - images, images)


def _hue(images: Array, shift: Array) -> Array:
    """Hue turned by `shift` (1 is the whole circle), saturation and value kept; [B, H, W, 3] and [B, 1, 1, 1]."""
    high, low = images.max(-1, keepdims=True), images.min(-1, keepdims=True)
    chroma = high - low
    red, green, blue = jnp.split(images, 3, -1)
    safe = jnp.where(chroma > 0, chroma, 1.0)
    sixth = jnp.where(
        high == red,
        (green - blue) / safe,
        jnp.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    turned = sixth + 6 * shift
    # Channel n of hue h is high - chroma * clip(min(k, 4 - k), 0, 1) with k = (n + h) mod 6 and n = 5, 3, 1.
    k = jnp.mod(jnp.asarray([5.0, 3.0, 1.0]) + turned, 6.0)
    return high - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def adjust(images: Array, what: str, amount: Array) -> Array:
    """One step of colour jitter as torchvision computes it, clipped to 0..1. images [B, H, W, C]; amount float32 [B].

    Args:
        what: "brightness" (factor on the values), "shift" (added to them), "contrast" (away from the image's mean grey), "saturation" (away
            from the own grey) or "hue" (shift, 1 being the whole circle). Saturation and hue leave one-channel images alone.
    """
    amount = amount[:, None, None, None]
    if what == "hue":
        return images if images.shape[-1] == 1 else jnp.clip(_hue(images, amount), 0, 1)
    if what == "shift":
        return jnp.clip(images + amount, 0, 1)
    if what == "brightness":
        base = jnp.zeros((), images.dtype)
    else:
        base = luma(images)
        base = base.mean((1, 2, 3), keepdims=True) if what == "contrast" else base
    return jnp.clip(base + amount * (images - base), 0, 1)


JITTERS = ("brightness", "contrast", "saturation", "hue")


def color_jitter(
    images: Array,
    example: Array,
    key: Array,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    probability: float = 1.0,
    order: str = "random",
    additive: bool = False,
) -> Array:
    """torchvision's ColorJitter: factors U[max(0, 1 - s), 1 + s], hue shift U[-hue, hue]; applied together with `probability`.

    `order` "random" is drawn per image; "fixed" is brightness, contrast, saturation, hue (and a quarter of the work). `additive` adds
    U[-brightness, brightness] in place of the factor (TensorFlow's). Raises UserError for another order.
    """
    check_choice("order", order, ORDERS)
    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
    active = [name for name in JITTERS if strengths[name]]
    if not active:
        return images
    what = {name: "shift" if additive and name == "brightness" else name for name in active}
    chance_key, order_key, *keys = jax.random.split(key, 2 + len(JITTERS))

    def amount(name: str) -> Array:
        strength, draw_key = strengths[name], keys[JITTERS.index(name)]
        low, high = (-strength, strength) if name == "hue" or what[name] == "shift" else (max(0.0, 1 - strength), 1 + strength)
        return each(lambda k: jax.random.uniform(k, (), minval=low, maxval=high), example, draw_key)

    amounts = {name: amount(name) for name in active}
    x = images
    if order == "fixed":
        for name in active:
            x = adjust(x, what[name], amounts[name])
    else:
        turns = each(lambda k: jax.random.permutation(k, len(active)), example, order_key)  # [B, steps]
        for step in range(len(active)):
            now = turns[:, step][:, None, None, None]
            x = jnp.select([now == i for i in range(len(active))], [adjust(x, what[name], amounts[name]) for name in active])
    return jnp.where(chosen(example, chance_key, probability), x, images)


def gaussian_blur(
    images: Array,
    example: Array,
    key: Array,
    sigma: tuple[float, float] = (0.1, 2.0),
    window: int | None = None,
    probability: float = 0.5,
) -> Array:
    """Gaussian blur of deviation U[sigma] pixels, borders reflected, with `probability` (SimCLR, appendix A).

    `window` is the number of taps, odd; None takes a tenth of the image's side, as SimCLR, at least 3.
    """
    height, width = images.shape[1:3]
    window = max(3, height // 10 // 2 * 2 + 1) if window is None else window
    if window % 2 == 0 or window // 2 >= min(height, width):
        raise UserError(f"gaussian_blur: window={window} must be odd and less than twice the image's side {min(height, width)}")
    half = window // 2
    sigma_key, chance_key = jax.random.split(key)
    deviation = each(lambda k: jax.random.uniform(k, (), minval=sigma[0], maxval=sigma[1]), example, sigma_key)  # [B]
    taps = jax.nn.softmax(-0.5 * jnp.square(jnp.arange(-half, half + 1) / deviation[:, None]), -1)  # [B, window]
    taps = taps[:, :, None, None, None]
    padded = jnp.pad(images, ((0, 0), (half, half), (half, half), (0, 0)), mode="reflect")
    blurred: Array = sum((taps[:, t] * padded[:, t : t + height] for t in range(1, window)), taps[:, 0] * padded[:, :height])
    blurred = sum((taps[:, t] * blurred[:, :, t : t + width] for t in range(1, window)), taps[:, 0] * blurred[:, :, :width])
    return jnp.where(chosen(example, chance_key, probability), blurred, images)


def gaussian_noise(
    images: Array, example: Array, key: Array, variance: tuple[float, float] = (1e-5, 1e-4), probability: float = 0.5
) -> Array:
    """Adds normal noise whose variance is log-uniform in `variance`, then clips to 0..1, with `probability`."""
    variance_key, noise_key, chance_key = jax.random.split(key, 3)
    low, high = math.log(variance[0]), math.log(variance[1])
    deviation = each(lambda k: jnp.exp(jax.random.uniform(k, (), minval=low, maxval=high) / 2), example, variance_key)
    noise = each(lambda k: jax.random.normal(k, images.shape[1:]), example, noise_key)
    noisy = jnp.clip(images + deviation[:, None, None, None] * noise, 0, 1)
    return jnp.where(chosen(example, chance_key, probability), noisy, images)
