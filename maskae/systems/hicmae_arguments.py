"""HiCMAE's arguments, their checks, and the networks that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice, check_heads
from maskae.nn.audio_visual import FusionEncoder, SkipDecoder, bias_of
from maskae.nn.flops import block_flops, cross_block_flops, linear_flops
from maskae.nn.layers import ATTENTION_IMPLEMENTATIONS, DTYPES, uniform_fan_in
from maskae.nn.patches import patch_grid
from maskae.nn.stack import REMAT_POLICIES
from maskae.nn.vit import TOKEN_STD, ViTEncoder
from maskae.systems.contract import Batch, Params, Variables

MODALITIES = ("video", "audio")


@dataclass(frozen=True)
class HicmaeArguments:
    """Arguments with the values of HiCMAE-B.

    Args:
        image_size, frames: of a clip, square; `patch_size` and `tubelet` tile it.
        spectrogram_size: (frames, mel bins); `audio_patch_size` tiles it.
        depth, heads: of each modality's encoder; `audio_depth` and `audio_heads` where those of sound differ.
        decoder_width, decoder_depth, decoder_heads: of each decoder; `audio_decoder_*` where those of sound differ.
        qkv_bias: queries and values have biases.
        layer_scale: initial value of a learnt factor on every branch of every block; None for none.
        levels: encoder layers, counted from 1, that are contrasted, and that the decoder's blocks after its first look at, deepest first.
        mask_ratio, audio_mask_ratio: share of hidden places (the same in every frame) and of hidden spectrogram patches.
        contrastive_weight, temperature: of the sum over levels of the contrastive losses.
        contrastive_scope: "local" contrasts within groups of `group_size` consecutive examples, the paper's batch on one device, whatever
            the devices here; "global" within the whole batch.
        frame_difference: in every group of `difference_group` frames, all but the first are predicted as their normalised difference from
            the first.
        difference_weight: w of (1 - w) * the error of every tubelet's first frame + w * that of its second, with `frame_difference`; None
            is the plain mean.
        mean, std: of the frames' channels in units 0..1, by which video is normalised.
        pool: what `features` calls pooled: "both", "video" or "audio".
        epsilon: of every layer norm.

    Raises:
        UserError: where the sizes do not fit together or a name is unknown.
    """

    image_size: int = 160
    frames: int = 16
    channels: int = 3
    patch_size: int = 16
    tubelet: int = 2
    spectrogram_size: tuple[int, int] = (256, 128)
    audio_patch_size: int = 16
    width: int = 512
    depth: int = 10
    heads: int = 8
    audio_depth: int | None = None
    audio_heads: int | None = None
    fusion_depth: int = 2
    fusion_heads: int | None = None
    decoder_width: int = 384
    decoder_depth: int = 4
    decoder_heads: int = 6
    audio_decoder_width: int | None = None
    audio_decoder_depth: int | None = None
    audio_decoder_heads: int | None = None
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    layer_scale: float | None = None
    levels: tuple[int, ...] = (4, 7, 10)
    mask_ratio: float = 0.9
    audio_mask_ratio: float = 0.8
    contrastive_weight: float = 0.0025
    temperature: float = 0.07
    contrastive_scope: str = "local"
    group_size: int = 40
    frame_difference: bool = True
    difference_group: int = 2
    difference_weight: float | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    pool: str = "both"
    epsilon: float = 1e-6
    dtype: str = "float32"
    scan: bool = False
    remat: str = "none"
    attention: str = "xla"

    couples_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        check_choice("contrastive_scope", self.contrastive_scope, ("local", "global"))
        check_choice("pool", self.pool, ("both", *MODALITIES))
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("remat", self.remat, REMAT_POLICIES)
        check_choice("attention", self.attention, ATTENTION_IMPLEMENTATIONS)
        check_heads("width", self.width, self.fusion_heads or self.heads)
        for modality in MODALITIES:
            check_heads("width", self.width, self.sizes(modality)[1])
            check_heads(f"{modality} decoder width", self.decoder_sizes(modality)[0], self.decoder_sizes(modality)[2])
            self._check_levels(modality)
            length, hidden = self.places(modality), self.hidden(modality)
            if not 0 < hidden < length:
                raise UserError(f"{modality}: the mask ratio hides {hidden} of {length} places")
        if self.frames % self.tubelet:
            raise UserError(f"tubelets of {self.tubelet} frames do not tile a clip of {self.frames}")
        if self.frame_difference and (self.difference_group < 1 or self.frames % self.difference_group):
            raise UserError(f"frame_difference: groups of difference_group={self.difference_group} do not tile a clip of {self.frames}")
        if self.frame_difference and self.difference_weight is not None and self.tubelet != 2:
            raise UserError(f"difference_weight weighs a tubelet's two frames, of which there are {self.tubelet}: set it to None")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise UserError(f"mean and std have {len(self.mean)} and {len(self.std)} numbers for {self.channels} channels")

    def _check_levels(self, modality: str) -> None:
        depth, blocks = self.sizes(modality)[0], self.decoder_sizes(modality)[1]
        if not self.levels or sorted(set(self.levels)) != list(self.levels) or not 1 <= self.levels[0] <= self.levels[-1] <= depth:
            raise UserError(f"levels={self.levels} must rise within the {depth} {modality} encoder layers 1..{depth}")
        if blocks - 1 > len(self.levels):
            raise UserError(f"the {modality} decoder's {blocks} blocks skip to {blocks - 1} levels, of which there are {len(self.levels)}")

    def sizes(self, modality: str) -> tuple[int, int]:
        """(depth, heads) of a modality's encoder."""
        return (self.depth, self.heads) if modality == "video" else (self.audio_depth or self.depth, self.audio_heads or self.heads)

    def decoder_sizes(self, modality: str) -> tuple[int, int, int]:
        """(width, depth, heads) of a modality's decoder."""
        sizes = (self.decoder_width, self.decoder_depth, self.decoder_heads)
        if modality == "video":
            return sizes
        own = (self.audio_decoder_width, self.audio_decoder_depth, self.audio_decoder_heads)
        return tuple(mine or theirs for mine, theirs in zip(own, sizes, strict=True))  # type: ignore[return-value]

    def patch(self, modality: str) -> int:
        """Pixels, or spectrogram cells, of a patch's side."""
        return self.patch_size if modality == "video" else self.audio_patch_size

    def grid(self, modality: str) -> tuple[int, int]:
        """Rows and columns of patches of a frame, or of the spectrogram (time, mel)."""
        size = (self.image_size, self.image_size) if modality == "video" else self.spectrogram_size
        return patch_grid(size[0], size[1], self.patch(modality))

    def slots(self, modality: str) -> int:
        """How often a place repeats in time with one mask: tubelets of a clip; 1 for sound."""
        return self.frames // self.tubelet if modality == "video" else 1

    def places(self, modality: str) -> int:
        """What a mask chooses among."""
        return math.prod(self.grid(modality))

    def hidden(self, modality: str) -> int:
        """Places hidden, int(ratio * places) as in the released code."""
        return int((self.mask_ratio if modality == "video" else self.audio_mask_ratio) * self.places(modality))

    def tokens(self, modality: str) -> int:
        """All tokens of a sample."""
        return self.slots(modality) * self.places(modality)

    def visible(self, modality: str) -> int:
        """Tokens that an encoder sees in training."""
        return self.slots(modality) * (self.places(modality) - self.hidden(modality))

    def values(self, modality: str) -> int:
        """Numbers in a token's patch."""
        return self.patch(modality) ** 2 * (self.tubelet * self.channels if modality == "video" else 1)

    @property
    def compute(self) -> dict[str, Any]:
        """How blocks compute."""
        return {"epsilon": self.epsilon, "dtype": jnp.dtype(self.dtype), "remat": self.remat, "attention": self.attention}

    def encoder(self, modality: str) -> ViTEncoder:
        """A modality's encoder; no CLS token, positions are added outside."""
        options: dict[str, Any] = {"qkv_bias": bias_of(self.qkv_bias), "layer_scale": self.layer_scale, **self.compute}
        options |= {"with_cls": False, "with_position": False, "scan": self.scan}
        return ViTEncoder(self.patch(modality), self.width, *self.sizes(modality), (1, 1), self.mlp_ratio, **options)

    @property
    def crossing(self) -> dict[str, Any]:
        """What the blocks that look across have besides their sizes."""
        return {"mlp_ratio": self.mlp_ratio, "qkv_bias": self.qkv_bias, "layer_scale": self.layer_scale, **self.compute}

    @property
    def fusion(self) -> FusionEncoder:
        """Each modality's tokens look at the other's."""
        return FusionEncoder(self.fusion_depth, self.fusion_heads or self.heads, **self.crossing)

    def decoder(self, modality: str) -> SkipDecoder:
        """Predicts a modality's hidden tokens."""
        return SkipDecoder(*self.decoder_sizes(modality), self.values(modality), **self.crossing)

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh parameters; linear maps Xavier-uniform, patch embeddings as a convolution's default. The batch is not read."""
        tokens = jnp.zeros((1, 1, self.width))
        params: Params = {}
        for modality, key in zip(MODALITIES, jax.random.split(rng), strict=True):
            keys = jax.random.split(key, 4)
            channels = self.tubelet * self.channels if modality == "video" else 1
            encoder = self.encoder(modality).init(keys[0], jnp.zeros((1, self.patch(modality), self.patch(modality), channels)))["params"]
            kernel = encoder["patch_embed"]["kernel"]
            encoder["patch_embed"]["kernel"] = uniform_fan_in(kernel.shape[0])(keys[1], kernel.shape)
            width, depth, _ = self.decoder_sizes(modality)
            token = jnp.zeros((1, 1, width))
            decoder = self.decoder(modality).init(keys[2], tokens, [tokens] * (depth - 1), token, token, token)["params"]
            # Cut at one standard deviation, as the released code does.
            mask_token = TOKEN_STD * jax.random.truncated_normal(keys[3], -1, 1, (1, 1, width))
            params |= {f"{modality}_encoder": encoder, f"{modality}_decoder": decoder, f"{modality}_mask_token": mask_token}
        params["fusion"] = self.fusion.init(rng, tokens, tokens)["params"]
        return Variables(params, {})

    def encoding_flops(self, seen: dict[str, int]) -> float:
        """Embedding of all patches of the modalities in `seen`, their encoders on so many tokens, and fusion where there are both."""
        total = 0.0
        for modality, count in seen.items():
            total += linear_flops(self.tokens(modality), self.values(modality), self.width)
            total += self.sizes(modality)[0] * block_flops(count, self.width, self.mlp_ratio)
            for other in seen.keys() - {modality}:
                fused = cross_block_flops(count, seen[other], self.width, 0) + block_flops(count, self.width, self.mlp_ratio)
                total += self.fusion_depth * fused
        return total

    def forward_flops(self, batch: Batch) -> float:
        """Embedding of all patches, encoders and fusion on visible tokens, decoders on all; 30 GFLOP for HiCMAE-B.

        The products of all pairs of a contrastive group are not of an example and are left out.
        """
        seen = {modality: self.visible(modality) for modality in MODALITIES}
        total = self.encoding_flops(seen)
        for modality, visible in seen.items():
            every, (width, depth, _) = self.tokens(modality), self.decoder_sizes(modality)
            total += depth * linear_flops(visible, self.width, width) + depth * block_flops(every, width, self.mlp_ratio)
            total += (depth - 1) * cross_block_flops(every, visible, width, 0)
            total += linear_flops(every - visible, width, self.values(modality))
        return total
