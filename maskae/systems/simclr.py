"""SimCLR: "A Simple Framework for Contrastive Learning of Visual Representations", Chen et al., ICML 2020, arXiv 2002.05709.

Two views of an image attract each other and repel those of all other images. In the CT study it is a baseline of ours, not of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from maskae.losses.contrastive import nt_xent
from maskae.nn.heads import ProjectionHead
from maskae.systems.contract import Batch, Outputs, Params, State, Variables
from maskae.systems.contrastive_cnn import ContrastiveCnn
from maskae.vectors import unit


@dataclass(frozen=True)
class SimClr(ContrastiveCnn):
    """Arguments beside those of `ContrastiveCnn`: `hidden` and `outputs`, the channels of the projection head."""

    hidden: int = 2048
    outputs: int = 128

    @property
    def head(self) -> ProjectionHead:
        """Linear, ReLU, linear; thrown away after pre-training."""
        return ProjectionHead(self.outputs, self.hidden, dtype=jnp.dtype(self.dtype))

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh parameters; the batch is not read."""
        encoder_key, head_key = jax.random.split(rng)
        encoder = self.init_encoder(encoder_key)
        head, _ = self.head.start(head_key, self.width)
        return Variables({"encoder": encoder.params, "projector": head}, {"encoder": encoder.state})

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """NT-Xent over the global batch; `alignment` is the mean cosine of the two views of an image."""
        # One pass for both views: the batch statistics are those of all 2B images.
        both = jnp.concatenate([self.view(batch, rng, 0), self.view(batch, rng, 1)])  # [2B, H, W, C]
        pooled, statistics = self.represent(params["encoder"], state["encoder"], both)
        projected, _ = self.head.run(params["projector"], {}, pooled)
        first, second = jnp.split(unit(projected), 2)  # [B, outputs] each
        metrics = {"alignment": (first * second).sum(-1).mean()}
        return nt_xent(first, second, 1 / self.temperature), Outputs(metrics, {"encoder": statistics})

    def forward_flops(self, batch: Batch) -> float:
        """Encoder and head on two views."""
        return 2 * self.view_flops(self.head)
