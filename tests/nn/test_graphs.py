"""Segment softmax and neighbour sums against dense float64 graphs, with the gradients, padding and odd nodes."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from maskae.errors import UserError
from maskae.nn.graphs import aggregate_neighbours, neighbour_tables, segment_softmax

NODES = 30


def symmetric_graph(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges in random order: a hub of 25 neighbours, doubled edges, single and doubled self-loops; nodes 27 to 29 are isolated."""
    generator = np.random.default_rng(seed)
    first = np.concatenate([np.zeros(25, int), generator.integers(1, 26, 30), [3, 3]])
    second = np.concatenate([np.arange(1, 26), generator.integers(1, 26, 30), [4, 4]])
    loops = np.array([5, 6, 6, 26])
    sources, destinations = np.concatenate([first, second, loops]), np.concatenate([second, first, loops])
    order = generator.permutation(sources.size)
    return sources[order], destinations[order]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def slow_sum(values, weights, cotangent, sources, destinations, valid):
    """Sum over edges one by one in float64, with the gradients of <sum, cotangent>."""
    total, by_values, by_weights = np.zeros(values.shape), np.zeros(values.shape), np.zeros(weights.shape)
    for edge in np.nonzero(valid)[0]:
        i, j, a = destinations[edge], sources[edge], weights[edge].astype(np.float64)[:, None]
        total[i] += a * values[j]
        by_values[j] += a * cotangent[i]
        by_weights[edge] = (values[j].astype(np.float64) * cotangent[i]).sum(-1)
    return total, by_values, by_weights


aggregate = jax.jit(aggregate_neighbours)
softmax = jax.jit(segment_softmax, static_argnums=2, static_argnames="indices_are_sorted")


@jax.jit
def pull_back(values, weights, cotangent, neighbours):
    total, pull = jax.vjp(lambda v, w: aggregate_neighbours(v, w, neighbours), values, weights)
    return total, *pull(cotangent)


@pytest.mark.parametrize(("heads", "width"), [(1, 256), (3, 5)])
def test_sums_and_gradients_equal_the_loop(heads, width):
    sources, destinations = symmetric_graph(0)
    values, cotangent, weights = normal(1, NODES, heads, width), normal(2, NODES, heads, width), normal(3, sources.size, heads)
    found = pull_back(values, weights, cotangent, neighbour_tables(sources, destinations, NODES))
    expected = slow_sum(values, weights, cotangent, sources, destinations, np.ones(sources.size, bool))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)
    assert (np.asarray(found[0][27:]) == 0).all()


def test_padding_edges_count_for_nothing_and_graphs_share_one_program():
    traces = []

    @jax.jit
    def run(*arguments):
        traces.append(None)
        return pull_back(*arguments)

    for seed in (4, 5):
        sources, destinations = symmetric_graph(seed)
        drop = min(sources[0], destinations[0]), max(sources[0], destinations[0])
        valid = ~((np.minimum(sources, destinations) == drop[0]) & (np.maximum(sources, destinations) == drop[1]))
        sources, destinations = np.where(valid, sources, -1), np.where(valid, destinations, 10**6)
        values, cotangent, weights = normal(6, NODES, 2, 4), normal(7, NODES, 2, 4), normal(8, sources.size, 2)
        weights[~valid] = np.nan
        tables = neighbour_tables(sources, destinations, NODES, valid, columns={3: 30, 8: 30, 26: 4})
        found = run(values, weights, cotangent, tables)
        for one, other in zip(found, slow_sum(values, weights, cotangent, sources, destinations, valid), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    assert len(traces) == 1


def test_renumbering_the_nodes_renumbers_the_sums():
    sources, destinations = symmetric_graph(9)
    values, weights = normal(10, NODES, 2, 4), normal(11, sources.size, 2)
    order = np.random.default_rng(12).permutation(NODES)
    plain = aggregate(values, weights, neighbour_tables(sources, destinations, NODES))
    moved = np.empty_like(values)
    moved[order] = values
    renumbered = aggregate(moved, weights, neighbour_tables(order[sources], order[destinations], NODES))
    np.testing.assert_allclose(renumbered[order], plain, atol=1e-5)


def test_gradients_take_no_scatter_and_a_graph_without_edges_sums_to_zero():
    sources, destinations = symmetric_graph(13)
    values, weights = normal(14, NODES, 1, 4), normal(15, sources.size, 1)
    text = pull_back.lower(values, weights, values, neighbour_tables(sources, destinations, NODES)).as_text()
    assert "gather" in text and "scatter" not in text
    none = np.zeros(0, int)
    found = pull_back(values, weights[:0], values, neighbour_tables(none, none, NODES))
    assert (np.asarray(found[0]) == 0).all() and (np.asarray(found[1]) == 0).all() and found[2].shape == (0, 1)


def test_sums_keep_the_dtype_and_add_in_float32():
    sources, destinations = np.concatenate([[0] * 300, [1] * 300]), np.concatenate([[1] * 300, [0] * 300])
    values = jnp.ones((2, 1, 1), jnp.bfloat16)
    total = aggregate(values, jnp.ones((600, 1), jnp.bfloat16), neighbour_tables(sources, destinations, 2))
    assert total.dtype == jnp.bfloat16 and total[1, 0, 0] == 300  # bfloat16 sums of ones stop at 256


def test_graphs_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="not symmetric: edge 0 -> 1"):
        neighbour_tables(np.array([0, 1, 2]), np.array([1, 2, 1]), 3)
    with pytest.raises(UserError, match="0..3, but the graph has 3 nodes"):
        neighbour_tables(np.array([0, 3]), np.array([3, 0]), 3)
    star = np.array([0, 0, 0, 1, 2, 3]), np.array([1, 2, 3, 0, 0, 0])
    with pytest.raises(UserError, match="3 nodes have 1 to 2 edges"):
        neighbour_tables(*star, 4, columns={2: 2, 4: 2})
    with pytest.raises(UserError, match="a node has 3 edges"):
        neighbour_tables(*star, 4, columns={2: 4})
    with pytest.raises(UserError, match="weights have shape"):
        aggregate_neighbours(np.ones((4, 1, 2)), np.ones((5, 1)), neighbour_tables(*star, 4))


