"""What is done to a batch on the device: pure functions of arrays and keys.

The host sends uint8; normalisation happens here and nowhere else. A draw per example comes from `fold_in(key, example)` with the example's
position in the global batch, so it does not depend on devices, hosts or accumulation. Mixing has one draw per batch (timm's batch mode).
Papers' order: flip, normalise, `random_erasing`, `mixup_cutmix`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from maskae.data.spec import DataSpec

ERASE_ATTEMPTS = 10
ERASE_AREA = (0.02, 1 / 3)
ERASE_ASPECT = (0.3, 1 / 0.3)


def normalize(images: Array, spec: DataSpec) -> Array:
    """uint8 [B, H, W, C] -> float32 [B, H, W, C]: (x / max_value - mean) / std, per channel."""
    mean = jnp.asarray(spec.mean, jnp.float32)
    std = jnp.asarray(spec.std, jnp.float32)
    return (images.astype(jnp.float32) / spec.max_value - mean) / std


def flip(images: Array, example: Array, key: Array, probability: float = 0.5) -> Array:
    """Mirrors each image left to right with `probability`. images: [B, H, W, C], any dtype; example: int32 [B]."""
    chosen = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), probability))(example)  # [B]
    return jnp.where(chosen[:, None, None, None], images[:, :, ::-1], images)


def smoothed_one_hot(labels: Array, num_classes: int, smoothing: float) -> Array:
    """int32 [B] -> float32 [B, K]: smoothing / K everywhere, and 1 - smoothing more at the label."""
    return jax.nn.one_hot(labels, num_classes) * (1.0 - smoothing) + smoothing / num_classes


def mix_targets(labels: Array, share: Array | float, num_classes: int, smoothing: float) -> Array:
    """Soft targets of a batch mixed with its reverse: `share` of the own label, the rest of the partner's. int32 [B] -> float32 [B, K]."""
    own = smoothed_one_hot(labels, num_classes, smoothing)  # [B, K]
    return own * share + own[::-1] * (1.0 - share)


def mixup(images: Array, share: Array | float) -> Array:
    """`share` of each image plus the rest of its partner, the batch in reverse (Zhang et al. 2018). float32 [B, H, W, C]."""
    return images * share + images[::-1] * (1.0 - share)


def cutmix(images: Array, box: tuple[Array | int, ...]) -> Array:
    """Each image with the box (top, bottom, left, right) taken from its partner, the batch in reverse (Yun et al. 2019). [B, H, W, C]."""
    top, bottom, left, right = box
    rows, columns = jnp.arange(images.shape[1]), jnp.arange(images.shape[2])
    inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))[None, :]  # [H, W]
    return jnp.where(inside[None, :, :, None], images[::-1], images)


def cutmix_box(share: Array | float, center_row: Array | int, center_column: Array | int, height: int, width: int) -> tuple[Array, ...]:
    """(top, bottom, left, right) of the box that removes 1 - share of the area around a centre, clipped to the image (timm)."""
    ratio = jnp.sqrt(1.0 - jnp.asarray(share, jnp.float32))
    half_height, half_width = (jnp.floor(height * ratio).astype(int) // 2, jnp.floor(width * ratio).astype(int) // 2)
    rows = jnp.clip(jnp.stack([center_row - half_height, center_row + half_height]), 0, height)
    columns = jnp.clip(jnp.stack([center_column - half_width, center_column + half_width]), 0, width)
    return rows[0], rows[1], columns[0], columns[1]


def cutmix_share(box: tuple[Array | int, ...], height: int, width: int) -> Array:
    """The share of the own image that a clipped box leaves: what the label's share has to be. float32 scalar."""
    top, bottom, left, right = box
    return 1.0 - jnp.asarray((bottom - top) * (right - left), jnp.float32) / (height * width)


def mixup_cutmix(
    images: Array,
    labels: Array,
    key: Array,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    num_classes: int,
    probability: float = 1.0,
    switch_probability: float = 0.5,
    smoothing: float = 0.0,
) -> tuple[Array, Array]:
    """timm's mixup and cutmix in batch mode: one draw of method, share and box for the whole batch; the partner is the batch in reverse.

    Args:
      images: float32 [B, H, W, C]; labels: int32 [B].
      mixup_alpha, cutmix_alpha: of the Beta distribution of the share; 0 switches the method off.
      probability: of mixing at all.
      switch_probability: of cutmix where both are on.
      smoothing: of the labels.

    Returns (images, soft targets float32 [B, num_classes]).
    """
    height, width = images.shape[1], images.shape[2]
    mix_key, switch_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 5)
    one = jnp.float32(1.0)
    mixes = jax.random.bernoulli(mix_key, probability)
    mixup_share = jnp.where(mixes, jax.random.beta(mixup_key, mixup_alpha, mixup_alpha), one) if mixup_alpha > 0 else one
    if cutmix_alpha <= 0:
        return mixup(images, mixup_share), mix_targets(labels, mixup_share, num_classes, smoothing)
    drawn = jnp.where(mixes, jax.random.beta(cutmix_key, cutmix_alpha, cutmix_alpha), one)
    center = jax.random.randint(box_key, (2,), 0, jnp.array([height, width]))
    box = cutmix_box(drawn, center[0], center[1], height, width)
    cuts = jax.random.bernoulli(switch_key, switch_probability) if mixup_alpha > 0 else jnp.bool_(True)
    share = jnp.where(cuts, cutmix_share(box, height, width), mixup_share)
    mixed = jax.lax.cond(cuts, lambda x: cutmix(x, box), lambda x: mixup(x, mixup_share), images)  # [B, H, W, C]
    return mixed, mix_targets(labels, share, num_classes, smoothing)


