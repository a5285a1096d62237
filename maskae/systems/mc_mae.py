"""MCMAE: "MCMAE: Masked Convolution Meets Masked Autoencoders", Gao et al., NeurIPS 2022, arXiv 2205.03892 (ConvMAE).

MAE around a backbone of masked convolutions and attention; its fine-tuning drops what only pre-training needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from absl import logging

from maskae.errors import UserError
from maskae.masking import Mask
from maskae.nn.conv_vit import MaskedConvViT
from maskae.nn.flops import block_flops, linear_flops
from maskae.nn.layers import LayerNorm
from maskae.nn.transfer import adopt_parameters
from maskae.nn.vit import MaeDecoder
from maskae.systems.contract import Batch, Params, State, Variables
from maskae.systems.mae import Mae
from maskae.systems.mae_finetune import FineTune


@dataclass(frozen=True)
class ConvStages:
    """The arguments of the convolutional stages, beside those of the ViT that is the third, with the values of ConvViT-B.

    Args:
        conv_widths, conv_depths, conv_mlp_ratios: of the first two stages. The decoder's blocks have the first ratio, as in the released
            code.
        strides: of the three patch embeddings; their product is `patch_size`.
    """

    conv_widths: tuple[int, int] = (256, 384)
    conv_depths: tuple[int, int] = (2, 2)
    conv_mlp_ratios: tuple[float, float] = (4.0, 4.0)
    strides: tuple[int, int, int] = (4, 2, 2)

    pools: ClassVar[tuple[str, ...]] = ("mean",)

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        super().__post_init__()  # type: ignore[misc]
        system: Any = self
        if len(self.strides) != 3 or math.prod(self.strides) != system.patch_size:
            raise UserError(f"strides={self.strides}: three whose product is patch_size={system.patch_size}")
        for name in ("conv_widths", "conv_depths", "conv_mlp_ratios"):
            if len(getattr(self, name)) != 2:
                raise UserError(f"{name}={getattr(self, name)}: one number for each of the two convolutional stages")
        if system.pool not in self.pools:
            raise UserError(f"pool='{system.pool}': this backbone has no CLS token; take {' or '.join(map(repr, self.pools))}")

    def backbone(self, **options: Any) -> MaskedConvViT:
        """The network; `options` are fields of `MaskedConvViT` beyond the sizes."""
        system: Any = self
        stages: Any = (tuple(self.conv_widths), tuple(self.conv_depths), tuple(self.conv_mlp_ratios), tuple(self.strides))
        sizes: Any = (system.width, system.depth, system.heads, system.grid, system.mlp_ratio)
        return MaskedConvViT(*stages, *sizes, **(system.compute | options))


@dataclass(frozen=True)
class McMae(ConvStages, Mae):
    """Arguments with the values of ConvViT-B, beside those of `Mae` and of `ConvStages`."""

    depth: int = 11

    @property
    def encoder(self) -> Any:
        """The part that downstream tasks keep, but for its fusion."""
        return self.backbone()

    @property
    def decoder_module(self) -> Any:
        """MAE's, without CLS."""
        if self.decoder != "self":
            raise UserError(f"decoder='{self.decoder}' needs an encoder with a CLS token; take 'self'")
        sizes = (self.decoder_width, self.decoder_depth, self.decoder_heads, self.patch_values, self.conv_mlp_ratios[0])
        return MaeDecoder(*sizes, with_cls=False, **self.compute)

    def encode(self, params: Params, images: jax.Array, mask: Mask, collect: bool = False) -> dict[str, Any]:
        """Images [B, H, W, C] -> `latent` [B, n, D] and what lies before it, see `MaskedConvViT`."""
        apply: Any = self.encoder.apply
        named = apply({"params": params}, images, mask, collect=collect)
        return named | ({"encoder_blocks": named["blocks"]} if collect else {})

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """Final-norm outputs of the unmasked image, maps fused: `tokens` [B, L, D] in raster order, `pooled` [B, D]; float32."""
        apply: Any = self.encoder.apply
        tokens = apply({"params": params["encoder"]}, batch["image"])["latent"].astype(jnp.float32)  # [B, L, D]
        return {"pooled": tokens.mean(1), "tokens": tokens}

    def forward_flops(self, batch: Batch) -> float:
        """Convolutional stages on all patches, blocks on kept ones, decoder on all: 34.4 GFLOP for ConvViT-B at 224."""
        grid = self.grid_of(batch["image"])
        length, kept, width = grid[0] * grid[1], self.kept(grid), self.decoder_width
        decoder = self.decoder_depth * block_flops(length, width, self.conv_mlp_ratios[0])
        ends = linear_flops(kept, self.width, width) + linear_flops(self.predicted(grid), width, self.patch_values)
        return self.encoder.flops(grid, kept, self.channels) + decoder + ends


@dataclass(frozen=True)
class McFineTune(ConvStages, FineTune):
    """Fine-tuning and, from scratch, supervised training of the backbone: mean of the tokens, a new norm, a linear classifier.

    `pool="cls"` is the released code without `global_pool`: behind the encoder's own norm the first patch stands for the CLS token that
    the backbone does not have.
    """

    depth: int = 11

    pools: ClassVar[tuple[str, ...]] = ("mean", "cls")

    @property
    def encoder(self) -> Any:
        """The pretrained part, its position table a parameter."""
        return self.backbone(trainable_position=True, fuse=False, final_norm=self.pool == "cls", drop_path=self.drop_path)

    @property
    def droppable(self) -> int:
        """Blocks that stochastic depth can leave out."""
        return self.encoder.total_depth

    def with_encoder(self, variables: Variables, encoder: Params, grid: tuple[int, int] | None = None) -> Variables:
        """`variables` with the pretrained `encoder` in them. Raises UserError listing every leaf that does not fit."""
        # The fixed table that pre-training computes is what a trainable one starts from.
        skip = () if "position" in encoder else ("position",)
        logging.info("pretrained encoder: what fuses the stages in pre-training is not used")
        return Variables(variables.params | {"encoder": adopt_parameters(variables.params["encoder"], encoder, skip)}, variables.state)

    def forward(self, params: Params, images: jax.Array, draws: jax.Array | None = None) -> dict[str, jax.Array]:
        """[B, H, W, C] -> `tokens` [B, N, D], `pooled` [B, D] as the head sees it, `logits` [B, K]; all float32."""
        apply: Any = self.encoder.apply
        tokens = apply({"params": params["encoder"]}, images, draws=draws)["latent"].astype(jnp.float32)  # [B, N, D]
        pooled: Any = tokens[:, 0]  # [B, D]
        if self.pool == "mean":
            pooled = LayerNorm().apply({"params": params["fc_norm"]}, tokens.mean(1))  # [B, D]
        return {"tokens": tokens, "pooled": pooled, "logits": pooled @ params["head"]["kernel"] + params["head"]["bias"]}

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """`pooled` [B, D] as the head sees it, `tokens` [B, N, D], `logits` [B, K], without stochastic depth; float32."""
        return self.forward(params, batch["image"])

    def forward_flops(self, batch: Batch) -> float:
        """Convolutional stages, blocks on all tokens, head."""
        grid = self.grid_of(batch["image"])
        return self.encoder.flops(grid, grid[0] * grid[1], self.channels) + linear_flops(1, self.width, self.num_classes)
