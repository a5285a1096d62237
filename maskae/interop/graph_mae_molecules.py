"""The molecule part of GraphMAE's reference cases."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskae.errors import UserError, check_choice
from maskae.interop.case import Case, Reproduced, exact
from maskae.interop.graph_mae_layout import MOLECULES, gradient_outputs, load_variables, official_names
from maskae.nn.graph_batch import add_self_loops, pool_nodes
from maskae.nn.graph_layers import Graph
from maskae.systems.graph_mae_molecules import ATOM_TYPES, SELF_LOOP, GraphMaeMolecules

# With others it ends in an error, before or in the first step.
RUNNING = {"JK": "last", "gnn_type": "gin", "mask_edge": 0, "num_node_attr": ATOM_TYPES}
LOSS_NAMES = {"sce": "scaled_cosine", "ce": "cross_entropy"}


def replay_molecules(case: Case, part: str) -> dict[str, Reproduced]:
    """Masking, encoder, decoder, loss and gradients, and the evaluated encoder with its fine-tuning head where there is one.

    Raises UserError for options with which the released code does not pretrain.
    """
    options = case.record["config"][part]
    for name, runs in RUNNING.items():
        if options.get(name, runs) != runs:
            raise UserError(f"{name}={options[name]}: the released code pretrains with {name}={runs} alone")
    check_choice("loss_fn", options["loss_fn"], LOSS_NAMES)
    inputs = {name.removeprefix(f"{part}/"): jnp.asarray(value) for name, value in case.inputs.items() if name.startswith(f"{part}/")}
    weights = {name.removeprefix(f"{part}/"): value for name, value in case.weights.items() if name.startswith(f"{part}/")}
    system = GraphMaeMolecules(
        width=options["emb_dim"],
        depth=options["num_layer"],
        mask_rate=options["mask_rate"],
        loss_name=LOSS_NAMES[options["loss_fn"]],
        exponent=options["alpha_l"],
        dropout=options["drop_ratio"],
        pool=options["graph_pooling"],
    )
    variables = load_variables(weights, jax.eval_shape(lambda: system.init(jax.random.key(0), {})), MOLECULES)
    atoms, edges = inputs["x"], inputs["edge_index"]
    count = len(atoms)
    graph = add_self_loops(Graph(edges[0], edges[1], jnp.ones(edges.shape[1], bool), jnp.ones(count, bool)))
    bonds = jnp.concatenate([inputs["edge_attr"], jnp.tile(jnp.asarray([[SELF_LOOP, 0]]), (count, 1))])
    rows = inputs["masked_atom_indices"]
    masked = jnp.zeros(count, bool).at[rows].set(True)

    @jax.jit
    def loss(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        named, _ = system.predict(params, variables.state, atoms, masked, graph, bonds)
        return system.error(named["pred"], atoms[:, 0], masked), named

    (value, named), gradient = jax.value_and_grad(loss, has_aux=True)(variables.params)
    evaluated, _ = system.encode(*variables, atoms, graph, bonds, None, False)
    found = {
        "masked_x": exact(named["masked_x"]),
        "node_rep": Reproduced(named["node_rep"]),
        "target": exact(jax.nn.one_hot(atoms[rows, 0], ATOM_TYPES)),
        "pred": Reproduced(named["pred"][rows]),
        "loss": Reproduced(value),
        "eval_node_rep": Reproduced(evaluated),
    }
    if "model/graph_pred_linear.weight" in weights:
        weight, bias = (jnp.asarray(weights[f"model/graph_pred_linear.{name}"], float) for name in ("weight", "bias"))
        pooled = pool_nodes(*padded_rows(evaluated, np.asarray(inputs["batch"])), system.pool)
        found["graph_logits"] = Reproduced(pooled @ weight.T + bias)
    # The released decoder has a token that nothing reads.
    unused = {name: np.zeros_like(weights[name]) for name in ("decoder/dec_token",) if name in weights}
    gradients = gradient_outputs(part, official_names(gradient, MOLECULES) | unused, case.outputs)
    return {f"{part}/{name}": output for name, output in found.items()} | gradients


def padded_rows(rows: jax.Array, owner: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Nodes [N, D] of several graphs as [B, n, D] with zeros, and their mask [B, n]."""
    counts = np.bincount(owner)
    node_mask = np.arange(np.max(counts)) < counts[:, None]
    return jnp.zeros((*node_mask.shape, rows.shape[-1])).at[np.nonzero(node_mask)].set(rows), jnp.asarray(node_mask)
