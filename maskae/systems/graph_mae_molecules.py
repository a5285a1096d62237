"""GraphMAE on molecules: Hou et al., KDD 2022, arXiv 2205.10803, section 4.3 and the released code's `chem` part.

A quarter of each molecule's atoms lose their type; five GIN layers over atoms and bonds encode the rest, and after re-masking one more such
layer predicts the types of the masked atoms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from maskae.errors import UserError, check_choice
from maskae.losses.reconstruction import scaled_cosine_error
from maskae.nn.flops import linear_flops
from maskae.nn.graph_batch import POOLS, flatten_graphs, pool_nodes
from maskae.nn.graph_layers import Activation, Graph, TorchLinear, dropout, fold, node_norm
from maskae.nn.layers import xavier
from maskae.nn.node_masks import truncated_counts
from maskae.systems.contract import Batch, Outputs, Params, State, Variables

ATOM_TYPES = 119  # the mask is one more
CHIRALITIES = 3
LOSSES = ("scaled_cosine", "cross_entropy")
BOND_TYPES, BOND_DIRECTIONS = 6, 3
SELF_LOOP = 4  # the bond type of self-loops


class MoleculeLayer(nn.Module):
    """fc2(relu(fc1(sum_j x_j + bond_ij))) over incoming bonds and a self-loop; the bond is the sum of two embeddings."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, graph: Graph, bonds: jax.Array) -> jax.Array:
        """[N, in], bonds int32 [E, 2] (type, direction) -> [N, width]."""
        inputs = x.shape[-1]
        kinds = self.param("bond_type", xavier, (BOND_TYPES, inputs))
        directions = self.param("bond_direction", xavier, (BOND_DIRECTIONS, inputs))
        messages = x[graph.senders] + kinds[bonds[:, 0]] + directions[bonds[:, 1]]  # [E, in]
        messages = jnp.where(graph.edge_valid[:, None], messages, 0)
        total = jax.ops.segment_sum(messages, graph.receivers, x.shape[0])
        return TorchLinear(self.width, name="fc2")(jax.nn.relu(TorchLinear(2 * inputs, name="fc1")(total)))


