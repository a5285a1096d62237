"""A network that knows identities, trained here with ArcFace's margin (Deng et al. 2019, arXiv 1801.07698): Vec2Face's first stage.

Any labelled images do, faces by person or digits by digit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from maskae.errors import UserError
from maskae.losses.classification import label_smoothing_cross_entropy
from maskae.nn.batch_norm import STATISTICS
from maskae.nn.flops import linear_flops
from maskae.systems.contract import Batch, Outputs, Params, State, Variables
from maskae.systems.vec2face_arguments import FaceArguments, signed
from maskae.vectors import unit


def margin_logits(cosines: jax.Array, labels: jax.Array, margin: float, scale: float) -> jax.Array:
    """scale cos(angle + margin) for the label, scale cos(angle) for all others; [B, K] -> [B, K].

    Past pi - margin, where the cosine would rise again, the penalty is cos(angle) - margin sin(margin), as in the released code.
    """
    sine = jnp.sqrt(jnp.clip(1 - jnp.square(cosines), 1e-6, 1.0))
    moved = cosines * math.cos(margin) - sine * math.sin(margin)
    moved = jnp.where(cosines > math.cos(math.pi - margin), moved, cosines - margin * math.sin(margin))
    return scale * jnp.where(jax.nn.one_hot(labels, cosines.shape[-1], dtype=bool), moved, cosines)


@dataclass(frozen=True)
class IdentityEncoder(FaceArguments):
    """Arguments beside those of `FaceArguments`.

    Args:
        num_classes: identities.
        margin: added to the label's angle, in radians.
        scale: of the cosines.
    """

    num_classes: int = 10
    margin: float = 0.5
    scale: float = 64.0

    # Batch statistics: microbatches would change the loss.
    couples_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        super().__post_init__()
        if self.num_classes < 2 or self.scale <= 0 or not 0 <= self.margin < math.pi / 2:
            raise UserError(f"num_classes={self.num_classes}, margin={self.margin}, scale={self.scale}: 2 classes, 0..pi/2 and above 0")

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Untrained; the batch is not read."""
        keys = jax.random.split(rng)
        face = self.face().init(keys[0], jnp.zeros((1, self.image_size, self.image_size, self.channels)))
        centres = 0.01 * jax.random.normal(keys[1], (self.features_width, self.num_classes))
        return Variables({"face": face["params"], "head": {"kernel": centres}}, {"face": face[STATISTICS]})

    def cosines(self, params: Params, vectors: jax.Array) -> jax.Array:
        """Of vectors [B, D] to every identity's centre, [B, K]."""
        return unit(vectors) @ unit(params["head"]["kernel"], 0)

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Cross-entropy with the margin. The last norm's scale is held at 1, or vectors would not have unit variance."""
        face = params["face"]
        last = face["vector_norm"] | {"scale": jax.lax.stop_gradient(face["vector_norm"]["scale"])}
        variables = {"params": {**face, "vector_norm": last}, STATISTICS: state["face"]}
        found: Any = self.face(train=True).apply(variables, signed(batch["image"]), mutable=[STATISTICS])
        (vectors, _), moved = found
        cosines = self.cosines(params, vectors)
        loss = label_smoothing_cross_entropy(margin_logits(cosines, batch["label"], self.margin, self.scale), batch["label"], 0.0)
        accuracy = (cosines.argmax(-1) == batch["label"]).astype(jnp.float32).mean()
        return loss, Outputs({"accuracy": accuracy}, {"face": moved[STATISTICS]})

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """`pooled` [B, D], the identity vector, and `logits` [B, K], its cosines; float32."""
        found: Any = self.face().apply({"params": params["face"], STATISTICS: state["face"]}, signed(batch["image"]))
        return {"pooled": found[0], "logits": self.cosines(params, found[0])}

    def forward_flops(self, batch: Batch) -> float:
        """The network and the centres."""
        return self.face().flops(self.image_size, self.channels) + linear_flops(1, self.features_width, self.num_classes)
