"""MAE's end-to-end fine-tuning, He et al., CVPR 2022, arXiv 2111.06377, section 4.1 and appendix A.1.

The pretrained encoder sees the whole image; the mean of its patch tokens goes through a new layer norm into a linear classifier. Position
table and everything else are trained, the lower blocks more slowly (`layer_decay` of the optimizer), with stochastic depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging

from maskae.errors import check_share
from maskae.losses.classification import label_smoothing_cross_entropy, soft_target_cross_entropy
from maskae.nn.flops import linear_flops
from maskae.nn.layers import LayerNorm
from maskae.nn.stack import drop_path_draws
from maskae.nn.transfer import adopt_encoder
from maskae.nn.vit import ViTEncoder
from maskae.systems.contract import Batch, Outputs, Params, State, Variables
from maskae.systems.vit_arguments import ViTArguments

# The released code asks for a normal truncated at -2 and 2 in absolute terms, far outside of what this deviation ever draws.
HEAD_STD = 2e-5


@dataclass(frozen=True)
class FineTune(ViTArguments):
    """Arguments with the values of the ViT-B/16 recipe of the released code, beside those of every ViT (`ViTArguments`).

    Args:
        drop_path: rate at the last block, rising linearly from 0 at the first.
        label_smoothing: of the loss on plain labels; soft targets (`batch["soft_label"]`, from mixup) are taken as they are.
        pool: "mean" of the patch tokens and a new norm `fc_norm` in place of the encoder's, or "cls" after the encoder's own norm.

    Raises:
        UserError: where the sizes do not fit together or a name is unknown.
    """

    num_classes: int = 1000
    drop_path: float = 0.1
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        super().__post_init__()
        for name, value in (("drop_path", self.drop_path), ("label_smoothing", self.label_smoothing)):
            check_share(name, value)

    @property
    def encoder(self) -> ViTEncoder:
        """The pretrained part, its position table a parameter."""
        return self.vit(trainable_position=True, final_norm=self.pool == "cls", drop_path=self.drop_path)

    @property
    def droppable(self) -> int:
        """Blocks that stochastic depth can leave out."""
        return self.depth

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh parameters of encoder and head; the batch is not read. `with_encoder` puts the pretrained encoder in."""
        encoder_key, head_key = jax.random.split(rng)
        params = {"encoder": self.encoder.init(encoder_key, self.blank_images())["params"]}
        if self.pool == "mean":
            params["fc_norm"] = LayerNorm().init(head_key, jnp.zeros((1, self.width)))["params"]
        kernel = nn.initializers.normal(HEAD_STD)(head_key, (self.width, self.num_classes))
        return Variables(params | {"head": {"kernel": kernel, "bias": jnp.zeros(self.num_classes)}}, {})

    def with_encoder(self, variables: Variables, encoder: Params, grid: tuple[int, int] | None = None) -> Variables:
        """`variables` with the pretrained `encoder`; see `maskae.nn.transfer.adopt_encoder` for `grid`, its patch grid, and the errors."""
        adopted, notes = adopt_encoder(variables.params["encoder"], encoder, self.grid, grid)
        for note in notes:
            logging.info("pretrained encoder: %s", note)
        return Variables(variables.params | {"encoder": adopted}, variables.state)

    def forward(self, params: Params, images: jax.Array, draws: jax.Array | None = None) -> dict[str, jax.Array]:
        """[B, H, W, C] -> `tokens` [B, 1+N, D], `pooled` [B, D] as the head sees it, `logits` [B, K]; all float32.

        `draws`, uniform float32 [depth, 2, B], switch stochastic depth on.
        """
        encoded: Any = self.encoder.apply({"params": params["encoder"]}, images, draws=draws)
        tokens = encoded.astype(jnp.float32)  # [B, 1+N, D]
        pooled: Any = tokens[:, 0]  # [B, D]
        if self.pool == "mean":
            pooled = LayerNorm().apply({"params": params["fc_norm"]}, tokens[:, 1:].mean(1))  # [B, D]
        logits = pooled @ params["head"]["kernel"] + params["head"]["bias"]  # [B, K]
        return {"tokens": tokens, "pooled": pooled, "logits": logits}

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Cross-entropy with the soft targets of the batch where mixup made some, else with smoothed labels.

        `accuracy` counts the label of each image itself; under mixup, whose images show two, it stays low.
        """
        draws = drop_path_draws(rng, batch["example"], (self.droppable, 2)) if self.drop_path else None  # [blocks, 2, B]
        logits = self.forward(params, batch["image"], draws)["logits"]
        if "soft_label" in batch:
            loss = soft_target_cross_entropy(logits, batch["soft_label"])
        else:
            loss = label_smoothing_cross_entropy(logits, batch["label"], self.label_smoothing)
        accuracy = (logits.argmax(-1) == batch["label"]).astype(jnp.float32).mean()
        return loss, Outputs({"accuracy": accuracy}, state)

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """`pooled` [B, D] as the head sees it, `cls` [B, D], `tokens` [B, N, D], `logits` [B, K], without stochastic depth; float32."""
        named = self.forward(params, batch["image"])
        return named | {"cls": named["tokens"][:, 0], "tokens": named["tokens"][:, 1:]}

    def forward_flops(self, batch: Batch) -> float:
        """Patch projection, blocks on 1 + N tokens, head."""
        return self.vit_flops(self.grid_of(batch["image"])) + linear_flops(1, self.width, self.num_classes)