class MoleculeEncoder(nn.Module):
    """Embeddings of atom type and chirality, then layers with batch norm, ReLU between them, and dropout after each."""

    width: int
    depth: int
    dropout: float

    @nn.compact
    def __call__(self, atoms: jax.Array, graph: Graph, bonds: jax.Array, key: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Atoms int32 [N, 2] (type, chirality), bonds int32 [E, 2] -> [N, width]."""
        kinds = self.param("atom_type", xavier, (ATOM_TYPES + 1, self.width))
        chiralities = self.param("chirality", xavier, (CHIRALITIES, self.width))
        x = kinds[atoms[:, 0]] + chiralities[atoms[:, 1]]  # [N, width]
        for number in range(self.depth):
            x = MoleculeLayer(self.width, name=f"layer_{number}")(x, graph, bonds)
            x = node_norm("batch", f"norm_{number}", x, graph.node_valid, train)
            x = dropout(x if number == self.depth - 1 else jax.nn.relu(x), self.dropout, fold(key, number))
        return x


class MoleculeDecoder(nn.Module):
    """PReLU, a bias-free linear map, re-masking, and one layer that predicts the atom types."""

    @nn.compact
    def __call__(self, x: jax.Array, masked: jax.Array, graph: Graph, bonds: jax.Array) -> jax.Array:
        """[N, width], masked bool [N] -> [N, 119]."""
        x = TorchLinear(x.shape[-1], use_bias=False, name="bridge")(Activation(name="activation")(x))
        return MoleculeLayer(ATOM_TYPES, name="layer")(jnp.where(masked[:, None], 0, x), graph, bonds)


@dataclass(frozen=True)
class GraphMaeMolecules:
    """Arguments with the paper's values for ZINC.

    Batches have `atoms` int32 [B, N, 2] (atomic number - 1, chirality tag), `bonds` int32 [B, E, 2] (type, direction), `senders`,
    `receivers`, `node_mask` and `edge_mask` as all graphs (`maskae.nn.graph_batch`).

    Args:
        width, depth, dropout: of the encoder.
        mask_rate: share of each molecule's atoms that lose their type; one more atom does.
        loss_name: "scaled_cosine" with its `exponent`, or "cross_entropy" over the atom types.
        pool: what `features` calls pooled, over the atoms of each molecule.

    Raises:
        UserError: unknown pool or loss, or a mask rate that is no share.
    """

    width: int = 300
    depth: int = 5
    mask_rate: float = 0.25
    loss_name: str = "scaled_cosine"
    exponent: float = 1.0
    dropout: float = 0.0
    pool: str = "mean"

    # Batch statistics: microbatches would change the loss.
    couples_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        check_choice("pool", self.pool, POOLS)
        check_choice("loss_name", self.loss_name, LOSSES)
        if not 0 < self.mask_rate < 1:
            raise UserError(f"mask_rate={self.mask_rate}: it must lie between 0 and 1")

    @property
    def encoder(self) -> MoleculeEncoder:
        """The part that stays."""
        return MoleculeEncoder(self.width, self.depth, self.dropout)

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh variables; the batch is not read."""
        encoder_key, decoder_key = jax.random.split(rng)
        pair, edge, node = jnp.zeros((1, 2), jnp.int32), jnp.zeros(1, jnp.int32), jnp.ones(1, bool)
        graph = Graph(edge, edge, node, node)
        encoder = self.encoder.init(encoder_key, pair, graph, pair)
        decoder = MoleculeDecoder().init(decoder_key, jnp.zeros((1, self.width)), node, graph, pair)
        return Variables({"encoder": encoder["params"], "decoder": decoder["params"]}, {"batch_stats": {"encoder": encoder["batch_stats"]}})

    def encode(
        self, params: Params, state: State, atoms: jax.Array, graph: Graph, bonds: jax.Array, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, State]:
        """Atoms of a disjoint graph -> [N, width], and the state with its moved batch statistics."""
        variables = {"params": params["encoder"], "batch_stats": state["batch_stats"]["encoder"]}
        encode: Any = self.encoder.apply
        encoded, moved = encode(variables, atoms, graph, bonds, key, train, mutable=["batch_stats"])
        return encoded, {"batch_stats": {"encoder": moved["batch_stats"]}}

    def predict(
        self,
        params: Params,
        state: State,
        atoms: jax.Array,
        masked: jax.Array,
        graph: Graph,
        bonds: jax.Array,
        key: jax.Array | None = None,
    ) -> tuple[dict[str, jax.Array], State]:
        """What training computes from atoms int32 [N, 2] masked at bool [N]: `masked_x`, `node_rep`, `pred` of all atoms; and the state."""
        hidden = jnp.where(masked[:, None], jnp.asarray([ATOM_TYPES, 0]), atoms)  # [N, 2]
        encoded, state = self.encode(params, state, hidden, graph, bonds, key, True)
        decode: Any = MoleculeDecoder().apply
        prediction = decode({"params": params["decoder"]}, encoded, masked, graph, bonds)
        return {"masked_x": hidden, "node_rep": encoded, "pred": prediction}, state

    def error(self, prediction: jax.Array, kinds: jax.Array, masked: jax.Array) -> jax.Array:
        """Mean error of masked atoms: predictions (logits for the cross-entropy) [N, 119], types int32 [N], masked bool [N]."""
        if self.loss_name == "cross_entropy":
            errors = optax.softmax_cross_entropy_with_integer_labels(prediction, kinds)
        else:
            errors = scaled_cosine_error(prediction, jax.nn.one_hot(kinds, ATOM_TYPES), self.exponent)
        return jnp.where(masked, errors, 0).sum() / jnp.maximum(masked.sum(), 1)

    def draw_mask(self, key: jax.Array, batch: Batch) -> jax.Array:
        """int(rate * n + 1) of the n atoms of each molecule, bool [B, N]."""
        room = batch["node_mask"].shape[1]
        draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (room,)))(batch["example"])
        place = jnp.argsort(jnp.argsort(jnp.where(batch["node_mask"], draws, jnp.inf), axis=1), axis=1)
        counts = jnp.asarray(truncated_counts(self.mask_rate, room, 1.0))[batch["node_mask"].sum(1)]
        return (place < counts[:, None]) & batch["node_mask"]

    def flatten(self, batch: Batch) -> tuple[jax.Array, Graph, jax.Array]:
        """Atoms [B * N, 2], their disjoint graph with self-loops, and its bonds [B * E + B * N, 2]."""
        atoms = batch["atoms"].reshape(-1, 2)
        loops = jnp.zeros_like(atoms).at[:, 0].set(SELF_LOOP)
        graph = flatten_graphs({name: batch[name] for name in ("senders", "receivers", "node_mask", "edge_mask")})
        return atoms, graph, jnp.concatenate([batch["bonds"].reshape(-1, 2), loops])

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Mean error over the masked atoms of all molecules."""
        mask_key, drop_key = jax.random.split(rng)
        atoms, graph, bonds = self.flatten(batch)
        masked = self.draw_mask(mask_key, batch).reshape(-1)
        named, state = self.predict(params, state, atoms, masked, graph, bonds, drop_key)
        right = jnp.where(masked, named["pred"].argmax(-1) == atoms[:, 0], False).sum() / jnp.maximum(masked.sum(), 1)
        return self.error(named["pred"], atoms[:, 0], masked), Outputs({"accuracy": right}, state)

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """Encoded unmasked atoms `tokens` [B, N, width] (zeros at padding) and `pooled` [B, width]."""
        atoms, graph, bonds = self.flatten(batch)
        encoded, _ = self.encode(params, state, atoms, graph, bonds, None, False)
        tokens = jnp.where(graph.node_valid[:, None], encoded, 0).reshape(*batch["node_mask"].shape, -1)
        return {"pooled": pool_nodes(tokens, batch["node_mask"], self.pool), "tokens": tokens}

    def forward_flops(self, batch: Batch) -> float:
        """The linear maps over all atoms of a molecule, padding included."""
        nodes = batch["node_mask"].shape[1]
        layer = linear_flops(nodes, self.width, 2 * self.width)
        decoder = linear_flops(nodes, self.width, self.width) + layer + linear_flops(nodes, 2 * self.width, ATOM_TYPES)
        return self.depth * (layer + linear_flops(nodes, 2 * self.width, self.width)) + decoder
