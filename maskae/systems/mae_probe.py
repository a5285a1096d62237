"""MAE's linear probing, He et al., CVPR 2022, arXiv 2111.06377, appendix A.1.

The pretrained encoder is frozen. Its class token goes through a batch norm without parameters, which makes features of any scale fit one
learning rate, into a linear classifier, the only thing that is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging

from maskae.losses.classification import label_smoothing_cross_entropy
from maskae.nn.flops import linear_flops
from maskae.nn.transfer import adopt_encoder
from maskae.nn.vit import ViTEncoder
from maskae.systems.contract import Batch, Outputs, Params, State, Variables
from maskae.systems.vit_arguments import ViTArguments

BATCH_NORM_EPSILON = 1e-6
BATCH_NORM_MOMENTUM = 0.1
# The released code asks for a normal truncated at -2 and 2 in absolute terms, far outside of what this deviation ever draws.
HEAD_STD = 0.01


class Classified(NamedTuple):
    """`logits` float32 [B, K] and the running statistics `mean`, `variance` [D] after this batch."""

    logits: jax.Array
    statistics: dict[str, jax.Array]


def batch_norm(x: jax.Array, statistics: dict[str, jax.Array], train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Batch norm without scale and bias: float32 [B, D] -> [B, D], and the running statistics.

    In training the batch's own mean and (biased) variance normalise, over the GLOBAL batch, and the running ones move towards its mean and
    unbiased variance; otherwise the running ones normalise.
    """
    mean, variance = statistics["mean"], statistics["variance"]
    if train:
        mean, variance = x.mean(0), x.var(0)
        unbiased = variance * x.shape[0] / max(x.shape[0] - 1, 1)
        new = {"mean": mean, "variance": unbiased}
        statistics = jax.tree.map(lambda old, now: old + BATCH_NORM_MOMENTUM * (now - old), statistics, new)
    return (x - mean) * jax.lax.rsqrt(variance + BATCH_NORM_EPSILON), statistics


@dataclass(frozen=True)
class LinearProbe(ViTArguments):
    """Arguments with the paper's ViT-B/16 values, beside those of every ViT (`ViTArguments`).

    Args:
        pool: the frozen feature, "cls" (the paper) or "mean" of the patch tokens, both after the encoder's final norm.

    `state` holds the frozen `encoder` and the `batch_norm` statistics.

    Raises:
        UserError: where the sizes do not fit together or a name is unknown.
    """

    num_classes: int = 1000
    pool: str = field(default="cls", kw_only=True)

    # Batch statistics: microbatches would change the loss.
    couples_examples: ClassVar[bool] = True

    @property
    def encoder(self) -> ViTEncoder:
        """The frozen part. Its position table is stored, so that one resized from another resolution can be probed."""
        return self.vit(trainable_position=True)

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """A fresh head on an untrained encoder; the batch is not read. `with_encoder` puts the pretrained encoder in."""
        encoder_key, head_key = jax.random.split(rng)
        kernel = nn.initializers.normal(HEAD_STD)(head_key, (self.width, self.num_classes))
        statistics = {"mean": jnp.zeros(self.width), "variance": jnp.ones(self.width)}
        return Variables(
            params={"head": {"kernel": kernel, "bias": jnp.zeros(self.num_classes)}},
            state={"encoder": self.encoder.init(encoder_key, self.blank_images())["params"], "batch_norm": statistics},
        )

    def with_encoder(self, variables: Variables, encoder: Params, grid: tuple[int, int] | None = None) -> Variables:
        """`variables` with the pretrained `encoder`; see `maskae.nn.transfer.adopt_encoder` for `grid`, its patch grid, and the errors."""
        adopted, notes = adopt_encoder(variables.state["encoder"], encoder, self.grid, grid)
        for note in notes:
            logging.info("pretrained encoder: %s", note)
        return Variables(variables.params, variables.state | {"encoder": adopted})

    def encode(self, state: State, images: jax.Array) -> dict[str, jax.Array]:
        """[B, H, W, C] -> `cls` [B, D], `tokens` [B, N, D], `pooled` [B, D] of the frozen encoder, float32, without gradient."""
        encoded: Any = self.encoder.apply({"params": state["encoder"]}, images)
        return self.named_features(jax.lax.stop_gradient(encoded))

    def classify(self, params: Params, statistics: dict[str, jax.Array], pooled: jax.Array, train: bool) -> Classified:
        """Frozen features [B, D] -> batch norm -> logits [B, K]."""
        normalised, statistics = batch_norm(pooled, statistics, train)
        return Classified(normalised @ params["head"]["kernel"] + params["head"]["bias"], statistics)

    def loss_of_features(
        self, params: Params, statistics: dict[str, jax.Array], pooled: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, Classified]:
        """Cross-entropy of a training batch of frozen features [B, D] with labels int32 [B]."""
        classified = self.classify(params, statistics, pooled, train=True)
        return label_smoothing_cross_entropy(classified.logits, labels, smoothing=0.0), classified

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Cross-entropy of the head on the frozen encoder; the new state has moved running statistics."""
        pooled = self.encode(state, batch["image"])["pooled"]
        loss, classified = self.loss_of_features(params, state["batch_norm"], pooled, batch["label"])
        accuracy = (classified.logits.argmax(-1) == batch["label"]).astype(jnp.float32).mean()
        return loss, Outputs({"accuracy": accuracy}, state | {"batch_norm": classified.statistics})

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """The frozen features `pooled` [B, D] (before the batch norm), `cls` [B, D], `tokens` [B, N, D], and `logits` [B, K]; float32."""
        named = self.encode(state, batch["image"])
        return named | {"logits": self.classify(params, state["batch_norm"], named["pooled"], train=False).logits}

    def train_flops(self, batch: Batch) -> float:
        """A training step goes back through the head only."""
        return self.forward_flops(batch) + 2 * linear_flops(1, self.width, self.num_classes)

    def forward_flops(self, batch: Batch) -> float:
        """Patch projection, blocks on 1 + N tokens, head."""
        return self.vit_flops(self.grid_of(batch["image"])) + linear_flops(1, self.width, self.num_classes)
