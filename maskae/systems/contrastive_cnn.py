"""What the contrastive systems around a convolutional encoder share: pairs of views, and the encoder's pooled feature."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from maskae.errors import UserError
from maskae.keys import purpose_key
from maskae.nn.views import View, view_called
from maskae.systems.cnn_arguments import CnnArguments
from maskae.systems.contract import Batch, Params, State


@dataclass(frozen=True)
class ContrastiveCnn(CnnArguments):
    """Arguments beside those of every convolutional system (`CnnArguments`).

    Args:
        views: recipe of the views, one of `maskae.nn.views.VIEWS`.
        crop: share of the area that a view takes, in place of the recipe's.
        temperature: of the similarities.

    Raises:
        UserError: where a name is unknown, sizes do not fit together, or the temperature is not positive.
    """

    _: KW_ONLY
    views: str = "ct"
    crop: tuple[float, float] | None = None
    temperature: float = 0.1

    # The loss compares examples, and batch statistics couple them.
    couples_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        super().__post_init__()
        view_called(self.views)
        if self.temperature <= 0:
            raise UserError(f"temperature={self.temperature} must be positive")

    @property
    def recipe(self) -> View:
        """How views are made."""
        return view_called(self.views)

    def view(
        self, batch: Batch, rng: jax.Array, number: int, size: int | None = None, crop: tuple[float, float] | None = None
    ) -> jax.Array:
        """View `number` of each image as the network wants it, float32 [B, size, size, C]."""
        key = purpose_key(rng, f"view_{number}")
        made = self.recipe(batch["image"], batch["example"], key, size or self._pixels[0], crop or self.crop)
        return self.normalised(made)

    def represent(self, params: Params, statistics: State, images: jax.Array) -> tuple[jax.Array, State]:
        """In training: normalised images -> the pooled feature float32 [B, D], and the moved statistics of the encoder."""
        pyramid, moved = self.encode(params, statistics, images, train=True)
        return pyramid.pooled, moved

    def panel(self, batch: Batch, rng: jax.Array, count: int = 2) -> dict[str, jax.Array]:
        """The original and `count` views of each image, in the batch's units, for the report."""
        mean, std = jnp.asarray(self.mean), jnp.asarray(self.std)
        made = {f"view {i + 1}": self.view(batch, rng, i) * std + mean for i in range(count)}
        return {"original": batch["image"].astype(jnp.float32), **made}

    def reconstruct(self, params: Params, state: State, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Nothing is reconstructed here: panels of the views that the loss compares, float32 [B, H, W, C] in the batch's units."""
        return self.panel(batch, rng)

    @property
    def panel_labels(self) -> dict[str, str]:
        """What each panel of `reconstruct` truthfully is."""
        return {"original": "original", "view 1": "first view", "view 2": "second view"}

    def view_flops(self, head: Any, size: int | None = None) -> float:
        """Encoder and head on one view of `size` pixels."""
        side = size or self._pixels[0]
        return self.encoder_flops((side, side)) + head.flops(self.width)
