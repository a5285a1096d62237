"""SparK: "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling", Tian et al., ICLR 2023, arXiv 2301.03580;
on CT slices: Wolf et al., Scientific Reports 13, 20260 (2023), arXiv 2308.06534.

A convolutional encoder sees the visible cells alone, its holes are filled with mask tokens at four scales, and a light UNet predicts the
pixels of the hidden cells. The encoder is an ordinary one afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice
from maskae.keys import purpose_key
from maskae.losses.reconstruction import masked_mean_squared_error, normalise_patches, patch_statistics
from maskae.masking import draw_noise, random_mask
from maskae.nn.batch_norm import STATISTICS
from maskae.nn.convnext import ConvNeXt
from maskae.nn.patches import patchify, unpatchify
from maskae.nn.unet_decoder import DENSIFY_NORMS, SparkDecoder, doublings
from maskae.systems.cnn_arguments import CnnArguments
from maskae.systems.contract import Batch, Outputs, Params, State, Variables


@dataclass(frozen=True)
class SparK(CnnArguments):
    """Arguments with the paper's ResNet-50 values, beside those of every convolutional system (`CnnArguments`).

    Args:
        mask_ratio: share of hidden cells; a cell is as large as the encoder's reduction (32 pixels), and round(L * (1 - ratio)) are kept.
        decoder_width: channels of the UNet at the coarsest level; they halve, rounded down, at each of its blocks.
        densify_norm: "bn", "ln" or "none"; None takes "ln" for ConvNeXt and "bn" for residual networks.

    Raises:
        UserError: where the sizes do not fit together or a name is unknown.
    """

    mask_ratio: float = 0.6
    decoder_width: int = 768
    densify_norm: str | None = None
    zero_last: bool = field(default=True, kw_only=True)
    drop_path: float = field(default=0.05, kw_only=True)

    # Batch statistics: microbatches would change the loss.
    couples_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        super().__post_init__()
        if self.densify_norm is not None:
            check_choice("densify_norm", self.densify_norm, DENSIFY_NORMS)
        if self.decoder_width < 2 ** doublings(self.cell):
            raise UserError(f"decoder_width={self.decoder_width} does not halve {doublings(self.cell)} times")
        if any(side % self.cell for side in self._pixels):
            raise UserError(f"image_size={self.image_size} is no multiple of {self.cell}, the side of a cell")
        self.kept(self.grid_of(*self._pixels))

    @property
    def cell(self) -> int:
        """Pixels along a side of one cell of the mask."""
        return self.backbone.reductions[-1]

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of cells."""
        return height // self.cell, width // self.cell

    def kept(self, grid: tuple[int, int]) -> int:
        """Number of visible cells, rounded half to even as released. Raises UserError unless some are visible and some hidden."""
        length = grid[0] * grid[1]
        keep = round(length * (1 - self.mask_ratio))
        if not 0 < keep < length:
            raise UserError(f"mask_ratio={self.mask_ratio} keeps {keep} of {length} cells of {self.cell} pixels; keep 1 to {length - 1}")
        return keep

    def decoder(self, train: bool) -> SparkDecoder:
        """The part that is thrown away after pre-training."""
        norm = self.densify_norm or ("ln" if isinstance(self.backbone, ConvNeXt) else "bn")
        sizes = (self.decoder_width, doublings(self.cell), self.channels, norm)
        return SparkDecoder(*sizes, train=train, remat=self.remat, dtype=jnp.dtype(self.dtype))

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh parameters; the batch is not read."""
        encoder_key, decoder_key = jax.random.split(rng)
        encoder = self.init_encoder(encoder_key)
        rows, columns = self.grid_of(*self._pixels)
        widths, reductions = self.backbone.widths, self.backbone.reductions
        scales = [self.cell // each for each in reductions]
        maps = [jnp.zeros((1, rows * s, columns * s, c)) for s, c in zip(scales, widths, strict=True)]
        decoder = self.decoder(train=False).init(decoder_key, maps, jnp.ones((1, rows, columns), bool))
        return Variables(
            {"encoder": encoder.params, "decoder": decoder["params"]}, {"encoder": encoder.state, "decoder": decoder[STATISTICS]}
        )

    def visible(self, noise: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """bool [B, rows, columns]: the `kept` cells of smallest noise [B, L]."""
        return (random_mask(noise, self.kept(grid)).mask == 0).reshape(-1, *grid)

    def forward(
        self, variables: Variables, images: jax.Array, visible: jax.Array, *, train: bool, draws: jax.Array | None = None
    ) -> tuple[dict[str, Any], State]:
        """Everything between normalised images [B, H, W, C] and the predicted pixels `rec_image`, by name, and the moved statistics."""
        params, state = variables
        options = {"visible": visible, "drop_draws": draws, "collect": True}
        pyramid, encoder_state = self.encode(params["encoder"], state["encoder"], images, train=train, **options)
        named = pyramid.named | {f"feature{i + 1}": each for i, each in enumerate(pyramid.maps)}
        given = {"params": params["decoder"], STATISTICS: state["decoder"]}
        decoder: Any = self.decoder(train).apply
        (_, decoded), moved = decoder(given, pyramid.maps, visible, mutable=[STATISTICS])
        return named | decoded, {"encoder": encoder_state, "decoder": moved.get(STATISTICS, state["decoder"])}

    def reconstruction_loss(self, pixels: jax.Array, images: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The loss over hidden cells and that of predicting zero: the share of hidden cells that are not constant, below 1 on CT."""
        target = normalise_patches(patchify(images, self.cell))  # [B, L, V]
        hidden = 1.0 - visible.reshape(visible.shape[0], -1)  # [B, L]
        trivial = masked_mean_squared_error(jnp.zeros_like(target), target, hidden)
        return masked_mean_squared_error(patchify(pixels, self.cell), target, hidden), trivial

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Mean squared error to the normalised pixels of hidden cells. `trivial_loss` is that of predicting zero."""
        images, example = self.normalised(batch["image"]), batch["example"]
        grid = self.grid_of(*images.shape[1:3])
        visible = self.visible(draw_noise(purpose_key(rng, "mask"), example, grid[0] * grid[1]), grid)
        draws = self.drop_draws(purpose_key(rng, "drop_path"), example)
        named, moved = self.forward(Variables(params, state), images, visible, train=True, draws=draws)
        loss, trivial = self.reconstruction_loss(named["rec_image"], images, visible)
        return loss, Outputs({"trivial_loss": trivial}, moved)

    def reconstruct(self, params: Params, state: State, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Panels [B, H, W, C] in the batch's units; visible cells show their own pixels. See `panel_labels` for what each one is."""
        images = batch["image"].astype(jnp.float32)
        grid = self.grid_of(*images.shape[1:3])
        visible = self.visible(draw_noise(rng, batch["example"], grid[0] * grid[1]), grid)
        named, _ = self.forward(Variables(params, state), self.normalised(images), visible, train=False)
        patches, prediction = patchify(images, self.cell), patchify(named["rec_image"], self.cell)
        seen = visible.reshape(visible.shape[0], -1, 1).astype(jnp.float32)  # [B, L, 1]
        mean, deviation = patch_statistics(patches)  # [B, L, 1]
        # The network says nothing about a cell's brightness and contrast; the best guess without looking is that of the visible ones.
        typical = [(x * seen).sum(1, keepdims=True) / seen.sum(1, keepdims=True) for x in (mean, deviation)]
        shown = {"original": patches, "masked": jnp.zeros_like(patches), "prediction": prediction * typical[1] + typical[0]}
        shown["prediction_with_patch_statistics"] = prediction * deviation + mean
        return {name: unpatchify(jnp.where(seen > 0, patches, panel), grid, self.cell) for name, panel in shown.items()}

    @property
    def panel_labels(self) -> dict[str, str]:
        """What each panel of `reconstruct` truthfully is."""
        return {
            "original": "original",
            "masked": "masked",
            "prediction": "raw prediction, drawn with the mean statistics of the visible cells",
            "prediction_with_patch_statistics": "prediction with each hidden cell's true mean and contrast",
        }

    def forward_flops(self, batch: Batch) -> float:
        """The encoder on all pixels (the sparse convolutions are dense ones that are masked) and the decoder: 32.8 GFLOP at 224."""
        size = batch["image"].shape[1:3]
        return self.encoder_flops(size) + self.decoder(train=False).flops((size[0], size[1]), self.backbone.widths)
