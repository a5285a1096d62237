"""Classification with images and incomplete tables on TIP's encoders (Du et al. 2024, arXiv 2407.07582, section 4, released code).

A linear map of the fused class token, trained with every encoder or on top of frozen ones. Without pretrained encoders it is the
supervised baseline.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskae.data.spec import DataSpec
from maskae.errors import check_choice
from maskae.losses.classification import label_smoothing_cross_entropy
from maskae.nn.flops import linear_flops
from maskae.nn.heads import ProjectionHead
from maskae.nn.transfer import adopt_parameters
from maskae.systems.contract import Batch, Outputs, Params, State, Variables
from maskae.systems.tip import Tip, corrupted_rows, rows_of

ENCODERS = ("encoder", "table", "fusion")
TRAINED = ("all", "head")


@dataclass(frozen=True)
class TipClassifier(Tip):
    """Arguments beside those of `TipArguments`, of which those of the pretraining losses are not read.

    Args:
        num_classes: of the task.
        trained: "all", or the "head" alone on frozen encoders with their running statistics (the linear probe).

    `init_from` takes the encoders of a run of `tip`, their running statistics and the values of its table's columns.
    """

    _: KW_ONLY
    num_classes: int = 286
    trained: str = "all"
    view_probability: float = 0.8
    crop: tuple[float, float] | None = (0.6, 1.0)

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        super().__post_init__()
        check_choice("trained", self.trained, TRAINED)

    @property
    def head(self) -> ProjectionHead:
        """The linear classifier."""
        return ProjectionHead(self.num_classes, dtype=jnp.dtype(self.dtype))

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """A fresh classifier on untrained encoders."""
        body_key, head_key = jax.random.split(rng)
        fresh = super().init(body_key, batch)
        params = {name: fresh.params[name] for name in ENCODERS}
        return Variables(params | {"head": self.head.start(head_key, self.table_width)[0]}, fresh.state)

    def with_pretrained(self, fresh: Variables, given: Variables) -> Variables:
        """`fresh` with the encoders and the state of `given`. Raises UserError listing what does not fit."""
        params = adopt_parameters(fresh.params, given.params, skip=("head",))
        return Variables(params, adopt_parameters(fresh.state, given.state, what="state"))

    def classify(self, params: Params, fused: jax.Array) -> jax.Array:
        """Fused class tokens [B, D] -> logits float32 [B, K]."""
        return self.head.run(params["head"], {}, fused)[0].astype(jnp.float32)

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Cross-entropy on a view of the image and a row with corrupted cells; missing cells are hidden."""
        frozen = self.trained == "head"
        body = jax.lax.stop_gradient(params) if frozen else params
        rows = rows_of(batch)
        pyramid, moved = self.encode(body["encoder"], state["encoder"], self.view(batch, rng), train=not frozen)
        changed = corrupted_rows(rows, state["marginals"], self.draw_cells(batch["example"], rng))
        seen = self.part("fusion", body, pyramid.maps[-1], method="see")
        logits = self.classify(params, self.fused(body, seen, rows._replace(table=changed))[1][:, 0])
        accuracy = (logits.argmax(-1) == batch["label"]).astype(jnp.float32).mean()
        loss = label_smoothing_cross_entropy(logits, batch["label"], 0.0)
        return loss, Outputs({"accuracy": accuracy}, {**state, "encoder": moved})

    def embeddings(self, params: Params, features: dict[str, Any]) -> dict[str, jax.Array]:
        """`logits` [B, K]; there is no projection into a common space."""
        return {"logits": self.classify(params, features["pooled"])}

    def draw(self, params: Params, state: State, batch: Batch, rng: jax.Array, spec: DataSpec) -> dict[str, np.ndarray]:
        """No picture: cells are not predicted here."""
        return {}

    def forward_flops(self, batch: Batch) -> float:
        """Every encoder once."""
        return self.encoder_flops(self._pixels) + self.row_flops(1, 1) + linear_flops(1, self.table_width, self.num_classes)
