"""Graph neural network layers over one disjoint graph: graph attention (GAT), graph isomorphism (GIN), and their norms and activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice
from maskae.nn.batch_norm import BatchNorm
from maskae.nn.graphs import Neighbours, aggregate_neighbours, segment_softmax
from maskae.nn.layers import LayerNorm, gelu, uniform_fan_in
from maskae.nn.sparse_nodes import MaskedWords, Words

ACTIVATIONS = ("prelu", "relu", "gelu", "elu", "tanh", "none")
NORMS = ("none", "batch", "layer")
NORM_EPSILON = 1e-5
PRELU_SLOPE = 0.25
RANDOM_VALUES = 2**16

# Xavier normal with gain sqrt(2), as GraphMAE's released code initialises every map of a GAT layer.
relu_xavier_normal = nn.initializers.variance_scaling(2.0, "fan_avg", "normal")


class Graph(NamedTuple):
    """A disjoint graph of N nodes and E edges; padding nodes and edges are not valid, and a padding edge may name any node.

    `neighbours` are the tables of the same edges where the graph is symmetric and they were made (`maskae.nn.graphs.neighbour_tables`):
    sums then need no scatter. `words` are the places of the node features that are not zero, where few are.
    """

    senders: jax.Array  # int32 [E]
    receivers: jax.Array  # int32 [E]
    edge_valid: jax.Array  # bool [E]
    node_valid: jax.Array  # bool [N]
    neighbours: Neighbours | None = None
    words: Words | None = None


def attention_weights(logits: jax.Array, graph: Graph) -> jax.Array:
    """Softmax of logits [E, H] over the incoming edges of every node; 0 at padding edges."""
    return segment_softmax(logits, graph.receivers, graph.node_valid.shape[0], graph.edge_valid)


def sum_neighbours(values: jax.Array, graph: Graph, weights: jax.Array | None = None) -> jax.Array:
    """Sum over incoming edges of `weights` [E, H] (None: 1) times `values` [N, H, D] of the sender -> [N, H, D]."""
    if weights is None:
        weights = jnp.ones((graph.senders.shape[0], values.shape[1]), values.dtype)
    if graph.neighbours is not None:
        return aggregate_neighbours(values, weights, graph.neighbours)
    weights = jnp.where(graph.edge_valid[:, None], weights, 0)
    messages = weights[:, :, None] * values[graph.senders]  # [E, H, D]
    return jax.ops.segment_sum(messages, graph.receivers, values.shape[0])


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeros with probability `rate`, the rest divided by 1 - rate; `x` itself without a key (evaluation) or at rate 0.

    One draw for the whole array: the draw of an element depends on the key and its place alone. Of 32 random bits two elements are made,
    by the hardware-friendly generator: on a CPU the default one takes longer than the matrix product that follows.
    """
    if key is None or rate == 0:
        return x
    data = jax.random.key_data(key).reshape(-1)
    wide = jax.random.wrap_key_data(jnp.concatenate([data, data])[:4], impl="rbg")
    pairs = jax.random.bits(wide, (-(-x.size // 2),), jnp.uint32)
    draws = jax.lax.bitcast_convert_type(pairs, jnp.uint16).reshape(-1)[: x.size].reshape(x.shape)
    return jnp.where(draws < round((1 - rate) * RANDOM_VALUES), x / (1 - rate), 0)


def fold(key: jax.Array | None, number: int) -> jax.Array | None:
    """`fold_in` that leaves the absent key of an evaluation absent."""
    return None if key is None else jax.random.fold_in(key, number)


class Activation(nn.Module):
    """One of `ACTIVATIONS`; "prelu" has one learned `slope` [1] for the whole layer, 0.25 at first."""

    kind: str = "prelu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Any shape, unchanged."""
        if self.kind == "prelu":
            slope = self.param("slope", nn.initializers.constant(PRELU_SLOPE), (1,))
            return jnp.where(x >= 0, x, slope * x)
        plain: dict[str, Callable[[jax.Array], jax.Array]] = {
            "relu": jax.nn.relu,
            "gelu": gelu,
            "elu": jax.nn.elu,
            "tanh": jnp.tanh,
            "none": lambda x: x,
        }
        check_choice("activation", self.kind, ACTIVATIONS)
        return plain[self.kind](x)


def node_norm(kind: str, name: str, x: jax.Array, valid: jax.Array, train: bool) -> jax.Array:
    """Batch norm over the valid nodes (bool [N]), layer norm, or nothing, of nodes [N, D]; epsilon 1e-5 (torch's default).

    The output is in at least float32. Adds a submodule called `name` to the module that calls it. Raises UserError for a kind that is not
    in `NORMS`.
    """
    check_choice("norm", kind, NORMS)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if kind == "batch":
        return BatchNorm(epsilon=NORM_EPSILON, dtype=dtype, name=name)(x, valid, train=train)
    if kind == "layer":
        return LayerNorm(NORM_EPSILON, dtype=dtype, name=name)(x)
    return x


class GatLayer(nn.Module):
    """Graph attention (Velickovic et al., ICLR 2018) as in GraphMAE's code: heads side by side, then norm, then activation.

    Parameters: `kernel` [in, heads, width], `source` and `target` [heads, width], `bias` [heads * width]; with `residual` and another
    input width also `residual` [in, heads * width].

    Where one head widens its input (the decoder), neighbours are summed before the kernel is applied, which is the same by linearity:
    sum_j a_ij (h_j W) = (sum_j a_ij h_j) W, with logits h (W a).
    """

    heads: int
    width: int  # of one head
    input_dropout: float = 0.0
    attention_dropout: float = 0.0
    negative_slope: float = 0.2
    residual: bool = False
    norm: str = "none"
    activation: str = "none"

    @nn.compact
    def __call__(
        self, x: jax.Array | MaskedWords, graph: Graph, key: jax.Array | None = None, train: bool = False, rows: jax.Array | None = None
    ) -> jax.Array:
        """[N, in] -> [N, heads * width], or of the nodes `rows` int32 [m] alone [m, heads * width]. `key` None: no dropout.

        `MaskedWords` [N, in] are multiplied by the kernel first; a layer with `residual` refuses them (UserError).
        """
        inputs, shape = x.shape[-1], (self.heads, self.width)
        kernel = self.param("kernel", lambda key: relu_xavier_normal(key, (inputs, self.heads * self.width)).reshape(inputs, *shape))
        source, target = (self.param(name, _attention_init, shape) for name in ("source", "target"))
        bias = self.param("bias", nn.initializers.zeros, (self.heads * self.width,))
        narrow = not isinstance(x, MaskedWords) and self.heads == 1 and inputs < self.width
        if isinstance(x, MaskedWords):
            if self.residual:
                raise UserError("a layer with `residual` needs its input whole, not as MaskedWords")
            product = x.product(kernel.reshape(inputs, -1), lambda part, key: dropout(part, self.input_dropout, key), fold(key, 0))
            values = product.reshape(-1, *shape)  # [N, H, width]
            x = x.features
        else:
            x = dropout(x, self.input_dropout, fold(key, 0))
            values = x[:, None] if narrow else jnp.tensordot(x, kernel, 1)  # [N, 1, in] or [N, H, width]
        if narrow:
            left, right = (x @ (kernel * vector).sum(-1) for vector in (source, target))  # [N, 1]
        else:
            left, right = ((values * vector).sum(-1) for vector in (source, target))  # [N, H]
        logits = jax.nn.leaky_relu(left[graph.senders] + right[graph.receivers], self.negative_slope)  # [E, H]
        weights = attention_weights(logits, graph)
        self.sow("intermediates", "attention", weights)
        mixed = sum_neighbours(values, graph, dropout(weights, self.attention_dropout, fold(key, 1)))  # [N, H, width or in]
        mixed, valid, late = mixed.reshape(x.shape[0], -1), graph.node_valid, None
        if rows is not None and self.norm != "batch":
            mixed, x, valid = mixed[rows], x[rows], valid[rows]  # [m, ...]
        elif rows is not None:
            late = rows  # its statistics are those of all nodes
        out = (mixed @ kernel.reshape(inputs, -1) if narrow else mixed) + bias
        if self.residual:
            same = inputs == self.heads * self.width
            out = out + (x if same else x @ self.param("residual", relu_xavier_normal, (inputs, self.heads * self.width)))
        out = Activation(self.activation, name="activation")(node_norm(self.norm, "norm", out, valid, train))
        return out if late is None else out[late]


def _attention_init(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Torch counts [1, heads, width] as `heads * width` inputs and `width` outputs: std sqrt(2) * sqrt(2 / (width (heads + 1)))."""
    heads, width = shape
    return math.sqrt(2) * math.sqrt(2 / (width * (heads + 1))) * jax.random.normal(key, shape)


class TorchLinear(nn.Module):
    """x W + b with torch's default start, uniform within 1/sqrt(in) for both: `kernel` [in, width], `bias` [width]."""

    width: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., width]."""
        uniform = uniform_fan_in(x.shape[-1])
        out = x @ self.param("kernel", uniform, (x.shape[-1], self.width))
        return out + self.param("bias", uniform, (self.width,)) if self.use_bias else out


class GinLayer(nn.Module):
    """Graph isomorphism (Xu et al., ICLR 2019) with epsilon 0: fc2(act1(norm1(fc1(x_i + sum_j x_j)))), then norm2 and act2 if `outer`.

    `residual` adds the layer's (dropped) input, through a bias-free linear map `residual` [in, width] where the widths differ.
    """

    hidden: int
    width: int
    input_dropout: float = 0.0
    residual: bool = False
    norm: str = "batch"
    activation: str = "prelu"
    outer: bool = True

    @nn.compact
    def __call__(
        self, x: jax.Array, graph: Graph, key: jax.Array | None = None, train: bool = False, rows: jax.Array | None = None
    ) -> jax.Array:
        """[N, in] -> [N, width], or of the nodes `rows` int32 [m] alone [m, width]. `key` None: no dropout."""
        x = dropout(x, self.input_dropout, fold(key, 0))
        out = x + sum_neighbours(x[:, None], graph)[:, 0]  # [N, in]
        out = TorchLinear(self.hidden, name="fc1")(out)
        out = node_norm(self.norm, "norm1", out, graph.node_valid, train)
        out = Activation(self.activation, name="activation1")(out)
        out = TorchLinear(self.width, name="fc2")(out)
        if self.outer:
            out = node_norm(self.norm, "norm2", out, graph.node_valid, train)
            out = Activation(self.activation, name="activation2")(out)
        if self.residual:
            same = x.shape[-1] == self.width
            out = out + (x if same else TorchLinear(self.width, use_bias=False, name="residual")(x))
        return out if rows is None else out[rows]


class GraphEncoder(nn.Module):
    """`depth` layers of one kind, "gat" or "gin", each `width` wide; GAT splits the width over its heads.

    As in GraphMAE's released code a GAT of one layer ends without an activation, and a GIN without norms ends without norm and activation.
    """

    kind: str
    width: int
    depth: int
    heads: int
    input_dropout: float
    attention_dropout: float
    negative_slope: float
    residual: bool
    norm: str
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array | MaskedWords, graph: Graph, key: jax.Array | None = None, train: bool = False) -> list[jax.Array]:
        """[N, in] (`MaskedWords` for GAT alone) -> the output [N, width] of every layer."""
        outputs: list[jax.Array] = []
        for number in range(self.depth):
            shared: dict[str, Any] = {"residual": self.residual, "norm": self.norm, "name": f"layer_{number}"}
            if self.kind == "gat":
                activation = "none" if self.depth == 1 else self.activation
                rates = (self.input_dropout, self.attention_dropout, self.negative_slope)
                gat = GatLayer(self.heads, self.width // self.heads, *rates, activation=activation, **shared)
                x = gat(x, graph, fold(key, number), train)
            else:
                outer = number < self.depth - 1 or self.norm != "none"
                if isinstance(x, MaskedWords):
                    raise UserError("a GIN layer sums its inputs over neighbours and needs them whole, not as MaskedWords")
                gin = GinLayer(self.width, self.width, self.input_dropout, activation=self.activation, outer=outer, **shared)
                x = gin(x, graph, fold(key, number), train)
            outputs.append(x)
        return outputs


class MlpDecoder(nn.Module):
    """Linear map `fc1`, PReLU, dropout 0.2, linear map `fc2`, on each node by itself."""

    hidden: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[N, in] -> [N, width]."""
        x = Activation(name="activation")(TorchLinear(self.hidden, name="fc1")(x))
        return TorchLinear(self.width, name="fc2")(dropout(x, 0.2, key))
