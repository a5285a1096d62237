"""A plain autoencoder: a multilayer perceptron to a narrow code and its mirror back, trained on the squared error.

The first stage of clustering systems (Bo et al., "Structural Deep Clustering Network", WWW 2020: hidden layers 500, 500, 2000, code 10,
ReLU, a linear code and a linear output), and with `noise` a denoising autoencoder (Vincent et al., ICML 2008) of any records.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice, nearest
from maskae.losses.denoising import standard_noise
from maskae.nn.graph_layers import ACTIVATIONS
from maskae.nn.mlp import Mlp, mlp_flops
from maskae.systems.contract import Batch, Outputs, Params, State, Variables


@dataclass(frozen=True)
class Autoencoder:
    """Arguments with the values of SDCN's script. A record is one vector: whatever its field holds, flattened.

    Args:
        hidden: widths of the encoder's hidden layers; the decoder has them in reverse.
        latent: width of the code.
        activation: behind every layer but the code and the output.
        field: of the records, such as "nodes" or "image".
        noise: standard deviation of Gaussian noise on the input, in its units; the target has none.

    Raises:
        UserError: where a width is below 1, the activation is unknown, or the noise negative.
    """

    hidden: tuple[int, ...] = (500, 500, 2000)
    latent: int = 10
    activation: str = "relu"
    field: str = "nodes"
    noise: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        # A config's tuple may come back from JSON as a list, which cannot be hashed.
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if self.latent < 1 or any(width < 1 for width in self.hidden):
            raise UserError(f"hidden={self.hidden}, latent={self.latent}: widths must be at least 1")
        check_choice("activation", self.activation, ACTIVATIONS)
        if self.noise < 0:
            raise UserError(f"noise={self.noise}: it must not be negative")

    def widths(self, features: int) -> dict[str, tuple[int, ...]]:
        """Widths of the layers of both halves for `features` values per record."""
        return {"encoder": (*self.hidden, self.latent), "decoder": (*self.hidden[::-1], features)}

    def inputs(self, batch: Batch) -> jax.Array:
        """Records as vectors, float32 [B, D]."""
        if self.field not in batch:
            raise UserError(f"the records have no field '{self.field}'{nearest(self.field, batch)}; there are {', '.join(sorted(batch))}")
        return batch[self.field].reshape(batch[self.field].shape[0], -1).astype(jnp.float32)

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Both halves from torch's default start."""
        features = self.inputs(batch).shape[-1]
        return Variables(self.init_params(rng, features), {})

    def init_params(self, rng: jax.Array, features: int) -> Params:
        """`encoder` and `decoder` for `features` values per record."""
        inputs = {"encoder": features, "decoder": self.latent}
        params: Params = {}
        for number, (name, widths) in enumerate(self.widths(features).items()):
            module = Mlp(widths, self.activation)
            params[name] = module.init(jax.random.fold_in(rng, number), jnp.zeros((1, inputs[name])))["params"]
        return params

    def hidden_layers(self, params: Params, part: str, x: jax.Array) -> list[jax.Array]:
        """The outputs of every layer of the `encoder` or the `decoder`, for rows [N, D] or codes [N, latent]."""
        kernels = params[part]
        widths = tuple(kernels[f"layer_{number}"]["bias"].shape[-1] for number in range(len(self.hidden) + 1))
        layers: Any = Mlp(widths, self.activation).apply({"params": kernels}, x, True)
        return layers

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """Rows [N, D] -> codes [N, latent]."""
        return self.hidden_layers(params, "encoder", x)[-1]

    def decode(self, params: Params, codes: jax.Array) -> jax.Array:
        """Codes [N, latent] -> rows [N, D]."""
        return self.hidden_layers(params, "decoder", codes)[-1]

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Mean squared error over all values of all records."""
        x = self.inputs(batch)
        seen = x
        if self.noise:
            seen = x + self.noise * standard_noise(rng, batch["example"], x.shape[1:])
        return jnp.square(self.decode(params, self.encode(params, seen)) - x).mean(), Outputs({}, state)

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """The code of every record as `pooled` [B, latent]."""
        return {"pooled": self.encode(params, self.inputs(batch))}

    def raw_features(self, batch: Batch) -> dict[str, jax.Array]:
        """The input itself, [B, D]."""
        return {"pooled": self.inputs(batch)}

    def forward_flops(self, batch: Batch) -> float:
        """All linear maps, per record."""
        features = math.prod(batch[self.field].shape[1:])
        widths = self.widths(features)
        return mlp_flops(1, features, widths["encoder"]) + mlp_flops(1, self.latent, widths["decoder"])
