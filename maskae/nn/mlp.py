"""A plain multilayer perceptron: linear maps with an activation between them and none behind the last."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from maskae.nn.flops import linear_flops
from maskae.nn.graph_layers import Activation, TorchLinear


class Mlp(nn.Module):
    """x -> [..., widths[-1]] through `layer_{i}/{kernel, bias}`, from torch's default start.

    With `keras` it is Keras' start, Glorot's for kernels and 0 for biases. With `keep_hidden` the outputs of
    all layers come, each after its activation.
    """

    widths: Sequence[int]
    activation: str = "relu"
    keras: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, keep_hidden: bool = False) -> jax.Array | list[jax.Array]:
        """[..., in] -> [..., widths[-1]], or the list of every layer's output."""
        hidden = []
        for number, width in enumerate(self.widths):
            name = f"layer_{number}"
            start = nn.initializers.glorot_uniform()
            x = (nn.Dense(width, kernel_init=start, name=name) if self.keras else TorchLinear(width, name=name))(x)
            if number < len(self.widths) - 1:
                x = Activation(self.activation, name=f"activation_{number}")(x)
            hidden.append(x)
        return hidden if keep_hidden else x


def mlp_flops(rows: int, inputs: int, widths: Sequence[int]) -> float:
    """Of one forward pass over `rows` rows, 2 per multiply-add."""
    return sum(linear_flops(rows, before, after) for before, after in zip((inputs, *widths), widths, strict=False))
