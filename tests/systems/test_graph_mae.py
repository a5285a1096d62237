"""GraphMAE: what the card says has to hold of its loss, masks, layers and re-masking, and what padding and packing must not change."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.config import load_config
from maskae.data.spec import Field
from maskae.errors import UserError
from maskae.losses.reconstruction import scaled_cosine_error
from maskae.nn.graph_batch import add_self_loops, flatten_graphs, table_fields
from maskae.nn.graph_layers import GatLayer, Graph, attention_weights
from maskae.nn.node_masks import NodeMask, corrupt, draw_node_mask, mask_nodes
from maskae.run_sources import open_sources
from maskae.systems.contract import System
from maskae.systems.graph_mae import GraphMae
from maskae.systems.graph_mae_molecules import GraphMaeMolecules
from tests.systems.test_mae import dot_flops

NODES, FEATURES = 12, 7
SMALL: dict[str, Any] = {"width": 8, "heads": 2, "input_dropout": 0.0, "attention_dropout": 0.0, "replace_rate": 0.2}
GAT = GraphMae(**SMALL)
GIN = dataclasses.replace(GAT, encoder="gin", decoder="gin", norm="layer")


def make_batch(seed: int, graphs: int, edges: int = 20) -> dict[str, jax.Array]:
    """Symmetric random graphs of 12, 10, 8, ... nodes, with garbage wherever there is padding."""
    generator = np.random.default_rng(seed)
    counts = NODES - 2 * np.arange(graphs)[:, None]
    half = np.sort(generator.integers(0, counts[..., None], (graphs, edges, 2)), axis=-1)
    proper = half[..., 0] != half[..., 1]
    both = np.concatenate([half, half[..., ::-1]], axis=1)
    valid = np.concatenate([proper, proper], axis=1)
    ends = np.where(valid[..., None], both, generator.integers(0, NODES, both.shape))
    node_mask = np.arange(NODES) < counts
    nodes = np.where(node_mask[..., None], generator.random((graphs, NODES, FEATURES)), 100.0)
    batch = {"nodes": nodes.astype(np.float32), "senders": ends[..., 0], "receivers": ends[..., 1], "node_mask": node_mask}
    batch |= {"edge_mask": valid, "example": np.arange(graphs), "label": np.zeros(graphs, np.int32)}
    return {name: jnp.asarray(value) for name, value in batch.items()}


BATCH = make_batch(0, 3)
KEY = jax.random.key(4)


def filled(shapes: Any) -> Any:
    """Random arrays in the shapes of a tree, without running (and compiling) the initialisation; variances are positive."""
    generator = np.random.default_rng(9)
    return jax.tree.map(lambda leaf: jnp.asarray(np.abs(0.4 * generator.normal(size=leaf.shape)) + 0.05, leaf.dtype), shapes)


@functools.cache
def perturbed(system: Any) -> tuple[Any, Any]:
    """Variables in which no parameter has a special value."""
    params, state = jax.eval_shape(system.init, KEY, BATCH)
    generator = np.random.default_rng(8)
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * generator.normal(size=leaf.shape), leaf.dtype), params), filled(state)


@functools.cache
def jitted(system: Any, method: str) -> Any:
    """One compiled function per system for all tests."""
    if method == "loss":
        return jax.jit(lambda variables, batch: system.loss(*variables, batch, KEY, jnp.int32(0))[0])
    if method == "gradient":
        return jax.jit(jax.value_and_grad(lambda p, state, batch: system.loss(p, state, batch, KEY, jnp.int32(0)), has_aux=True))
    return jax.jit(lambda variables, batch: system.features(*variables, batch))


def loss_of(system: GraphMae, variables: tuple[Any, Any], batch: dict[str, jax.Array]) -> float:
    return float(jitted(system, "loss")(variables, batch))


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0])
def test_scaled_cosine_error_of_known_angles(exponent):
    x = jnp.asarray([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0], [1.0, -1.0, 2.0], [3.0, 1.0, 1.0]])
    y = jnp.asarray([[2.0, 4.0, 0.0], [0.0, 5.0, 0.0], [-2.0, 2.0, -4.0], [0.0, 0.0, 0.0]])
    error = scaled_cosine_error(x, y, exponent)
    np.testing.assert_allclose(error, [0.0, 1.0, 2.0**exponent, 1.0], atol=1e-6)
    np.testing.assert_allclose(scaled_cosine_error(7 * x, 0.3 * y, exponent), error, atol=1e-6)
    gradients = jax.jit(jax.grad(lambda x, y: scaled_cosine_error(x, y, exponent).sum(), (0, 1)))(x, y)
    assert all(bool(jnp.isfinite(gradient).all()) for gradient in gradients)
    np.testing.assert_array_equal(gradients[0][3], 0)


def test_scaled_cosine_error_of_exponent_one_is_half_the_distance_of_unit_vectors():
    x, y = jax.random.normal(KEY, (2, 5, 4))
    unit = [rows / jnp.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y)]
    np.testing.assert_allclose(scaled_cosine_error(x, y, 1.0), jnp.square(unit[0] - unit[1]).sum(1) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("nodes", "rates", "counts"),
    [(2708, (0.5, 0.05), (1354, 1286, 67)), (3327, (0.5, 0.1), (1663, 1496, 166)), (19717, (0.75, 0.0), (14787, 14787, 0))],
)
def test_counts_of_the_citation_sets(nodes, rates, counts):
    draws = jax.random.uniform(KEY, (nodes + 50, 3))
    valid = jnp.arange(nodes + 50) < nodes
    mask = jax.jit(lambda d, v: draw_node_mask(d, v, *rates))(draws, valid)
    noise = 0 if mask.noise is None else int(mask.noise.sum())
    assert (int(mask.masked.sum()), int(mask.token.sum()), noise) == counts
    assert int(mask.counted.sum()) == counts[0] and not bool((mask.masked & ~valid).any())
    if mask.noise is not None and mask.donor is not None:
        donors = np.asarray(mask.donor)[np.asarray(mask.noise)]
        assert len(set(donors.tolist())) == counts[2] and donors.max() < nodes


def test_token_noise_and_untouched_nodes_get_what_they_should():
    x = jnp.arange(20.0).reshape(10, 2)
    order, mixed = jnp.asarray([3, 7, 1, 9, 0, 2, 4, 5, 6, 8]), jnp.asarray([4, 0, 2, 1, 3])
    donors = jnp.asarray([8, 3, 0, 1, 2, 4, 5, 6, 7, 9])
    mask = mask_nodes(order, 10, 0.5, 0.35, mixed, donors)  # 5 masked: 3 tokens, 1 noise, 1 untouched
    corrupted = np.asarray(corrupt(x, mask, jnp.asarray([[-1.0, -2.0]])))
    expected = np.array(x)
    expected[[0, 3, 1]] = [-1, -2]  # positions 4, 0, 2 of the masked nodes
    expected[9] = x[8]  # position 3, the last of `mixed`
    np.testing.assert_array_equal(corrupted, expected)
    np.testing.assert_array_equal(mask.nodes, order[:5])


def test_attention_sums_to_one_and_without_attention_vectors_the_layer_is_the_mean():
    graph, x = flatten_graphs(BATCH), GAT.inputs(BATCH)
    weights = attention_weights(jax.random.normal(KEY, (graph.senders.shape[0], 2)), graph)
    total = jax.ops.segment_sum(weights, graph.receivers, 3 * NODES)
    np.testing.assert_allclose(total[graph.node_valid], 1, atol=1e-6)
    layer = GatLayer(2, 4)
    params = filled(jax.eval_shape(layer.init, KEY, x, graph)["params"])
    params |= {"source": jnp.zeros((2, 4)), "target": jnp.zeros((2, 4)), "bias": jnp.zeros(8)}
    out = np.asarray(jax.jit(layer.apply)({"params": params}, x, graph))
    z = np.asarray(x @ params["kernel"].reshape(FEATURES, 8))
    node = 3
    edges = np.flatnonzero(np.asarray(graph.edge_valid) & (np.asarray(graph.receivers) == node))
    assert node in np.asarray(graph.senders)[edges]
    np.testing.assert_allclose(out[node], z[np.asarray(graph.senders)[edges]].mean(0), atol=1e-6)


def test_summing_before_the_kernel_is_the_same_layer():
    graph, x = flatten_graphs(BATCH), GAT.inputs(BATCH)
    layer = GatLayer(1, 9)  # wider than its input: neighbours are summed first
    params = filled(jax.eval_shape(layer.init, KEY, x, graph)["params"])
    apply = jax.jit(layer.apply)
    values = x @ params["kernel"][:, 0]
    logits = (values @ params["source"][0])[graph.senders] + (values @ params["target"][0])[graph.receivers]
    weights = attention_weights(jax.nn.leaky_relu(logits, 0.2)[:, None], graph)
    plain = jax.ops.segment_sum(weights * values[graph.senders], graph.receivers, 3 * NODES) + params["bias"]
    rows = jnp.asarray([5, 0, 13])
    np.testing.assert_allclose(apply({"params": params}, x, graph)[graph.node_valid], plain[graph.node_valid], atol=1e-5)
    np.testing.assert_allclose(apply({"params": params}, x, graph, rows=rows), plain[rows], atol=1e-5)


@pytest.mark.parametrize("remask", [True, False])
def test_a_masked_node_without_neighbours_can_only_be_guessed(remask):
    system = dataclasses.replace(GAT, remask=remask)
    params, state = perturbed(system)
    x = GAT.inputs(BATCH)[:NODES]
    none, nodes = jnp.zeros(0, jnp.int32), jnp.ones(NODES, bool)
    graph = add_self_loops(Graph(none, none, jnp.zeros(0, bool), nodes))
    mask = draw_node_mask(jax.random.uniform(KEY, (NODES, 3)), nodes, 0.5, 0.2)

    @jax.jit
    def run(params):
        hidden, _ = system.encode(params, state, x, graph)
        recon = system.decode(params, state, hidden, graph, mask, rows=mask.nodes)[0]["recon"]
        return recon, jax.grad(lambda p: system.loss_given_mask(p, state, graph, x, mask, None)[0])(params)["encoder"]

    recon, gradient = run(params)
    moved = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    if remask:
        np.testing.assert_array_equal(recon, jnp.broadcast_to(params["decoder"]["bias"], recon.shape))
        assert moved == 0
    else:
        assert moved > 1e-5


@pytest.mark.parametrize("system", [GAT, dataclasses.replace(GIN, norm="none")], ids=["gat", "gin"])
def test_a_masked_nodes_own_code_does_not_reach_its_reconstruction(system):
    params, state = perturbed(system)
    graph = flatten_graphs(BATCH)
    hidden = jax.random.normal(KEY, (3 * NODES, 8))
    masked = jnp.zeros(3 * NODES, bool).at[jnp.asarray([2, 5])].set(True)
    mask = NodeMask(jnp.asarray([2, 5]), jnp.ones(2, bool), masked, masked)
    decode = jax.jit(lambda codes: system.decode(params, state, [codes], graph, mask)[0]["recon"])
    np.testing.assert_array_equal(decode(hidden), decode(hidden.at[2].add(3.0)))
    assert not np.array_equal(decode(hidden), decode(hidden.at[3].add(3.0)))


@pytest.mark.parametrize("system", [GAT, GIN], ids=["gat", "gin"])
def test_permuting_nodes_permutes_embeddings(system):
    variables = perturbed(system)
    batch = make_batch(1, 1)
    order = np.random.default_rng(2).permutation(NODES)
    moved = batch | {"nodes": batch["nodes"][:, np.argsort(order)]}
    moved |= {name: jnp.asarray(order)[batch[name]] for name in ("senders", "receivers")}
    tokens = [jitted(system, "features")(variables, each)["tokens"][0] for each in (moved, batch)]
    np.testing.assert_allclose(tokens[0][order], tokens[1], atol=1e-5)


def test_graphs_of_a_batch_do_not_see_each_other_nor_padding():
    variables = perturbed(GIN)
    alone = {name: value[:1] for name, value in BATCH.items()}
    together, single = (jitted(GIN, "features")(variables, batch) for batch in (BATCH, alone))
    for name in ("tokens", "pooled"):
        np.testing.assert_allclose(together[name][:1], single[name], atol=1e-6)
    other = BATCH | {"nodes": jnp.where(BATCH["node_mask"][..., None], BATCH["nodes"], -7.0)}
    other |= {name: jnp.where(BATCH["edge_mask"], BATCH[name], 0) for name in ("senders", "receivers")}
    for system in (dataclasses.replace(GIN, norm="batch"), GAT):
        variables = perturbed(system)
        assert loss_of(system, variables, other) == loss_of(system, variables, BATCH)


def test_packing_changes_the_cost_and_not_the_result():
    """Of the two batches one fits into the room and one does not."""
    system = dataclasses.replace(GIN, norm="batch", pool="max", depth=1)
    packed = dataclasses.replace(system, node_budget=31, edge_budget=160)
    full = BATCH | {"node_mask": jnp.ones((3, NODES), bool), "nodes": jnp.abs(jnp.sin(BATCH["nodes"]))}
    variables = perturbed(system)
    assert loss_of(system, variables, full) == pytest.approx(loss_of(packed, variables, full), rel=1e-6)
    params, state = perturbed(system)
    (one, outputs), gradient = jitted(system, "gradient")(params, state, BATCH)
    (other, packed_outputs), packed_gradient = jitted(packed, "gradient")(params, state, BATCH)
    assert float(one) == pytest.approx(float(other), rel=1e-6)
    for a, b in ((gradient, packed_gradient), (outputs.state, packed_outputs.state)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), a, b)
    features = [jitted(each, "features")((params, state), BATCH) for each in (system, packed)]
    for name in ("tokens", "pooled"):
        np.testing.assert_allclose(features[0][name], features[1][name], atol=1e-5)


def test_tables_of_neighbours_change_the_cost_and_not_the_result():
    batch = make_batch(3, 1)
    keep = np.asarray(batch["edge_mask"][0])
    ends = [np.asarray(batch[name][0])[keep] for name in ("senders", "receivers")]
    batch |= {"senders": jnp.asarray(ends[0])[None], "receivers": jnp.asarray(ends[1])[None], "edge_mask": jnp.ones((1, keep.sum()), bool)}
    tables = {name: jnp.asarray(value)[None] for name, value in table_fields(*ends, NODES).items()}
    system = GraphMae(width=8, heads=2)
    variables = perturbed(system)
    assert loss_of(system, variables, batch) == pytest.approx(loss_of(system, variables, batch | tables), rel=1e-6)


def test_drop_edge_and_dropout_act_in_training_alone():
    system = dataclasses.replace(GAT, edge_drop_rate=0.5)
    variables = perturbed(system)
    assert loss_of(system, variables, BATCH) != loss_of(GAT, variables, BATCH)
    both = GraphMae(width=8, heads=2, replace_rate=0.2, edge_drop_rate=0.5)
    assert loss_of(both, variables, BATCH) not in (loss_of(GAT, variables, BATCH), loss_of(system, variables, BATCH))
    np.testing.assert_array_equal(*(jitted(each, "features")(variables, BATCH)["tokens"] for each in (both, GAT)))


@pytest.mark.parametrize(
    ("options", "nodes", "features", "parameters"),
    [
        ({}, 2708, 1433, 2_000_486),
        ({"heads": 2}, 3327, 3703, 4_334_046),
        ({"width": 1024}, 19717, 500, 3_129_298),
    ],
)
def test_parameter_counts_of_the_paper(options, nodes, features, parameters):
    system = GraphMae(**options)
    batch: Any = {"nodes": jax.ShapeDtypeStruct((1, nodes, features), jnp.float32)}
    params = jax.eval_shape(lambda: system.init(KEY, {"nodes": jnp.zeros((1, 1, features))})).params
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
    dense = nodes * (2 * features * 512 + 2 * 512**2)
    if system.width == 512:  # half of the decoder's last map is not needed
        assert system.forward_flops(batch) == pytest.approx(2 * (dense - nodes * features * 256), rel=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"encoder": "gin", "decoder": "gin"}, {"decoder": "mlp"}, {"decoder": "linear", "concat_hidden": True}]
)
def test_flops_by_formula_are_those_of_the_trace(options):
    system = GraphMae(**(SMALL | {"width": 64} | options))
    batch = {name: jnp.concatenate([value] * 2) for name, value in make_batch(5, 1).items()}
    batch["nodes"] = jnp.ones((2, NODES, 96))
    params, state = jax.eval_shape(system.init, KEY, batch)
    trace = jax.make_jaxpr(lambda p, s: system.loss(p, s, batch, KEY, jnp.int32(0))[0])(params, state)
    assert dot_flops(trace.jaxpr) == pytest.approx(2 * system.forward_flops(batch), rel=0.02)


def test_molecules_mask_a_quarter_of_the_atoms_of_each():
    system = GraphMaeMolecules(width=8, depth=2)
    generator = np.random.default_rng(6)
    batch = {name: BATCH[name] for name in ("senders", "receivers", "node_mask", "edge_mask", "example")}
    batch["atoms"] = jnp.asarray(generator.integers(0, 3, (3, NODES, 2)))
    batch["bonds"] = jnp.asarray(generator.integers(0, 3, (3, 40, 2)))
    mask = jax.jit(system.draw_mask)(KEY, batch)
    np.testing.assert_array_equal(mask.sum(1), [4, 3, 3])  # int(n / 4 + 1) of 12, 10, 8
    assert not bool((mask & ~batch["node_mask"]).any())
    params, state = perturbed(system)
    before = state["batch_stats"]["encoder"]["norm_0"]["mean"]
    (loss, outputs), gradient = jitted(system, "gradient")(params, state, batch)
    assert 0 < float(loss) < 2 and all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    assert not np.array_equal(outputs.state["batch_stats"]["encoder"]["norm_0"]["mean"], before)
    assert jitted(system, "features")((params, state), batch)["pooled"].shape == (3, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "gatt"}, "unknown encoder 'gatt' \\(did you mean 'gat'"),
        ({"norm": "bach"}, "unknown norm 'bach' \\(did you mean 'batch'"),
        ({"pool": "avg"}, "unknown pool 'avg'; there are mean, max, sum"),
        ({"heads": 3}, "width=8 is not a multiple of its 3 heads"),
        ({"mask_rate": 1.0}, "mask_rate=1.0: it must lie between 0 and 1"),
    ],
)
def test_arguments_that_cannot_work_are_named(options, message):
    assert isinstance(GAT, System) and isinstance(GraphMaeMolecules(), System)
    with pytest.raises(UserError, match=message):
        GraphMae(**(SMALL | options))


@pytest.mark.parametrize("variant", ["cora", "citeseer", "mutag", "proteins", "imdb_b", "imdb_m", "nci1"])
def test_the_sizes_for_a_plan_without_data_are_those_of_the_files(variant, shared):
    config = load_config(f"configs/graph_mae.py:{variant}", [f"data.root={shared / 'data'}"])
    found = open_sources(config)[0]
    assert config.data.examples == len(found)
    assert {name: Field.parse(text) for name, text in config.data.fields.items()}.items() <= found.spec.fields.items()