@pytest.mark.parametrize("padded", [False, True])
def test_segment_softmax_and_its_gradient_equal_the_loop(padded):
    segments = np.array([2, 0, 2, 4, 0, 2, 3])
    logits, cotangent = 30 * normal(16, 7, 2), normal(17, 7, 2)
    valid = np.array([True, False, False, True, False, True, False]) if padded else np.ones(7, bool)
    expected, slope = np.zeros((7, 2)), np.zeros((7, 2))
    for segment in range(6):
        member = (segments == segment) & valid
        if member.any():
            exponents = np.exp(logits[member].astype(np.float64) - logits[member].max(0))
            share = expected[member] = exponents / exponents.sum(0)
            slope[member] = share * (cotangent[member] - (share * cotangent[member]).sum(0))
    hidden = np.where(valid[:, None], logits, np.nan), np.where(valid, segments, 99)
    found, pull = jax.vjp(lambda x: softmax(x, hidden[1], 6, valid if padded else None), hidden[0])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(pull(cotangent)[0], slope, atol=1e-6)


def test_segment_softmax_ignores_order_and_a_common_shift():
    segments, logits = np.array([0, 0, 1, 1, 1, 3]), normal(18, 6)
    shares = softmax(logits, segments, 4, indices_are_sorted=True)
    order = np.random.default_rng(19).permutation(6)
    np.testing.assert_allclose(softmax(logits[order], segments[order], 4), shares[order], rtol=1e-6)
    np.testing.assert_allclose(softmax(logits + np.float32(1000), segments, 4), shares, atol=1e-4)
    with pytest.raises(UserError, match="not both"):
        segment_softmax(logits, segments, 4, np.ones(6, bool), indices_are_sorted=True)


def test_attention_and_layer_equal_the_reference_case(shared: Path):
    """GraphMAE's first graph attention layer from the stored weights: the weights per edge and the layer's output."""
    folder = shared / "goldens" / "graph_mae" / "a"
    inputs, weights, stored = (load_file(folder / f"{name}.safetensors") for name in ("inputs", "weights", "outputs"))
    sources, destinations = inputs["gat/edge_index"]
    layer = {name: weights[f"gat/encoder.gat_layers.0.{name}"] for name in ("fc.weight", "attn_l", "attn_r", "bias", "activation.weight")}
    projected = (stored["gat/use_x"] @ layer["fc.weight"].T).reshape(48, 4, 8)
    left, right = (projected * layer["attn_l"]).sum(-1), (projected * layer["attn_r"]).sum(-1)
    attention = softmax(jax.nn.leaky_relu(left[sources] + right[destinations], 0.2), destinations, 48)
    np.testing.assert_allclose(attention, stored["gat/attention_layer0"].reshape(-1, 4), atol=1e-5)
    output = aggregate(projected, attention, neighbour_tables(sources, destinations, 48)).reshape(48, 32) + layer["bias"]
    hidden = np.where(output > 0, output, layer["activation.weight"] * output)
    np.testing.assert_allclose(hidden, stored["gat/hidden0"], atol=1e-5 * np.abs(stored["gat/hidden0"]).max())
