"""BYOL: "Bootstrap Your Own Latent", Grill et al., NeurIPS 2020, arXiv 2006.07733.

A predictor on one view's projection aims at the projection of the other view by a moving average of the network; there are no negatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maskae.errors import UserError
from maskae.nn.heads import ProjectionHead, cosine_momentum
from maskae.optim import ema_update
from maskae.systems.contract import Batch, Outputs, Params, State, Variables
from maskae.systems.contrastive_cnn import ContrastiveCnn
from maskae.vectors import unit

PARTS = ("encoder", "projector")


class Compared(NamedTuple):
    """The loss of either direction, in [-2, 2], and the next state."""

    first: jax.Array
    second: jax.Array
    state: State


@dataclass(frozen=True)
class Byol(ContrastiveCnn):
    """Arguments beside those of `ContrastiveCnn` (`temperature` is not used).

    Args:
        hidden, outputs: channels inside and after projector and predictor.
        momentum: of the target at the start; it rises to 1 by half a cosine over `total_steps`.
        total_steps: of the run, for that cosine.
    """

    hidden: int = 4096
    outputs: int = 256
    momentum: float = 0.996
    total_steps: int = 300_000

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        super().__post_init__()
        if self.total_steps < 1:
            raise UserError(f"total_steps={self.total_steps}: the cosine of the target's momentum needs the length of the run")

    @property
    def head(self) -> ProjectionHead:
        """Projector and predictor are of one form."""
        return ProjectionHead(self.outputs, self.hidden, norm=True, hidden_bias=False, dtype=jnp.dtype(self.dtype))

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh parameters, and a target equal to them; the batch is not read."""
        keys = jax.random.split(rng, 3)
        encoder = self.init_encoder(keys[0])
        projector, projector_state = self.head.start(keys[1], self.width)
        predictor, predictor_state = self.head.start(keys[2], self.outputs)
        params = {"encoder": encoder.params, "projector": projector, "predictor": predictor}
        state = {"encoder": encoder.state, "projector": projector_state}
        target = {"params": {name: params[name] for name in PARTS}, **state}
        return Variables(params, {**state, "predictor": predictor_state, "target": jax.tree.map(jnp.copy, target)})

    def project(self, params: Params, state: State, images: jax.Array) -> tuple[jax.Array, State]:
        """Normalised images -> projections [B, outputs], and the moved statistics of encoder and projector."""
        pooled, encoder = self.represent(params["encoder"], state["encoder"], images)
        projected, projector = self.head.run(params["projector"], state["projector"], pooled)
        return projected, {"encoder": encoder, "projector": projector}

    def target_params(self, params: Params, state: State, step: jax.Array) -> Params:
        """The target as it stands after the step before `step`: moved towards the parameters that this step produced."""
        decay = cosine_momentum(jnp.maximum(step - 1, 0), self.momentum, self.total_steps)
        online = {name: params[name] for name in PARTS}
        return jax.lax.stop_gradient(ema_update(state["target"]["params"], online, decay))

    def compare(self, params: Params, state: State, first: jax.Array, second: jax.Array, target_params: Params) -> Compared:
        """-2 cos(prediction of one view, target's projection of the other), both ways; batch statistics move one view after the other."""
        online: dict[str, Any] = {name: state[name] for name in (*PARTS, "predictor")}
        target: dict[str, Any] = {name: state["target"][name] for name in PARTS}
        losses = []
        for own, other in ((first, second), (second, first)):
            projected, moved = self.project(params, online, own)
            predicted, predictor = self.head.run(params["predictor"], online["predictor"], projected)
            aim, target = self.project(target_params, target, other)
            online = {**moved, "predictor": predictor}
            losses.append(-2 * (unit(predicted) * jax.lax.stop_gradient(unit(aim))).sum(-1).mean())
        return Compared(losses[0], losses[1], {**online, "target": {"params": target_params, **target}})

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """The sum of both directions, in [-4, 4]; -4 where every prediction is aligned."""
        target = self.target_params(params, state, step)
        found = self.compare(params, state, self.view(batch, rng, 0), self.view(batch, rng, 1), target)
        return found.first + found.second, Outputs({}, found.state)

    def forward_flops(self, batch: Batch) -> float:
        """Both views through the network and its target, and the predictor on both."""
        return 4 * self.view_flops(self.head) + 2 * self.head.flops(self.outputs)

    def train_flops(self, batch: Batch) -> float:
        """A training step goes back through the network and not through its target."""
        return self.forward_flops(batch) + 4 * (self.view_flops(self.head) + self.head.flops(self.outputs))
