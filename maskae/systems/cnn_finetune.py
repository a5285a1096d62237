"""Fine-tuning of a pretrained convolutional encoder with a linear classifier (Wolf et al. 2023, arXiv 2308.06534, released code).

The encoder's convolutions wait while the classifier learns, then open with a smaller learning rate that doubles up to the classifier's:
`optimizer.groups` with the schedule "unfreeze"; its norms learn from the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from maskae.keys import purpose_key
from maskae.losses.classification import label_smoothing_cross_entropy
from maskae.nn.flops import linear_flops
from maskae.nn.heads import ProjectionHead
from maskae.nn.transfer import adopt_parameters
from maskae.nn.views import view_called
from maskae.systems.cnn_arguments import CnnArguments
from maskae.systems.contract import Batch, Outputs, Params, State, Variables


@dataclass(frozen=True)
class CnnFineTune(CnnArguments):
    """Arguments beside those of `CnnArguments`.

    Args:
        num_classes: of the task.
        label_smoothing: 0 in the paper.
        views: recipe of random views for training (`maskae.nn.views.VIEWS`); None trains on the images as they come.
        running_statistics: batch norms normalise by the encoder's running statistics in training too, and leave them as they are.

    `init_from` takes the `encoder` of any convolutional run, its running statistics included.
    """

    num_classes: int = 10
    label_smoothing: float = 0.0
    views: str | None = None
    running_statistics: bool = False

    # Batch statistics: microbatches would change the loss.
    couples_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        super().__post_init__()
        if self.views is not None:
            view_called(self.views)

    @property
    def head(self) -> ProjectionHead:
        """The linear classifier."""
        return ProjectionHead(self.num_classes, dtype=jnp.dtype(self.dtype))

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """A fresh classifier on an untrained encoder; the batch is not read."""
        encoder_key, head_key = jax.random.split(rng)
        encoder = self.init_encoder(encoder_key)
        head, _ = self.head.start(head_key, self.width)
        return Variables({"encoder": encoder.params, "head": head}, {"encoder": encoder.state})

    def with_pretrained(self, fresh: Variables, given: Variables) -> Variables:
        """`fresh` with the encoder of `given` and its running statistics. Raises UserError listing the leaves that do not fit."""
        params = adopt_parameters(fresh.params, given.params, skip=("head",))
        return Variables(params, adopt_parameters(fresh.state, given.state, what="encoder's running statistics"))

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Cross-entropy of the classifier on the pooled feature."""
        images = batch["image"]
        if self.views is not None:
            images = view_called(self.views)(images, batch["example"], purpose_key(rng, "view"), self._pixels[0])
        draws = self.drop_draws(purpose_key(rng, "drop_path"), batch["example"])
        train = not self.running_statistics
        pyramid, moved = self.encode(params["encoder"], state["encoder"], self.normalised(images), train=train, drop_draws=draws)
        logits, _ = self.head.run(params["head"], {}, pyramid.pooled)
        loss = label_smoothing_cross_entropy(logits, batch["label"], self.label_smoothing)
        accuracy = (logits.argmax(-1) == batch["label"]).astype(jnp.float32).mean()
        return loss, Outputs({"accuracy": accuracy}, {"encoder": moved})

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """As of every convolutional system, and `logits` [B, K]; float32."""
        named = super().features(params, state, batch)
        logits = self.head.apply({"params": params["head"]}, named["pooled"], train=False)
        return named | {"logits": jnp.asarray(logits, jnp.float32)}

    def forward_flops(self, batch: Batch) -> float:
        """Encoder and classifier."""
        return self.encoder_flops(batch["image"].shape[1:3]) + linear_flops(1, self.width, self.num_classes)
