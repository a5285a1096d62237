"""MoCo v2: "Improved Baselines with Momentum Contrastive Learning", Chen et al. 2020, arXiv 2003.04297 (MoCo: arXiv 1911.05722).

A query finds the key of the other view of its image among a queue of keys from earlier batches; keys come from a moving average of the
query encoder. The batch statistics are those of the global batch, so that no shuffling of keys over devices is needed to hide them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maskae.errors import UserError
from maskae.losses.classification import label_smoothing_cross_entropy
from maskae.losses.contrastive import enqueue
from maskae.nn.heads import ProjectionHead
from maskae.optim import ema_update
from maskae.systems.contract import Batch, Outputs, Params, State, Variables
from maskae.systems.contrastive_cnn import ContrastiveCnn
from maskae.vectors import unit


class Compared(NamedTuple):
    """`queries`, `keys` float32 [B, d], `logits` float32 [B, 1 + K] (the own key first), the `loss`, and the next `state`."""

    queries: jax.Array
    keys: jax.Array
    logits: jax.Array
    loss: jax.Array
    state: State


@dataclass(frozen=True)
class MocoV2(ContrastiveCnn):
    """Arguments beside those of `ContrastiveCnn`.

    Args:
        hidden: channels inside the head; None takes those of the feature.
        mlp_head: the two-layer head of v2; False is v1's linear one, which the published CT command runs under the name of v2.
        outputs: channels of queries and keys.
        queue: number of kept keys, a multiple of the global batch.
        momentum: of the key encoder, moved towards the query encoder before each batch.
    """

    hidden: int | None = None
    mlp_head: bool = True
    outputs: int = 128
    queue: int = 65536
    momentum: float = 0.999
    temperature: float = field(default=0.07, kw_only=True)

    @property
    def head(self) -> ProjectionHead:
        """Thrown away after pre-training."""
        hidden = (self.hidden or self.width) if self.mlp_head else None
        return ProjectionHead(self.outputs, hidden, dtype=jnp.dtype(self.dtype))

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh parameters, the key encoder equal to the query encoder, and a queue of random directions; the batch is not read."""
        encoder_key, head_key, queue_key = jax.random.split(rng, 3)
        encoder = self.init_encoder(encoder_key)
        head, _ = self.head.start(head_key, self.width)
        params = {"encoder": encoder.params, "projector": head}
        queue = unit(jax.random.normal(queue_key, (self.queue, self.outputs)))
        key = {"params": jax.tree.map(jnp.copy, params), "encoder": jax.tree.map(jnp.copy, encoder.state)}
        return Variables(params, {"encoder": encoder.state, "key": key, "queue": queue, "pointer": jnp.zeros((), jnp.int32)})

    def embed(self, params: Params, statistics: State, images: jax.Array) -> tuple[jax.Array, State]:
        """Normalised images -> directions float32 [B, outputs], and the moved statistics."""
        pooled, moved = self.represent(params["encoder"], statistics, images)
        return unit(self.head.run(params["projector"], {}, pooled)[0]), moved

    def compare(self, params: Params, state: State, query_images: jax.Array, key_images: jax.Array) -> Compared:
        """Move the key encoder, embed both views, compare with the queue as it was, then put the keys into it."""
        if self.queue % len(query_images):
            raise UserError(f"queue={self.queue} is no multiple of the batch of {len(query_images)}")
        key_params = jax.lax.stop_gradient(ema_update(state["key"]["params"], params, self.momentum))
        queries, query_statistics = self.embed(params, state["encoder"], query_images)
        keys, key_statistics = self.embed(key_params, state["key"]["encoder"], key_images)
        keys = jax.lax.stop_gradient(keys)
        positive = (queries * keys).sum(-1, keepdims=True)  # [B, 1]
        logits = jnp.concatenate([positive, queries @ state["queue"].T], 1) / self.temperature  # [B, 1 + K]
        loss = label_smoothing_cross_entropy(logits, jnp.zeros(len(logits), jnp.int32), 0.0)
        moved: dict[str, Any] = {"encoder": query_statistics, "key": {"params": key_params, "encoder": key_statistics}}
        moved["queue"], moved["pointer"] = enqueue(state["queue"], state["pointer"], keys)
        return Compared(queries, keys, logits, loss, moved)

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Cross-entropy of the own key against the queue; `accuracy` is the share of queries that find it."""
        found = self.compare(params, state, self.view(batch, rng, 0), self.view(batch, rng, 1))
        accuracy = (found.logits.argmax(-1) == 0).astype(jnp.float32).mean()
        return found.loss, Outputs({"accuracy": accuracy, "alignment": (found.queries * found.keys).sum(-1).mean()}, found.state)

    def forward_flops(self, batch: Batch) -> float:
        """The query's and the key's view, and the similarities to the queue."""
        return 2 * self.view_flops(self.head) + 2.0 * self.outputs * self.queue

    def train_flops(self, batch: Batch) -> float:
        """A training step goes back through the query's half only."""
        return self.forward_flops(batch) + 2 * (self.view_flops(self.head) + 2.0 * self.outputs * self.queue)
