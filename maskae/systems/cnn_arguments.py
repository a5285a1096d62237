"""The arguments that every system around a convolutional encoder has, their checks, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice, check_share
from maskae.nn import augmentations, convnext, resnet
from maskae.nn.batch_norm import STATISTICS
from maskae.nn.layers import DTYPES
from maskae.nn.resnet import Pyramid
from maskae.nn.stack import drop_path_draws
from maskae.systems.contract import Batch, Params, State, Variables

NETWORKS = (*resnet.SIZES, *convnext.SIZES)
Network = resnet.ResNet | convnext.ConvNeXt


@dataclass(frozen=True)
class CnnArguments:
    """Base of the systems around one residual network or ConvNeXt, with ResNet-50's values; a system adds its own fields.

    Images arrive in units 0..1 (`data.statistics = "unit"`): views are made in these units, and the network sees them normalised by `mean`
    and `std`. Variables: `encoder` in the parameters, and its batch statistics as `encoder` in the state.

    Args:
        image_size: pixels, one number or (height, width).
        network: one of `NETWORKS`.
        width_factor: on every width of a residual network.
        layers, widths: blocks and (inner) widths of each stage in place of the network's own.
        outer_widths: of each stage of a residual network; None takes the inner ones times the block's expansion.
        stem: "imagenet", or "small" for images of about 32 pixels (residual networks).
        stem_width: channels of the stem; None takes the first stage's.
        style: of a residual network, one of `maskae.nn.resnet.STYLES`.
        zero_last: residual blocks start as the identity (timm's default, not torchvision's).
        layer_scale: ConvNeXt's, at the start.
        mean, std: what the network's input is normalised by, per channel or one value for all.
        drop_path: rate of stochastic depth at the last block, rising linearly from 0 at the first.
        dtype: of the computation; parameters, norms and loss are float32. "float64" is for comparisons with recorded references, under
            `jax.enable_x64`: rectifiers turn a rounding error next to 0 into a different gradient.
        remat: compute blocks anew in the backward pass.

    Raises:
        UserError: where a name is unknown or a number of values does not fit.
    """

    image_size: int | tuple[int, int] = 224
    channels: int = 3
    network: str = "resnet50"
    _: KW_ONLY
    width_factor: float = 1.0
    layers: tuple[int, ...] | None = None
    widths: tuple[int, ...] | None = None
    outer_widths: tuple[int, ...] | None = None
    stem: str = "imagenet"
    stem_width: int | None = None
    style: str = "torchvision"
    zero_last: bool = False
    layer_scale: float = 1e-6
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    drop_path: float = 0.0
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        check_choice("network", self.network, NETWORKS)
        check_choice("style", self.style, resnet.STYLES)
        check_choice("dtype", self.dtype, (*DTYPES, "float64"))
        check_share("drop_path", self.drop_path)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise UserError(f"{name} has {len(values)} values for images of {self.channels} channels")
        if isinstance(self.backbone, resnet.ResNet):
            self.backbone.check()

    @property
    def _pixels(self) -> tuple[int, int]:
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else (self.image_size[0], self.image_size[1])

    @property
    def backbone(self) -> Network:
        """The part that downstream tasks keep."""
        given = {"layers": self.layers, "channels": self.widths}
        options: dict[str, Any] = {name: tuple(value) for name, value in given.items() if value is not None}
        options |= {"drop_path": self.drop_path, "remat": self.remat}
        if self.network in convnext.SIZES:
            sizes = convnext.SIZES[self.network] | options
            return convnext.ConvNeXt(**sizes, layer_scale=self.layer_scale, dtype=jnp.dtype(self.dtype))
        style = resnet.STYLES[self.style]._replace(zero_last=self.zero_last, dtype=jnp.dtype(self.dtype))
        if self.outer_widths is not None:
            options["outputs"] = tuple(self.outer_widths)
        if self.stem_width is not None or "channels" in options:
            options["stem_channels"] = self.stem_width or options["channels"][0]
        return resnet.scaled(self.network, self.width_factor, stem=self.stem, style=style, **options)

    @property
    def width(self) -> int:
        """Channels of the pooled feature."""
        return self.backbone.widths[-1]

    def init_encoder(self, key: jax.Array) -> Variables:
        """Fresh parameters and batch statistics of the encoder."""
        blank = jnp.zeros((1, *self._pixels, self.channels))
        made = self.backbone.init(key, blank, train=False)
        return Variables(made["params"], made.get(STATISTICS, {}))

    def normalised(self, images: jax.Array) -> jax.Array:
        """Images in units 0..1 as the network wants them, float32 [B, H, W, C]."""
        return augmentations.normalise(images, self.mean, self.std)

    def encode(self, params: Params, statistics: State, images: jax.Array, *, train: bool, **options: Any) -> tuple[Pyramid, State]:
        """Normalised images -> the pyramid, and the batch statistics after it. `options`: see `maskae.nn.resnet.ResNet`."""
        variables = {"params": params, STATISTICS: statistics}
        apply: Any = self.backbone.apply
        if not train:
            return apply(variables, images, train=False, **options), statistics
        pyramid, moved = apply(variables, images, train=True, mutable=[STATISTICS], **options)
        return pyramid, moved.get(STATISTICS, statistics)

    def drop_draws(self, rng: jax.Array, example: jax.Array) -> jax.Array | None:
        """Uniform draws [blocks, B] of stochastic depth; None where there is none."""
        if not self.drop_path:
            return None
        depth = sum(self.backbone.layers)
        return drop_path_draws(rng, example, (depth,))

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """Of the last map, with running statistics: `pooled` [B, D], its mean over positions, and `tokens` [B, h*w, D]; float32."""
        pyramid, _ = self.encode(params["encoder"], state["encoder"], self.normalised(batch["image"]), train=False)
        last = pyramid.maps[-1].astype(jnp.float32)
        return {"pooled": last.mean((1, 2)), "tokens": last.reshape(last.shape[0], -1, last.shape[-1])}

    def encoder_flops(self, size: Sequence[int]) -> float:
        """Matmul FLOPs of one forward pass of the encoder over one image of `size` (H, W)."""
        return self.backbone.flops((size[0], size[1]), self.channels)
