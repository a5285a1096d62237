"""Residual networks that return their pyramid of maps (He et al. 2016, arXiv 1512.03385), dense or on visible cells only.

Parameters and arithmetic follow torchvision: the stride lies on the 3 x 3 convolution, padding is symmetric, convolutions have no bias,
initialisation is Kaiming-normal over the fan-out. Names: `stem/conv`, `stem/norm`, `stage{1..}_block{0..}/{conv1,norm1,conv2,norm2,conv3,
norm3,shortcut,shortcut_norm}`; running statistics under the same names in the collection `batch_stats`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice
from maskae.nn.batch_norm import BatchNorm
from maskae.nn.layers import drop_path
from maskae.nn.sharding import constrain
from maskae.nn.sparse_conv import masked, max_pool, visible_at
from maskae.vectors import at_least_float32

BLOCKS = ("bottleneck", "basic")
STEMS = ("imagenet", "small")
PADDINGS = ("symmetric", "same")
EXPANSION = {"bottleneck": 4, "basic": 1}
SIZES: dict[str, dict[str, Any]] = {
    "resnet18": {"layers": (2, 2, 2, 2), "block": "basic"},
    "resnet34": {"layers": (3, 4, 6, 3), "block": "basic"},
    "resnet50": {"layers": (3, 4, 6, 3), "block": "bottleneck"},
    "resnet101": {"layers": (3, 4, 23, 3), "block": "bottleneck"},
}

# Of the convolutions; Keras' He-normal is truncated.
STARTS = {
    "kaiming_fan_out": nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    "he": nn.initializers.he_normal(),
    "glorot": nn.initializers.glorot_uniform(),
}


class Style(NamedTuple):
    """What all blocks of a network share.

    Attributes:
        block: "bottleneck" (1x1, 3x3, 1x1) or "basic" (3x3, 3x3).
        conv_bias: a bias in every convolution (Keras' networks have one).
        shortcut_norm: batch norm after a projection shortcut.
        padding: "symmetric" (torchvision), or "same" (TensorFlow: an odd row of padding lies at the end).
        early_stride: the stride lies on a bottleneck's first 1x1 convolution, as in the paper and in Keras, not on the 3x3 one.
        start: of the convolutions' kernels, one of `STARTS`.
        zero_last: the last norm of each block starts with scale 0 (timm's default; torchvision's is off).
        momentum, epsilon: of the batch norms, see `maskae.nn.batch_norm.BatchNorm`.
        dtype: of activations; parameters are float32.
    """

    block: str = "bottleneck"
    conv_bias: bool = False
    shortcut_norm: bool = True
    padding: str = "symmetric"
    early_stride: bool = False
    start: str = "kaiming_fan_out"
    zero_last: bool = False
    momentum: float = 0.1
    epsilon: float = 1e-5
    dtype: Any = jnp.float32


STYLES = {
    "torchvision": Style(),
    # keras.applications.
    "keras": Style(conv_bias=True, early_stride=True, start="glorot", momentum=0.01, epsilon=1.001e-5),
    # The small networks of "Idiomatic Programmer" (Ferlitsch), written in Keras.
    "keras_small": Style(conv_bias=True, shortcut_norm=False, padding="same", start="he", momentum=0.01, epsilon=1e-3),
}


class Pyramid(NamedTuple):
    """`maps`: one [B, h, w, C] per stage, fine to coarse; `named`: every intermediate result by name where they were asked for."""

    maps: tuple[jax.Array, ...]
    named: dict[str, jax.Array]

    @property
    def pooled(self) -> jax.Array:
        """The mean over the positions of the last map, at least float32 [B, C]."""
        return at_least_float32(self.maps[-1]).mean((1, 2))


def conv(style: Style, channels: int, window: int, stride: int = 1, *, name: str) -> nn.Conv:
    """A convolution of `style` with `window` x `window` taps, named in the enclosing module."""
    pad = window // 2
    return nn.Conv(
        channels,
        (window, window),
        (stride, stride),
        padding="SAME" if style.padding == "same" else ((pad, pad), (pad, pad)),
        use_bias=style.conv_bias,
        kernel_init=STARTS[style.start],
        dtype=style.dtype,
        name=name,
    )


class Stem(nn.Module):
    """The layers before the first stage: 7x7 stride 2, norm, ReLU, 3x3 max-pool stride 2 ("imagenet"), or 3x3, norm, ReLU ("small")."""

    kind: str
    channels: int
    style: Style
    train: bool

    @nn.compact
    def __call__(self, images: jax.Array, visible: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """[B, H, W, C] -> [B, H/4, W/4, channels] ("small": the resolution stays), and intermediate results."""
        window, stride = (7, 2) if self.kind == "imagenet" else (3, 1)
        x = masked(conv(self.style, self.channels, window, stride, name="conv")(images.astype(self.style.dtype)), visible)
        norm = BatchNorm(self.style.momentum, self.style.epsilon, dtype=self.style.dtype, name="norm")
        normed = norm(x, None if visible is None else visible_at(visible, x.shape[1:3]), train=self.train)
        named = {"stem_conv": x, "stem_bn": normed}
        x = jax.nn.relu(normed)
        if self.kind == "imagenet":
            x = masked(max_pool(x), visible)
            named["stem_pool"] = x
        return x, named


class ResidualBlock(nn.Module):
    """A residual block, `channels` wide inside and `outputs` wide outside."""

    channels: int
    outputs: int
    stride: int
    style: Style
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, visible: jax.Array | None = None, drop: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
        """[B, H, W, C] -> [B, H/stride, W/stride, outputs]. `drop`: the rate and the uniform draws [B] of stochastic depth."""
        style = self.style

        def step(x: jax.Array, channels: int, window: int, stride: int, name: str, norm: str, *, last: bool = False) -> jax.Array:
            x = masked(conv(style, channels, window, stride, name=name)(x), visible)
            where = None if visible is None else visible_at(visible, x.shape[1:3])
            scale = 0.0 if last and style.zero_last else 1.0
            module = BatchNorm(style.momentum, style.epsilon, scale_init=scale, dtype=style.dtype, name=norm)
            return module(x, where, train=self.train)

        if style.block == "bottleneck":
            first, second = (self.stride, 1) if style.early_stride else (1, self.stride)
            y = jax.nn.relu(step(x, self.channels, 1, first, "conv1", "norm1"))
            y = jax.nn.relu(step(y, self.channels, 3, second, "conv2", "norm2"))
            y = step(y, self.outputs, 1, 1, "conv3", "norm3", last=True)
        else:
            y = jax.nn.relu(step(x, self.channels, 3, self.stride, "conv1", "norm1"))
            y = step(y, self.outputs, 3, 1, "conv2", "norm2", last=True)
        if drop is not None:
            y = drop_path(y.reshape(y.shape[0], -1, y.shape[-1]), *drop).reshape(y.shape)
        if self.stride != 1 or x.shape[-1] != self.outputs:
            if style.shortcut_norm:
                x = step(x, self.outputs, 1, self.stride, "shortcut", "shortcut_norm")
            else:
                x = masked(conv(style, self.outputs, 1, self.stride, name="shortcut")(x), visible)
        return constrain(jax.nn.relu(y + x), "batch")


class ResNet(nn.Module):
    """A residual network of any depth and width; the defaults are ResNet-50, and `scaled` builds others by name.

    Args:
        layers: blocks of each stage.
        channels: inner width of each stage.
        outputs: outer width of each stage; None takes the block's expansion (4 for "bottleneck") times `channels`.
        strides: of each stage's first block.
        stem: "imagenet" (stride 4) or "small" (a 3x3 convolution, stride 1, for images of about 32 pixels).
        stem_channels: width of the stem.
        drop_path: rate of stochastic depth at the last block, rising linearly from 0 at the first.
        remat: compute every block anew in the backward pass instead of keeping its activations.
        style: see `Style`.
    """

    layers: Sequence[int] = (3, 4, 6, 3)
    channels: Sequence[int] = (64, 128, 256, 512)
    outputs: Sequence[int] | None = None
    strides: Sequence[int] = (1, 2, 2, 2)
    stem: str = "imagenet"
    stem_channels: int = 64
    drop_path: float = 0.0
    remat: bool = False
    style: Style = Style()

    def check(self) -> None:
        """Refuse what cannot work. Raises UserError."""
        check_choice("block", self.style.block, BLOCKS)
        check_choice("stem", self.stem, STEMS)
        check_choice("padding", self.style.padding, PADDINGS)
        check_choice("start", self.style.start, STARTS)
        for name, values in (("channels", self.channels), ("strides", self.strides), ("outputs", self.outputs or self.channels)):
            if len(values) < len(self.layers):
                raise UserError(f"{name}={tuple(values)} has fewer values than layers={tuple(self.layers)}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each map of the pyramid, fine to coarse."""
        expansion = EXPANSION[self.style.block]
        return tuple(self.outputs or [expansion * each for each in self.channels])[: len(self.layers)]

    @property
    def reductions(self) -> tuple[int, ...]:
        """Pixels per position of each map, fine to coarse: (4, 8, 16, 32)."""
        reached = [4 if self.stem == "imagenet" else 1]
        for stride in self.strides[: len(self.layers)]:
            reached.append(reached[-1] * stride)
        return tuple(reached[1:])

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool,
        visible: jax.Array | None = None,
        drop_draws: jax.Array | None = None,
        collect: bool = False,
    ) -> Pyramid:
        """[B, H, W, C] -> the pyramid.

        Args:
            images: float [B, H, W, C].
            train: batch statistics instead of running ones, and stochastic depth where `drop_draws` are given.
            visible: bool [B, h, w], one value per cell of the coarsest map; hidden positions of all maps are exactly 0. None: dense.
            drop_draws: uniform [blocks, B].
            collect: also return every block's output and the parts of the stem by name.
        """
        self.check()
        x, named = Stem(self.stem, self.stem_channels, self.style, train, name="stem")(masked(images, visible), visible)
        block = nn.remat(ResidualBlock, prevent_cse=False) if self.remat else ResidualBlock
        maps, index, depth = [], 0, sum(self.layers)
        stages = zip(self.layers, self.channels, self.widths, self.strides, strict=False)
        for stage, (count, channels, outputs, stride) in enumerate(stages):
            for number in range(count):
                make = partial(block, channels, outputs, stride if number == 0 else 1, self.style, train)
                drop = None
                if train and self.drop_path and drop_draws is not None:
                    drop = (jnp.float32(self.drop_path * index / max(depth - 1, 1)), drop_draws[index])
                x = make(name=f"stage{stage + 1}_block{number}")(x, visible, drop)
                named[f"layer{stage + 1}_block{number}"] = x
                index += 1
            maps.append(x)
        return Pyramid(tuple(maps), named if collect else {})

    def flops(self, size: tuple[int, int], channels: int = 3) -> float:
        """Matmul FLOPs (2 per multiply-add) of one forward pass over one image of `size` (H, W): 8.2e9 for ResNet-50 at 224 pixels."""
        window, stride = (49, 2) if self.stem == "imagenet" else (9, 1)
        area = -(-size[0] // stride) * -(-size[1] // stride)
        total = float(area * window * channels * self.stem_channels)
        area = -(-area // 4) if self.stem == "imagenet" else area
        inside = self.stem_channels
        for count, width, outputs, stride in zip(self.layers, self.channels, self.widths, self.strides, strict=False):
            for number in range(count):
                step = stride if number == 0 else 1
                after = area // step**2
                if self.style.block == "bottleneck":
                    first = after if self.style.early_stride else area
                    total += first * inside * width + after * 9 * width**2 + after * width * outputs
                else:
                    total += after * 9 * (inside * width + width * outputs)
                total += after * inside * outputs if step != 1 or inside != outputs else 0
                area, inside = after, outputs
        return 2.0 * total


def scaled(name: str, width_factor: float = 1.0, **options: Any) -> ResNet:
    """A network of `SIZES` by name with every width times `width_factor` (0.25 gives a stem of 16); `options` are further arguments.

    Raises UserError for an unknown name.
    """
    check_choice("network", name, SIZES)
    channels = tuple(max(1, round(width_factor * each)) for each in (64, 128, 256, 512))
    size = SIZES[name]
    style = options.pop("style", Style())._replace(block=size["block"])
    return ResNet(**{"layers": size["layers"], "channels": channels, "stem_channels": channels[0], "style": style, **options})