def erase_size(area_fraction: Array | float, log_aspect: Array | float, height: int, width: int) -> tuple[Array, Array, Array]:
    """(height, width, fits) of the box with that share of the area and that log(height / width); it must be smaller than the image."""
    area, aspect = height * width * jnp.asarray(area_fraction), jnp.exp(jnp.asarray(log_aspect))
    box_height = jnp.round(jnp.sqrt(area * aspect)).astype(int)
    box_width = jnp.round(jnp.sqrt(area / aspect)).astype(int)
    return box_height, box_width, (box_height < height) & (box_width < width)


def draw_erase_box(
    key: Array, height: int, width: int, area: tuple[float, float] = ERASE_AREA, aspect: tuple[float, float] = ERASE_ASPECT
) -> tuple[Array, Array, Array, Array]:
    """(top, left, height, width) of the first of ten draws that fits; height and width are 0 where none does. int32 scalars."""
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    shares = jax.random.uniform(area_key, (ERASE_ATTEMPTS,), minval=area[0], maxval=area[1])
    aspects = jax.random.uniform(aspect_key, (ERASE_ATTEMPTS,), minval=math.log(aspect[0]), maxval=math.log(aspect[1]))
    heights, widths, fits = erase_size(shares, aspects, height, width)  # [10] each
    first = jnp.argmax(fits)
    box_height, box_width = (jnp.where(fits[first], sizes[first], 0) for sizes in (heights, widths))
    place = jax.random.randint(place_key, (2,), 0, jnp.stack([height - box_height + 1, width - box_width + 1]))
    return place[0], place[1], box_height, box_width


def erase(image: Array, box: tuple[Array | int, ...], noise: Array) -> Array:
    """The image with the box (top, left, height, width) replaced by the same place of `noise`. [H, W, C] both."""
    top, left, height, width = box
    rows, columns = jnp.arange(image.shape[0]), jnp.arange(image.shape[1])
    inside = ((rows >= top) & (rows < top + height))[:, None] & ((columns >= left) & (columns < left + width))[None, :]  # [H, W]
    return jnp.where(inside[:, :, None], noise, image)


def random_erasing(
    images: Array,
    example: Array,
    key: Array,
    probability: float = 0.25,
    area: tuple[float, float] = ERASE_AREA,
    aspect: tuple[float, float] = ERASE_ASPECT,
) -> Array:
    """Random erasing with pixel noise N(0, 1), after normalisation (Zhong et al. 2020, timm's `pixel` mode).

    Args:
      images: float32 [B, H, W, C], normalised; example: int32 [B], keys the draws of each image.
      probability: per image.
      area: share of the image, uniform; aspect: height / width, uniform in its logarithm.
    """

    def one(image: Array, i: Array) -> Array:
        chance_key, box_key, noise_key = jax.random.split(jax.random.fold_in(key, i), 3)
        box = draw_erase_box(box_key, image.shape[0], image.shape[1], area, aspect)
        erased = erase(image, box, jax.random.normal(noise_key, image.shape, image.dtype))
        return jnp.where(jax.random.bernoulli(chance_key, probability), erased, image)

    return jax.vmap(one)(images, example)
