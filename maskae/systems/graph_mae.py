"""GraphMAE: "Self-Supervised Masked Graph Autoencoders", Hou et al., KDD 2022, arXiv 2205.10803.

The features of half of the nodes are replaced by a token (or by another node's); a graph network encodes what is left. Masked nodes' codes
are set to zero again, and a one-layer decoder has to predict their features from their neighbours' codes, up to a scaled cosine error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from maskae.data.spec import DataSpec
from maskae.errors import UserError, check_choice, check_heads
from maskae.losses.reconstruction import scaled_cosine_error
from maskae.nn.flops import linear_flops
from maskae.nn.graph_batch import POOLS, Nodes, drop_edges, flatten_graphs, pool_nodes, row_shares, unpack_nodes, with_packing
from maskae.nn.graph_layers import ACTIVATIONS, NORMS, GatLayer, GinLayer, Graph, GraphEncoder, MlpDecoder, TorchLinear, fold
from maskae.nn.node_masks import NodeMask, corrupt, draw_node_mask
from maskae.nn.sparse_nodes import MaskedWords
from maskae.plots import draw_embedding
from maskae.systems.contract import Batch, Outputs, Params, State, Variables

ENCODERS = ("gat", "gin")
DECODERS = ("gat", "gin", "mlp", "linear")
LOSSES = ("scaled_cosine", "mse")
DRAWS = 3  # per node and step: who is masked, who of them is noise, whose features noise is
CARRIED = ("node_label", "train_mask", "val_mask", "test_mask")


@dataclass(frozen=True)
class GraphMae:
    """Arguments with the values of the paper's Cora recipe. The width of the node features is that of the batch.

    Args:
        encoder, decoder: "gat" or "gin"; the decoder also "mlp" or "linear", which are never re-masked.
        depth: layers of the encoder; the decoder has one.
        norm: of the graph layers, "none", "batch" or "layer".
        replace_rate: share of the masked nodes that get another node's features in place of the token.
        edge_drop_rate: share of edges that the encoder does not see in a step.
        exponent: of the scaled cosine error.
        remask: set masked nodes' codes to zero before the decoder (the method); False is the paper's ablation.
        concat_hidden: decode from the outputs of all layers side by side.
        normalise_rows: divide each node's features by their sum, as the citation sets are used; one-hot rows stay as they are.
        pool: what `features` calls pooled, over the nodes of each graph.
        node_budget, edge_budget: computed on where a batch's real nodes and edges (with self-loops) fit in; 0 computes on padding too.

    Raises:
        UserError: where a name is unknown or the heads do not divide the width.
    """

    width: int = 512
    depth: int = 2
    heads: int = 4
    encoder: str = "gat"
    decoder: str = "gat"
    activation: str = "prelu"
    norm: str = "none"
    residual: bool = False
    input_dropout: float = 0.2
    attention_dropout: float = 0.1
    negative_slope: float = 0.2
    mask_rate: float = 0.5
    replace_rate: float = 0.05
    edge_drop_rate: float = 0.0
    loss_name: str = "scaled_cosine"
    exponent: float = 3.0
    remask: bool = True
    concat_hidden: bool = False
    normalise_rows: bool = True
    pool: str = "mean"
    node_budget: int = 0
    edge_budget: int = 0

    # Masks are drawn over all nodes of a batch, and norms may take their statistics from it.
    couples_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        choices = {"encoder": ENCODERS, "decoder": DECODERS, "activation": ACTIVATIONS, "norm": NORMS, "loss_name": LOSSES, "pool": POOLS}
        for name, known in choices.items():
            check_choice(name, getattr(self, name), known)
        if self.encoder == "gat":
            check_heads("width", self.width, self.heads)
        for name in ("mask_rate", "replace_rate", "edge_drop_rate"):
            if not 0 <= getattr(self, name) < 1 or (name == "mask_rate" and self.mask_rate == 0):
                raise UserError(f"{name}={getattr(self, name)}: it must lie between 0 and 1")

    def modules(self, features: int) -> dict[str, nn.Module]:
        """The three networks for `features` values per node."""
        encoder = GraphEncoder(
            self.encoder,
            self.width,
            self.depth,
            self.heads,
            self.input_dropout,
            self.attention_dropout,
            self.negative_slope,
            self.residual,
            self.norm,
            self.activation,
        )
        decoders: dict[str, nn.Module] = {
            "gat": GatLayer(1, features, self.input_dropout, self.attention_dropout, self.negative_slope),
            "gin": GinLayer(self.width, features, self.input_dropout, norm=self.norm, activation=self.activation, outer=False),
            "mlp": MlpDecoder(self.width, features),
            "linear": TorchLinear(features),
        }
        return {"encoder": encoder, "encoder_to_decoder": TorchLinear(self.width, use_bias=False), "decoder": decoders[self.decoder]}

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh variables for the batch's number of features; the mask token starts as zeros."""
        features = batch["nodes"].shape[-1]
        edge, node = jnp.zeros(1, jnp.int32), jnp.ones(1, bool)
        graph = Graph(edge, edge, node, node)
        wide = self.width * (self.depth if self.concat_hidden else 1)
        inputs = {"encoder": jnp.zeros((1, features)), "encoder_to_decoder": jnp.zeros((1, wide)), "decoder": jnp.zeros((1, self.width))}
        params: Params = {"mask_token": jnp.zeros((1, features))}
        statistics: State = {}
        for number, (name, module) in enumerate(self.modules(features).items()):
            graphs = (graph,) if isinstance(module, (GraphEncoder, GatLayer, GinLayer)) else ()
            made = module.init(jax.random.fold_in(rng, number), inputs[name], *graphs)
            params[name] = made["params"]
            statistics |= {name: made["batch_stats"]} if "batch_stats" in made else {}
        return Variables(params, {"batch_stats": statistics} if statistics else {})

    def apply(self, name: str, params: Params, state: State, x: jax.Array | MaskedWords, *inputs: Any, **options: Any) -> tuple[Any, State]:
        """One of `modules` on nodes [N, ...], and the state with its moved batch statistics."""
        module = self.modules(params["mask_token"].shape[-1])[name]
        statistics = state.get("batch_stats", {})
        variables = {"params": params[name]} | ({"batch_stats": statistics[name]} if name in statistics else {})
        out, moved = module.apply(variables, x, *inputs, mutable=["batch_stats"], **options)
        return out, {"batch_stats": statistics | {name: moved["batch_stats"]}} if moved.get("batch_stats") else state

    def encode(
        self, params: Params, state: State, x: jax.Array | MaskedWords, graph: Graph, key: jax.Array | None = None, train: bool = False
    ) -> tuple[list[jax.Array], State]:
        """Node features [N, D] -> the output [N, width] of every layer, and the state."""
        return self.apply("encoder", params, state, x, graph, key, train)

    def decode(
        self,
        params: Params,
        state: State,
        hidden: list[jax.Array],
        graph: Graph,
        mask: NodeMask,
        key: jax.Array | None = None,
        rows: jax.Array | None = None,
    ) -> tuple[dict[str, jax.Array], State]:
        """Training outputs: the re-masked codes `remasked` [N, width] and the reconstruction `recon` [N, D], of the nodes `rows` alone."""
        code = jnp.concatenate(hidden, -1) if self.concat_hidden else hidden[-1]
        code, state = self.apply("encoder_to_decoder", params, state, code)  # [N, width]
        if self.decoder in ENCODERS:
            code = jnp.where(mask.masked[:, None], 0, code) if self.remask else code
            recon, state = self.apply("decoder", params, state, code, graph, key, True, rows)
        else:
            inputs = code if rows is None else code[rows]
            recon, state = self.apply("decoder", params, state, inputs, *((key,) if self.decoder == "mlp" else ()))
        return {"remasked": code, "recon": recon}, state

    def error(self, recon: jax.Array, target: jax.Array, counted: jax.Array) -> jax.Array:
        """Mean error over the counted rows of [m, D] twice; float32 scalar."""
        errors = jnp.square(recon - target).mean(-1) if self.loss_name == "mse" else scaled_cosine_error(recon, target, self.exponent)
        return jnp.where(counted, errors, 0).sum() / jnp.maximum(counted.sum(), 1)

    def loss_given_mask(
        self, params: Params, state: State, graph: Graph, x: jax.Array, mask: NodeMask, key: jax.Array | None
    ) -> tuple[jax.Array, State]:
        """The loss of one disjoint graph with features [N, D], and the state; `key` draws edges and dropout, None drops nothing."""
        seen = graph
        if key is not None and self.edge_drop_rate > 0:
            draws = jax.random.uniform(jax.random.fold_in(key, 2), graph.edge_valid.shape)
            seen = drop_edges(graph, draws, self.edge_drop_rate)
        corrupted: jax.Array | MaskedWords
        if graph.words is None or self.encoder != "gat" or self.residual:
            corrupted = corrupt(x, mask, params["mask_token"])
        else:
            corrupted = MaskedWords(x, mask, params["mask_token"], graph.words)
        hidden, state = self.encode(params, state, corrupted, seen, fold(key, 0), train=True)
        named, state = self.decode(params, state, hidden, graph, mask, fold(key, 1), mask.nodes)
        return self.error(named["recon"], x[mask.nodes], mask.counted), state

    def inputs(self, batch: Batch) -> jax.Array:
        """Node features of all graphs, float32 [B * N, D]."""
        x = batch["nodes"].astype(jnp.float32)
        return (row_shares(x) if self.normalise_rows else x).reshape(-1, x.shape[-1])

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Mean error of the masked nodes of all graphs. A `scaled_cosine` loss near 1 has learned nothing."""
        (mask_key, drop_key), shape = jax.random.split(rng), (batch["nodes"].shape[1], DRAWS)
        draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(mask_key, i), shape))(batch["example"])  # [B, N, draws]

        def on_graph(graph: Graph, nodes: Nodes) -> tuple[jax.Array, State]:
            mask = draw_node_mask(nodes.draws, graph.node_valid, self.mask_rate, self.replace_rate)
            return self.loss_given_mask(params, state, graph, nodes.features, mask, drop_key)

        nodes = Nodes(self.inputs(batch), draws.reshape(-1, DRAWS))
        loss, state = with_packing(on_graph, flatten_graphs(batch), nodes, (self.node_budget, self.edge_budget))
        return loss, Outputs({}, state)

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """Last-layer outputs of the unmasked graphs: `tokens` [B, N, width] (zeros at padding) and `pooled` [B, width]; labels and splits
        of nodes go along where the batch has them."""
        graph, shape = flatten_graphs(batch), batch["node_mask"].shape
        nodes = Nodes(self.inputs(batch), jnp.zeros((graph.node_valid.shape[0], 0)))

        def on_graph(graph: Graph, nodes: Nodes) -> jax.Array:
            return self.encode(params, state, nodes.features, graph)[0][-1]

        budgets = (self.node_budget, self.edge_budget)
        tokens = with_packing(on_graph, graph, nodes, budgets, lambda rows: unpack_nodes(rows, graph.node_valid))  # [B * N, width]
        tokens = jnp.where(graph.node_valid[:, None], tokens, 0).reshape(*shape, -1)
        pooled = pool_nodes(tokens, batch["node_mask"], self.pool)
        return {"pooled": pooled, "tokens": tokens} | {name: batch[name] for name in CARRIED if name in batch}

    def raw_features(self, batch: Batch) -> dict[str, jax.Array]:
        """The node features themselves, pooled over each graph: what an encoder must beat."""
        nodes = jnp.where(batch["node_mask"][..., None], self.inputs(batch).reshape(batch["nodes"].shape), 0)
        return {"pooled": pool_nodes(nodes, batch["node_mask"], self.pool)}

    def draw(self, params: Params, state: State, batch: Batch, rng: jax.Array, spec: DataSpec) -> dict[str, np.ndarray]:
        """A map of what is classified, coloured by class: the nodes where they have labels, else the graphs of the batch."""
        found = {name: np.asarray(value) for name, value in jax.jit(self.features)(params, state, batch).items()}
        if "node_label" in found:
            real = np.asarray(batch["node_mask"])
            return {"classes": draw_embedding(found["tokens"][real], found["node_label"][real], title="nodes by class")}
        kept = np.asarray(batch["valid"]) if "valid" in batch else np.ones(len(found["pooled"]), bool)
        if kept.sum() < 2:
            return {}
        labels = np.asarray(batch["label"])[kept]
        return {"classes": draw_embedding(found["pooled"][kept], labels, title="graphs by class", names=spec.class_names)}

    def forward_flops(self, batch: Batch) -> float:
        """Linear maps over all nodes; the decoder's last one over the masked nodes alone where that gives the same loss."""
        nodes, features = batch["nodes"].shape[1:]
        masked = int(self.mask_rate * nodes)
        layers = linear_flops(nodes, features, self.width) + (self.depth - 1) * linear_flops(nodes, self.width, self.width)
        layers += self.depth * linear_flops(nodes, self.width, self.width) if self.encoder == "gin" else 0.0
        bridge = linear_flops(nodes, self.width * (self.depth if self.concat_hidden else 1), self.width)
        if self.decoder in ("gin", "mlp"):
            rows = nodes if self.decoder == "gin" else masked
            return layers + bridge + linear_flops(rows, self.width, self.width) + linear_flops(rows, self.width, features)
        rows = masked if self.decoder == "linear" or self.width < features else nodes
        return layers + bridge + linear_flops(rows, self.width, features)
