"""G-SimCLR: "Self-Supervised Contrastive Learning with Guided Projection via Pseudo Labelling", Chakraborty et al., ICDM 2020 workshop,
arXiv 2009.12007.

SimCLR takes every other image of a batch for a negative, also those that show the same thing. Here a denoising autoencoder is trained first
(`maskae.systems.denoising_autoencoder`), k-means on its features gives pseudo labels, and batches are made of images of different pseudo
labels (`maskae.data.guided_order`): the order of the data depends on the first stage. Nothing else differs from SimCLR.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from maskae.data.guided_order import BATCHINGS, GuidedOrder
from maskae.data.spec import DataSpec
from maskae.errors import UserError, check_choice
from maskae.evaluate.clustering import kmeans
from maskae.evaluate.features import extract
from maskae.losses.contrastive import nt_xent
from maskae.nn.mlp import Mlp, mlp_flops
from maskae.nn.views import View
from maskae.plots import draw_embedding
from maskae.systems.contract import Batch, Outputs, Params, State, Variables
from maskae.systems.contrastive_cnn import ContrastiveCnn
from maskae.vectors import unit

MAP_RECORDS = 2000


@dataclass(frozen=True)
class GSimClr(ContrastiveCnn):
    """Arguments beside those of `ContrastiveCnn`.

    Args:
        head_widths: of the projection head's layers, ReLU between them.
        batching: "strict" (no two images of one pseudo label in a batch), "even" (so too, with clusters in their proportions),
            "official" (the released code: so only while every cluster has images left) or "random" (plain SimCLR; no stage before is read).
        clusters: of k-means; the paper has as many as a batch has images. "strict" without `reuse` drops what the largest clusters cannot
            fill batches with, and 2 to 4 times as many clusters as images in a batch lose less.
        reuse: images of small clusters repeat within an epoch, and none is dropped.
        records: training records, each of which keeps its cluster; 0 for "random".
        guide: name of the stage before whose `pooled` features are clustered. Any system that reads images may be it.
        restarts: of k-means.
        gray: probability of grey views in place of the recipe's.
        augment_per_batch: draw a view's flip and colours once for the whole batch, as the released code does. For reproduction only: views
            then differ by one and the same change, which makes the task nearly trivial.

    Raises:
        UserError: where a name is unknown or a number is out of its range.
    """

    _: KW_ONLY
    head_widths: tuple[int, ...] = (256, 128, 50)
    batching: str = "strict"
    clusters: int = 256
    reuse: bool = False
    records: int = 0
    guide: str = "autoencoder"
    restarts: int = 10
    gray: float | None = None
    augment_per_batch: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        super().__post_init__()
        object.__setattr__(self, "head_widths", tuple(self.head_widths))
        check_choice("batching", self.batching, (*BATCHINGS, "random"))
        if len(self.head_widths) < 3 or min(self.head_widths) < 1:
            raise UserError(f"head_widths={self.head_widths}: the probes read two hidden layers, so there must be at least three widths")
        if self.guided and not 1 <= self.clusters <= self.records:
            raise UserError(f"clusters={self.clusters} must be between 1 and records={self.records}, the number of training records")
        if self.restarts < 1:
            raise UserError(f"restarts={self.restarts}: it must be at least 1")

    @property
    def guided(self) -> bool:
        """Whether pseudo labels are made and used."""
        return self.batching != "random"

    @property
    def head(self) -> Mlp:
        """The projection head."""
        return Mlp(self.head_widths, keras=True)

    @property
    def recipe(self) -> View:
        """How views are made."""
        return super().recipe if self.gray is None else dataclasses.replace(super().recipe, gray=self.gray)

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh parameters; the batch is not read. `begin` fills in the clusters and their map."""
        encoder_key, head_key = jax.random.split(rng)
        encoder = self.init_encoder(encoder_key)
        head = self.head.init(head_key, jnp.zeros((1, self.width)))["params"]
        state: State = {"encoder": encoder.state}
        if self.guided:
            state["clusters"] = jnp.full(self.records, -1, jnp.int32)
            state["map"] = jnp.zeros((len(self.mapped), 2))
        return Variables({"encoder": encoder.params, "projector": head}, state)

    @property
    def mapped(self) -> np.ndarray:
        """The records that `draw` shows, evenly spaced."""
        return np.unique(np.linspace(0, self.records - 1, min(self.records, MAP_RECORDS)).round().astype(np.int64))

    def begin(self, variables: Variables, stage: Any) -> Variables:
        """Pseudo labels of all training records: k-means on what the guide makes of them. Records that cannot be read get none."""
        if not self.guided:
            return variables
        if len(stage) != self.records:
            raise UserError(f"model.records={self.records}, but there are {len(stage)} training records: set it to that")
        system, learned = stage.earlier(self.guide)
        self.check_guide(stage)
        encode = jax.jit(lambda batch: system.features(learned.params, learned.state, batch))
        found = extract(encode, stage.batches(), ("pooled",))
        clusters = np.full(self.records, -1, np.int32)
        clusters[found["index"]] = kmeans(found["pooled"], self.clusters, restarts=self.restarts, seed=stage.experiment.config.seed)
        features = np.zeros((self.records, found["pooled"].shape[1]), np.float32)
        features[found["index"]] = found["pooled"]
        # Rounding may differ between hosts, and their batches must not.
        made = multihost_utils.broadcast_one_to_all({"clusters": clusters, "map": principal_plane(features[self.mapped])})
        return Variables(variables.params, {**variables.state, **jax.tree.map(np.asarray, made)})

    def check_guide(self, stage: Any) -> None:
        """Raises UserError where the guide was trained on images that were prepared in another way."""
        theirs, ours = stage.finished[self.guide][0].data, stage.experiment.config.data
        for key in ("image_size", "channels", "statistics"):
            if theirs[key] != ours[key]:
                raise UserError(f"data.{key}={ours[key]}, but the stage '{self.guide}' was trained with {theirs[key]}")

    def order(self, variables: Variables, batch_size: int, seed: int) -> GuidedOrder | None:
        """The order of the training records; None, the ordinary one, for "random"."""
        if not self.guided:
            return None
        return GuidedOrder(np.asarray(variables.state["clusters"]), batch_size, batching=self.batching, reuse=self.reuse, seed=seed)

    def view(
        self, batch: Batch, rng: jax.Array, number: int, size: int | None = None, crop: tuple[float, float] | None = None
    ) -> jax.Array:
        """View `number` of each image as the network wants it, float32 [B, size, size, C]."""
        if self.augment_per_batch:
            batch = {**batch, "example": jnp.zeros_like(batch["example"])}
        return super().view(batch, rng, number, size, crop)

    def projections(self, params: Params, pooled: jax.Array) -> list[jax.Array]:
        """Outputs of the head's layers, for the encoder's feature [B, D]."""
        made: Any = self.head.apply({"params": params["projector"]}, pooled, True)
        return made

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """NT-Xent over the global batch.

        Metrics: `alignment`, the mean cosine of the two views of an image; the pairs of images of one batch that share a pseudo label,
        `same_cluster_pairs` (0 is what "strict" promises), or a label, `same_class_pairs` (the false negatives; where there are labels).
        """
        # One pass for both views: the batch statistics are those of all 2B images.
        both = jnp.concatenate([self.view(batch, rng, 0), self.view(batch, rng, 1)])  # [2B, H, W, C]
        pooled, statistics = self.represent(params["encoder"], state["encoder"], both)
        first, second = jnp.split(unit(self.projections(params, pooled)[-1]), 2)  # [B, widths[-1]] each
        metrics = {"alignment": (first * second).sum(-1).mean(), "same_class_pairs": equal_pairs(batch["label"])}
        if self.guided:
            metrics["same_cluster_pairs"] = equal_pairs(state["clusters"][batch["index"]])
        return nt_xent(first, second, 1 / self.temperature), Outputs(metrics, {**state, "encoder": statistics})

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """`pooled` [B, D] and `tokens` of the encoder, and the head's hidden layers `p2` and `p1`, the first and the second one.

        The paper's names count from the loss: P1 is the second hidden layer, P2 the first, P3 the encoder's mean over positions.
        """
        found = super().features(params, state, batch)
        hidden = self.projections(params, found["pooled"])
        return {**found, "p2": hidden[0].astype(jnp.float32), "p1": hidden[1].astype(jnp.float32)}

    def draw(self, params: Params, state: State, batch: Batch, rng: jax.Array, spec: DataSpec) -> Mapping[str, np.ndarray]:
        """The guide's features of training images, coloured by pseudo label."""
        if not self.guided:
            return {}
        title = f"{self.guide}'s features by pseudo label"
        return {"pseudo_labels": draw_embedding(np.asarray(state["map"]), np.asarray(state["clusters"])[self.mapped], title=title)}

    def forward_flops(self, batch: Batch) -> float:
        """Encoder and head on two views."""
        return 2 * (self.encoder_flops(self._pixels) + mlp_flops(1, self.width, self.head_widths))


def equal_pairs(groups: jax.Array) -> jax.Array:
    """How many pairs of rows are of one group, int [B] -> float32 scalar; negative groups pair with nothing."""
    same = (groups[:, None] == groups[None, :]) & (groups >= 0)[:, None]
    return (same.sum().astype(jnp.float32) - (groups >= 0).sum()) / 2


def principal_plane(features: np.ndarray) -> np.ndarray:
    """The first two principal components of features [N, D], float32 [N, 2]."""
    centred = features.astype(np.float64) - features.mean(0)
    if min(centred.shape) < 2:
        return np.zeros((len(features), 2), np.float32)
    return (centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T).astype(np.float32)
