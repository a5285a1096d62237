"""CROMA's arguments, their checks, and the networks that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice, check_heads
from maskae.masking import keep_count
from maskae.nn.alibi import alibi_slopes
from maskae.nn.flops import block_flops, linear_flops
from maskae.nn.initialisation import uniform_by_fan_in
from maskae.nn.joint import Beside, JointEncoder, PooledFeedForward
from maskae.nn.layers import ATTENTION_IMPLEMENTATIONS, DTYPES, AttentionContext
from maskae.nn.patches import patch_grid
from maskae.nn.stack import REMAT_POLICIES
from maskae.nn.vit import MaeDecoder, ViTEncoder
from maskae.systems.contract import Batch, Params, Variables

SENSORS = ("optical", "radar")
EPSILON = 1e-5
INITIAL_SCALE = math.log(1 / 0.07)


@dataclass(frozen=True)
class CromaArguments:
    """Arguments with the values of CROMA-B; `depth` is that of the optical encoder, the other two have half of it.

    Args:
        image_size: pixels of a square training image.
        mask_ratio, radar_mask_ratio: share of removed patches; None takes the optical one for radar too.
        joint_self_bias: distances in the joint block's self-attention: "radar" between its own tokens, or "cross" from them to the optical
            ones, which is what the released code does (the same without masks).
        key_stop_gradient: an embedding learns from the contrastive loss only as a query, as in the released code.
        target_norm: "joint" normalises a patch over all channels of both sensors (released), "per_sensor" over each one's.
        crop_sides: (smallest, largest) side in pixels of the random square that is resized to `image_size`; (0, 0) crops nothing.
        flip: random mirroring and quarter turns.
        mixup_alpha: Beta parameter of mixing pairs of examples; 0 mixes nothing.
        feature_size: pixels that images are resized to before `features`; 0 leaves them as they are, whatever their size.
        pool: what `features` calls pooled: "joint" (where both sensors are there), "optical" or "radar".

    Raises:
        UserError: where the sizes do not fit together or a name is unknown.
    """

    image_size: int = 120
    optical_channels: int = 12
    radar_channels: int = 2
    patch_size: int = 8
    width: int = 768
    depth: int = 12
    heads: int = 16
    mlp_ratio: float = 4.0
    decoder_width: int = 512
    decoder_depth: int = 1
    decoder_heads: int = 8
    mask_ratio: float = 0.75
    radar_mask_ratio: float | None = None
    contrastive_weight: float = 1.0
    reconstruction_weight: float = 1.0
    joint_self_bias: str = "radar"
    key_stop_gradient: bool = True
    target_norm: str = "joint"
    crop_sides: tuple[int, int] = (0, 0)
    flip: bool = False
    mixup_alpha: float = 0.0
    feature_size: int = 0
    pool: str = "joint"
    dtype: str = "float32"
    scan: bool = False
    remat: str = "none"
    attention: str = "xla"

    couples_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        check_choice("joint_self_bias", self.joint_self_bias, ("radar", "cross"))
        check_choice("target_norm", self.target_norm, ("joint", "per_sensor"))
        check_choice("pool", self.pool, ("joint", *SENSORS))
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("remat", self.remat, REMAT_POLICIES)
        check_choice("attention", self.attention, ATTENTION_IMPLEMENTATIONS)
        check_heads("width", self.width, self.heads)
        check_heads("decoder_width", self.decoder_width, self.decoder_heads)
        length = math.prod(patch_grid(self.image_size, self.image_size, self.patch_size))
        if self.depth < 2:
            raise UserError(f"depth={self.depth}: the radar and the joint encoder have half as many layers, so it must be at least 2")
        for sensor in SENSORS:
            if not 0 < self.kept(sensor, length) < length:
                raise UserError(f"{sensor}: a mask ratio of {self.ratio(sensor)} keeps {self.kept(sensor, length)} of {length} patches")
        if self.joint_self_bias == "cross" and self.kept("radar", length) != self.kept("optical", length):
            raise UserError("joint_self_bias='cross' needs as many kept patches in both sensors: set radar_mask_ratio=None")
        if (self.crop_sides[0] > 0) != (self.crop_sides[1] > 0) or self.crop_sides[0] > self.crop_sides[1]:
            raise UserError(f"crop_sides={self.crop_sides}: give the smallest and the largest side in pixels, or (0, 0)")

    def ratio(self, sensor: str) -> float:
        """Share of a sensor's patches that is removed."""
        return self.mask_ratio if sensor == "optical" or self.radar_mask_ratio is None else self.radar_mask_ratio

    def kept(self, sensor: str, length: int) -> int:
        """Patches that a sensor keeps of `length`."""
        return keep_count(length, self.ratio(sensor))

    def grid_of(self, images: jax.Array) -> tuple[int, int]:
        """Rows and columns of patches of images [B, H, W, c]. Raises UserError where patches do not tile them."""
        return patch_grid(images.shape[1], images.shape[2], self.patch_size)

    @property
    def compute(self) -> dict[str, Any]:
        """How stacks of blocks compute."""
        return {"epsilon": EPSILON, "dtype": jnp.dtype(self.dtype), "scan": self.scan, "remat": self.remat, "attention": self.attention}

    def channels(self, sensor: str) -> int:
        """Channels of a sensor."""
        return {"optical": self.optical_channels, "radar": self.radar_channels}[sensor]

    def encoder(self, sensor: str) -> ViTEncoder:
        """A sensor's encoder: no CLS token, no position table."""
        depth = self.depth if sensor == "optical" else self.depth // 2
        options: dict[str, Any] = {"qkv_bias": "none", "with_cls": False, "with_position": False, **self.compute}
        return ViTEncoder(self.patch_size, self.width, depth, self.heads, (1, 1), self.mlp_ratio, **options)

    @property
    def joint(self) -> JointEncoder:
        """Radar tokens that look at optical ones."""
        return JointEncoder(self.depth // 2, self.heads, self.mlp_ratio, **self.compute)

    @property
    def head(self) -> PooledFeedForward:
        """What turns a sensor's mean token into its representation."""
        return PooledFeedForward(self.mlp_ratio, EPSILON, jnp.dtype(self.dtype))

    @property
    def decoder(self) -> MaeDecoder:
        """Predicts a patch's values, the optical ones first, each sensor's ordered (row, column, channel)."""
        values = self.patch_size**2 * (self.optical_channels + self.radar_channels)
        sizes = (self.decoder_width, self.decoder_depth, self.decoder_heads, values, self.mlp_ratio)
        return MaeDecoder(*sizes, with_cls=False, qkv_bias="none", **self.compute)

    @property
    def projection(self) -> nn.Dense:
        """Into the space in which sensors are matched."""
        return nn.Dense(self.width, dtype=jnp.dtype(self.dtype))

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh parameters: every linear map from its fan-in, the scale of the logits at ln(1/0.07). The batch is not read."""
        grid = (1, 2)
        tokens = jnp.zeros((1, 2, self.width))
        places = jnp.zeros((1, 2, 2))
        beside = Beside(tokens, self.distances(places, places), self.distances(places, places))
        params: Params = {"logit_scale": jnp.asarray(INITIAL_SCALE, jnp.float32)}
        for sensor in SENSORS:
            images = jnp.zeros((1, self.patch_size, self.patch_size, self.channels(sensor)))
            params[sensor] = self.encoder(sensor).init(rng, images)["params"]
            params[f"{sensor}_head"] = self.head.init(rng, tokens)["params"]
            params[f"{sensor}_projection"] = self.projection.init(rng, tokens[:, 0])["params"]
        params["joint"] = self.joint.init(rng, tokens, beside)["params"]
        decoder_key, fan_in_key = jax.random.split(rng)
        params["decoder"] = self.decoder.init(decoder_key, tokens, jnp.arange(2)[None], grid)["params"]
        return Variables(uniform_by_fan_in(params, fan_in_key), {})

    def distances(self, query_positions: jax.Array, key_positions: jax.Array) -> AttentionContext:
        """ALiBi between places [B, n, 2] and [B, m, 2] of one sensor or of two; attention forms the bias."""
        return AttentionContext(positions=query_positions, slopes=jnp.asarray(alibi_slopes(self.heads)), key_positions=key_positions)

    def forward_flops(self, batch: Batch) -> float:
        """Embedding of all patches, the three encoders on the kept ones, both heads, the decoder on all; 23.0 GFLOP for CROMA-B at 120.

        The products of all pairs of the batch are not of an example and are left out.
        """
        images = batch["sensor_optical"]
        side = self.image_size if self.crop_sides[0] else images.shape[1]
        length = math.prod(patch_grid(side, side, self.patch_size))
        width, half = self.width, self.depth // 2
        optical, radar = self.kept("optical", length), self.kept("radar", length)
        values = self.patch_size**2 * (self.optical_channels + self.radar_channels)
        encoders = linear_flops(length, values, width)
        encoders += self.depth * block_flops(optical, width, self.mlp_ratio) + half * block_flops(radar, width, self.mlp_ratio)
        # Cross-attention: queries and outputs of the radar tokens, keys and values of the optical ones.
        cross = linear_flops(2 * radar + 2 * optical, width, width) + 4.0 * radar * optical * width
        joint = half * (block_flops(radar, width, self.mlp_ratio) + cross)
        heads = 2 * linear_flops(1, width, int(2 * self.mlp_ratio * width) + width)
        decoder = linear_flops(radar, width, self.decoder_width) + linear_flops(length, self.decoder_width, values)
        decoder += self.decoder_depth * block_flops(length, self.decoder_width, self.mlp_ratio)
        return encoders + joint + heads + decoder
