"""MAE: "Masked Autoencoders Are Scalable Vision Learners", He et al., CVPR 2022, arXiv 2111.06377.

A ViT encodes the kept quarter of the patches; a small decoder sees them among mask tokens and predicts the pixels of the removed rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice, check_heads
from maskae.losses.reconstruction import masked_mean_squared_error, normalise_patches, patch_statistics
from maskae.masking import Mask, block_noise, draw_noise, grid_noise, keep_count, random_mask, removed_indices, take_tokens
from maskae.nn.cross_decoder import CrossDecoder
from maskae.nn.flops import block_flops, cross_block_flops, linear_flops
from maskae.nn.patches import patchify, unpatchify
from maskae.nn.sharding import constrain
from maskae.nn.vit import MaeDecoder, ViTEncoder
from maskae.systems.contract import Batch, Outputs, Params, State, Variables
from maskae.systems.vit_arguments import ViTArguments

MASKERS = ("random", "block", "grid")
DECODERS = ("self", "cross")
PREDICTS = ("all", "masked")


@dataclass(frozen=True)
class Mae(ViTArguments):
    """Arguments with the paper's ViT-B/16 values, beside those of every ViT (`ViTArguments`).

    Args:
        keep: kept patches per image; None takes int(L * (1 - mask_ratio)).
        masker: "random" (the method), or "block" or "grid" (the paper's ablations).
        norm_pix_loss: the target is each patch normalised by its own mean and deviation.
        decoder: "self", the paper's, or "cross", in which removed patches look at the encoder's tokens alone (CrossMAE, not in the paper).
        decoder_predicts: "all" (the paper), or "masked": the last norm and map run on removed patches only, and the loss is the same.
            "cross" predicts nothing else.
        decoder_predict_ratio: share of the removed patches, at random per image, that is predicted and in the loss.

    Raises:
        UserError: where the sizes do not fit together or a name is unknown.
    """

    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    mask_ratio: float = 0.75
    keep: int | None = None
    masker: str = "random"
    norm_pix_loss: bool = True
    decoder: str = "self"
    decoder_predicts: str = "all"
    decoder_predict_ratio: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        super().__post_init__()
        check_choice("masker", self.masker, MASKERS)
        check_heads("decoder_width", self.decoder_width, self.decoder_heads)
        check_choice("decoder", self.decoder, DECODERS)
        check_choice("decoder_predicts", self.decoder_predicts, PREDICTS)
        if self.decoder == "cross" and self.decoder_predicts != "masked":
            raise UserError("decoder='cross' has tokens for removed patches alone; set decoder_predicts='masked'")
        ratio = self.decoder_predict_ratio
        if not 0 < ratio <= 1:
            raise UserError(f"decoder_predict_ratio={ratio}: must be above 0 and at most 1")
        if ratio < 1 and (self.decoder_predicts != "masked" or self.masker != "random"):
            raise UserError(f"decoder_predict_ratio={ratio} needs decoder_predicts='masked' and masker='random'")
        self.kept(self.grid)

    def kept(self, grid: tuple[int, int]) -> int:
        """Number of kept patches. Raises UserError unless some are kept and some removed."""
        length = grid[0] * grid[1]
        keep = keep_count(length, self.mask_ratio) if self.keep is None else self.keep
        if not 0 < keep < length:
            raise UserError(f"keep={self.keep}, mask_ratio={self.mask_ratio} keep {keep} of {length} patches; keep 1 to {length - 1}")
        return keep

    @property
    def encoder(self) -> ViTEncoder:
        """The part that downstream tasks keep."""
        return self.vit()

    @property
    def decoder_module(self) -> MaeDecoder | CrossDecoder:
        """The part that is thrown away after pre-training."""
        sizes = (self.decoder_width, self.decoder_depth, self.decoder_heads, self.patch_values, self.mlp_ratio)
        return MaeDecoder(*sizes, **self.compute) if self.decoder == "self" else CrossDecoder(*sizes, **self.compute)

    def predicted(self, grid: tuple[int, int]) -> int:
        """Number of patches that the decoder predicts, at least 1."""
        length = grid[0] * grid[1]
        return length if self.decoder_predicts == "all" else max(1, int((length - self.kept(grid)) * self.decoder_predict_ratio))

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh parameters; the batch is not read."""
        encoder_key, decoder_key = jax.random.split(rng)
        encoder = self.encoder.init(encoder_key, self.blank_images())["params"]
        rows, columns = self.grid
        latent = jnp.zeros((1, 2, self.width))
        decoder = self.decoder_module.init(decoder_key, latent, jnp.arange(rows * columns)[None], self.grid)["params"]
        return Variables({"encoder": encoder, "decoder": decoder}, {})

    def forward(self, params: Params, images: jax.Array, noise: jax.Array, collect: bool = False) -> dict[str, Any]:
        """Everything between images [B, H, W, C] and the prediction, by name, with the masking noise [B, L] given.

        `pred` is [B, L, p*p*C], or where masked patches alone are predicted [B, R, p*p*C], of the patches `ids_predicted` int32 [B, R].
        `collect` adds every block's output as `encoder_blocks` and `decoder_blocks`.
        """
        grid = self.grid_of(images)
        mask = random_mask(noise, self.kept(grid))
        named = self.encode(params["encoder"], images, mask, collect)
        named |= {"mask": mask.mask, "ids_restore": mask.restore, "ids_keep": mask.keep_indices}
        return named | self._decode(params["decoder"], named["latent"], mask, grid, collect)

    def encode(self, params: Params, images: jax.Array, mask: Mask, collect: bool = False) -> dict[str, Any]:
        """Images [B, H, W, C] -> the encoder's output `latent` [B, 1+n, D] on kept patches and what lies before it, by name."""
        apply: Any = partial(self.encoder.apply, {"params": params})
        embedded = apply(images, method="embed")  # [B, L, D]
        x_masked = constrain(take_tokens(embedded, mask.keep_indices), "batch")  # [B, n, D]
        latent = apply(x_masked, collect=collect, method="encode")  # [B, 1+n, D]
        named = {"embedded": embedded, "x_masked": x_masked, "latent": latent.tokens}
        return named | ({"encoder_blocks": latent.blocks} if collect else {})

    def _decode(self, params: Params, latent: jax.Array, mask: Mask, grid: tuple[int, int], collect: bool) -> dict[str, Any]:
        decode: Any = partial(self.decoder_module.apply, {"params": params})
        named: dict[str, Any] = {}
        if self.decoder_predicts == "masked":
            named["ids_predicted"] = removed_indices(mask)[:, : self.predicted(grid)]  # [B, R]
        if self.decoder == "cross":
            decoded = decode(latent, named["ids_predicted"], grid, collect)  # [B, R, p*p*C]
        else:
            named["decoder_in"] = decode(latent, mask.restore, grid, method="restore")  # [B, 1+L, d]
            decoded = decode(named["decoder_in"], collect, named.get("ids_predicted"), method="decode")  # [B, L or R, p*p*C]
        return named | {"pred": decoded.tokens} | ({"decoder_blocks": decoded.blocks} if collect else {})

    def target(self, images: jax.Array, indices: jax.Array | None = None) -> jax.Array:
        """[B, H, W, C] -> what the decoder should predict, float32 [B, L, p*p*C], or of the patches `indices` int32 [B, R] alone."""
        patches = patchify(images.astype(jnp.float32), self.patch_size)
        if indices is not None:
            patches = constrain(take_tokens(patches, indices), "batch")  # [B, R, p*p*C]
        return normalise_patches(patches) if self.norm_pix_loss else patches

    def noise(self, images: jax.Array, example: jax.Array, rng: jax.Array) -> jax.Array:
        """The masking noise [B, L] of the chosen masker."""
        grid = self.grid_of(images)
        if self.masker == "grid":
            return grid_noise(example, grid)
        if self.masker == "block":
            return block_noise(rng, example, grid)
        return draw_noise(rng, example, grid[0] * grid[1])

    def loss_given_noise(self, params: Params, images: jax.Array, noise: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss, float32 scalar, and its metrics, for the masking noise [B, L]."""
        return self.pixel_loss(self.forward(params, images, noise), images)

    def pixel_loss(self, named: dict[str, Any], images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and its metrics of what `forward` gave for these images."""
        target = self.target(images, named.get("ids_predicted"))
        counted = jnp.ones(target.shape[:2]) if "ids_predicted" in named else named["mask"]
        trivial = masked_mean_squared_error(jnp.zeros_like(target), target, counted)
        return masked_mean_squared_error(named["pred"], target, counted), {"trivial_loss": trivial}

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Mean squared error on removed patches. `trivial_loss` is that of predicting zero: a loss near it has learned nothing."""
        loss, metrics = self.loss_given_noise(params, batch["image"], self.noise(batch["image"], batch["example"], rng))
        return loss, Outputs(metrics, state)

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """Final-norm outputs of the unmasked image: `cls` [B, D], `tokens` [B, L, D] in raster order, `pooled` [B, D]; float32."""
        encode: Any = self.encoder.apply
        return self.named_features(encode({"params": params["encoder"]}, batch["image"]))

    def reconstruct(self, params: Params, state: State, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Panels [B, H, W, C] in normalised units; kept patches show their own pixels. See `panel_labels` for what each one is."""
        images = batch["image"].astype(jnp.float32)
        return self.panels(params, images, self.noise(images, batch["example"], rng))

    def panels(self, params: Params, images: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
        """What `reconstruct` shows, for the masking noise [B, L]."""
        # Panels show every removed patch, also where the loss looks at some of them.
        named = replace(self, decoder_predict_ratio=1.0).forward(params, images, noise)
        patches, prediction = patchify(images, self.patch_size), named["pred"].astype(jnp.float32)
        if prediction.shape[1] < patches.shape[1]:
            # In raster order; what lands on kept patches is not shown.
            prediction = take_tokens(prediction, jnp.maximum(named["ids_restore"] - named["ids_keep"].shape[1], 0))  # [B, L, p*p*C]
        removed = named["mask"][:, :, None]  # [B, L, 1]
        mean, deviation = patch_statistics(patches)  # [B, L, 1]
        if self.norm_pix_loss:
            # The network says nothing about a patch's brightness and contrast. Without looking at hidden pixels the best guess for both is
            # their average over the patches that it saw.
            kept = (1 - removed) / (1 - removed).sum(1, keepdims=True)
            raw = prediction * (deviation * kept).sum(1, keepdims=True) + (mean * kept).sum(1, keepdims=True)
            known = prediction * deviation + mean
        else:
            raw, known = prediction, normalise_patches(prediction) * deviation + mean
        shown = {"original": patches, "masked": jnp.zeros_like(patches), "prediction": raw, "prediction_with_patch_statistics": known}
        grid = self.grid_of(images)
        return {name: unpatchify(jnp.where(removed > 0, panel, patches), grid, self.patch_size) for name, panel in shown.items()}

    @property
    def panel_labels(self) -> dict[str, str]:
        """What each panel of `reconstruct` truthfully is."""
        unseen = "raw prediction, drawn with the mean statistics of the kept patches" if self.norm_pix_loss else "raw prediction"
        known = "prediction with each hidden patch's true mean and contrast"
        return {"original": "original", "masked": "masked", "prediction": unseen, "prediction_with_patch_statistics": known}

    def forward_flops(self, batch: Batch) -> float:
        """Patch projection of all patches, encoder on 1 + kept tokens, decoder on 1 + L tokens; 19.6 GFLOP for ViT-B/16 at 224.

        19.5 with the last map on removed patches only; 15.7 with the cross decoder, and 11.4 where it predicts a third of them.
        """
        grid = self.grid_of(batch["image"])
        length, kept = grid[0] * grid[1], self.kept(grid)
        width, predicted = self.decoder_width, self.predicted(grid)
        if self.decoder == "cross":
            block = cross_block_flops(predicted, 1 + kept, width, self.mlp_ratio)
        else:
            block = block_flops(1 + length, width, self.mlp_ratio)
        ends = linear_flops(1 + kept, self.width, width) + linear_flops(predicted, width, self.patch_values)
        return self.vit_flops(grid, kept) + self.decoder_depth * block + ends
