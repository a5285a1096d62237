"""A loss with global negatives to test with."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from maskae.systems.contract import Outputs, Variables


@dataclasses.dataclass(frozen=True)
class Contrast:
    """InfoNCE (van den Oord et al. 2018) of two noisy views by a linear encoder: every other image of the global batch is a negative."""

    width: int = 8
    temperature: float = 0.2
    couples_examples = True

    def init(self, rng, batch):
        values = int(np.prod(batch["image"].shape[1:]))
        return Variables({"encoder": {"kernel": jax.random.normal(rng, (values, self.width)) / values**0.5}}, {})

    def embed(self, params, images):
        vectors = images.reshape(len(images), -1) @ params["encoder"]["kernel"]  # [B, D]
        return vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)

    def loss(self, params, state, batch, rng, step):
        def view(number):
            def noise(i):
                return jax.random.normal(jax.random.fold_in(jax.random.fold_in(rng, number), i), batch["image"].shape[1:])

            return self.embed(params, batch["image"] + 0.3 * jax.vmap(noise)(batch["example"]))

        scores = view(0) @ view(1).T / self.temperature  # [B, B]
        own = jnp.diagonal(scores)
        loss = (jax.nn.logsumexp(scores, axis=1) + jax.nn.logsumexp(scores, axis=0)).mean() / 2 - own.mean()
        return loss, Outputs({}, state)

    def features(self, params, state, batch):
        return {"pooled": self.embed(params, batch["image"])}

    def forward_flops(self, batch):
        return 2.0 * np.prod(batch["image"].shape[1:]) * self.width
