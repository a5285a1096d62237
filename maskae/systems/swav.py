"""SwAV: "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", Caron et al., NeurIPS 2020, arXiv 2006.09882.

Each of two large crops is assigned to prototypes, evenly over the batch; all other crops of the image, small ones too, predict the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maskae.losses.classification import soft_target_cross_entropy
from maskae.losses.sinkhorn import sinkhorn
from maskae.nn.heads import ProjectionHead, linear_init
from maskae.systems.contract import Batch, Outputs, Params, State, Variables
from maskae.systems.contrastive_cnn import ContrastiveCnn
from maskae.vectors import unit

ASSIGNED = 2  # crops that get a code


class Clustered(NamedTuple):
    """`embeddings` [V*B, d] and `scores` [V*B, K], crop after crop; `codes` of the assigned crops [B, K] each; `loss`; `state`."""

    embeddings: jax.Array
    scores: jax.Array
    codes: tuple[jax.Array, ...]
    loss: jax.Array
    state: State


@dataclass(frozen=True)
class Swav(ContrastiveCnn):
    """Arguments beside those of `ContrastiveCnn`.

    Args:
        hidden, outputs: channels inside and after the projection head; hidden=0 is a linear head.
        prototypes: number of clusters.
        epsilon, iterations: of the Sinkhorn assignment.
        small_crops: number of small crops beside the two large ones.
        small_size: their pixels.
        small_crop: share of the area that they take; the large ones take `crop`.
        freeze_prototypes: steps at the start in which the prototypes do not learn.
    """

    hidden: int = 2048
    outputs: int = 128
    prototypes: int = 500
    epsilon: float = 0.05
    iterations: int = 3
    small_crops: int = 6
    small_size: int = 96
    small_crop: tuple[float, float] = (0.10, 0.33)
    freeze_prototypes: int = 313
    views: str = field(default="ct_swav", kw_only=True)

    @property
    def head(self) -> ProjectionHead:
        """Linear, batch norm, ReLU, linear, or linear alone; thrown away after pre-training."""
        return ProjectionHead(self.outputs, self.hidden or None, norm=True, dtype=jnp.dtype(self.dtype))

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh parameters; the batch is not read."""
        keys = jax.random.split(rng, 3)
        encoder = self.init_encoder(keys[0])
        head, head_state = self.head.start(keys[1], self.width)
        prototypes = {"kernel": linear_init(keys[2], (self.outputs, self.prototypes), jnp.float32)}
        params = {"encoder": encoder.params, "projector": head, "prototypes": prototypes}
        return Variables(params, {"encoder": encoder.state, "projector": head_state})

    def cluster(self, params: Params, state: State, crops: Sequence[jax.Array], step: jax.Array) -> Clustered:
        """Embed all crops (those of one size in one pass), assign the first two, and predict each code from all other crops."""
        pooled, statistics, start = [], state["encoder"], 0
        while start < len(crops):
            end = next((i for i in range(start, len(crops)) if crops[i].shape != crops[start].shape), len(crops))
            part, statistics = self.represent(params["encoder"], statistics, jnp.concatenate(crops[start:end]))
            pooled.append(part)
            start = end
        projected, head_state = self.head.run(params["projector"], state["projector"], jnp.concatenate(pooled))
        embeddings = unit(projected)  # [V*B, outputs]
        kernel = params["prototypes"]["kernel"]
        # The released code overwrites the prototypes by unit vectors before each step: the gradient is taken at those and passed on.
        kernel = kernel + jax.lax.stop_gradient(unit(kernel.T).T - kernel)
        kernel = jnp.where(step < self.freeze_prototypes, jax.lax.stop_gradient(kernel), kernel)
        scores = embeddings @ kernel  # [V*B, K]
        each = jnp.split(scores, len(crops))  # [B, K] per crop
        codes = tuple(sinkhorn(each[i], self.epsilon, self.iterations) for i in range(ASSIGNED))
        loss = jnp.zeros(())
        for assigned, code in enumerate(codes):
            others = [each[i] for i in range(len(crops)) if i != assigned]
            loss += sum(soft_target_cross_entropy(other / self.temperature, code) for other in others) / (len(others) * ASSIGNED)
        return Clustered(embeddings, scores, codes, loss, {"encoder": statistics, "projector": head_state})

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Swapped prediction; `used_prototypes` is the share of prototypes that some image has as its strongest code."""
        crops = [self.view(batch, rng, i) for i in range(ASSIGNED)]
        crops += [self.view(batch, rng, ASSIGNED + i, self.small_size, self.small_crop) for i in range(self.small_crops)]
        found = self.cluster(params, state, crops, step)
        used = jnp.zeros(self.prototypes).at[found.codes[0].argmax(-1)].set(1.0).mean()
        return found.loss, Outputs({"used_prototypes": used}, found.state)

    def forward_flops(self, batch: Batch) -> float:
        """All crops through encoder and head, and their scores."""
        scores = 2.0 * (ASSIGNED + self.small_crops) * self.outputs * self.prototypes
        small = self.small_crops * self.view_flops(self.head, self.small_size) if self.small_crops else 0.0
        return ASSIGNED * self.view_flops(self.head) + small + scores
