"""GraphMAE's recorded case, every tensor of it, and what the replay does with options that it does not have."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.interop import graph_mae
from maskae.interop.case import Case
from maskae.interop.graph_mae_layout import layout_of, official_names
from maskae.interop.parity import compare_case
from maskae.systems.graph_mae_molecules import GraphMaeMolecules

NODES, FEATURES = 10, 5
OPTIONS: dict[str, Any] = {
    "num_hidden": 4,
    "num_layers": 2,
    "num_heads": 2,
    "num_out_heads": 1,
    "encoder": "gat",
    "decoder": "gin",
    "activation": "relu",
    "norm": "batchnorm",
    "residual": True,
    "in_drop": 0.2,
    "attn_drop": 0.1,
    "negative_slope": 0.2,
    "mask_rate": 0.5,
    "replace_rate": 0.4,
    "drop_edge_rate": 0.5,
    "loss_fn": "mse",
    "alpha_l": 2,
    "concat_hidden": True,
    "optimizer": "adamw",
    "lr": 0.01,
    "weight_decay": 0,
    "steps": 2,
}


def synthetic(case: Case, options: dict[str, Any]) -> Case:
    """A case with one part `gat` of two chains of five nodes without self-loops, random weights, and nothing recorded."""
    generator = np.random.default_rng(0)
    system = graph_mae.system_of(options)
    params, state = jax.eval_shape(lambda: system.init(jax.random.key(0), {"nodes": jnp.zeros((1, 1, FEATURES))}))
    params, state = (jax.tree.map(lambda leaf: 0.3 + generator.random(leaf.shape, np.float32), tree) for tree in (params, state))
    start = np.asarray([0, 1, 2, 3, 5, 6, 7, 8])
    inputs = {
        "x": generator.random((NODES, FEATURES), np.float32),
        "edge_index": np.concatenate([np.stack([start, start + 1]), np.stack([start + 1, start])], 1).astype(np.int32),
        "graph_id": np.repeat(np.arange(2), 5),
        "perm": generator.permutation(NODES),
        "perm_mask": generator.permutation(NODES // 2),
        "noise_perm": generator.permutation(NODES),
        "bernoulli": np.tile([1, 0], 8),
    }
    weights = {f"gat/{name}": value for name, value in official_names(params, layout_of(system), state).items()}
    inputs = {f"gat/{name}": value for name, value in inputs.items()}
    return dataclasses.replace(case, record={"config": {"gat": options, "seed": 1}}, weights=weights, inputs=inputs, outputs={})


@pytest.fixture(scope="module")
def recorded(shared) -> Case:
    return Case.read(shared / "goldens" / "graph_mae" / "a")


def test_the_reference_case_is_reproduced(recorded):
    rows = compare_case(recorded)
    assert len(rows) == 171
    assert [row.name for row in rows if not row.agrees] == []


def test_options_that_the_recorded_case_has_not(recorded):
    case = synthetic(recorded, OPTIONS)
    found = {name: each.value for name, each in graph_mae.replay(case).items()}
    assert found["gat/attention_layer0"].shape == (8 + NODES, 2)  # the kept edges, then a self-loop per node
    assert found["gat/remasked"].shape == (NODES, 4) and found["gat/recon"].shape == (NODES, FEATURES)
    np.testing.assert_allclose(found["gat/pool_sum"], found["gat/embed"].reshape(2, 5, 4).sum(1), atol=1e-6)
    # Batch statistics take these biases away: their gradient is rounding, of which Adam would make whole steps in single precision.
    for name in ("encoder.gat_layers.0.bias", "decoder.layers.0.apply_func.linears.0.bias"):
        np.testing.assert_allclose(found[f"gat/after1/{name}"], case.weights[f"gat/{name}"], atol=1e-8)
        assert found[f"gat/delta_norm/{name}"] < 1e-8
    assert found["gat/delta_norm/encoder_to_decoder.weight"] > 0.01
    assert found["gat/lr_used"].tolist() == pytest.approx([0.01, 0.01])


def test_the_kept_edges_are_outcomes_or_numbers():
    edges = {"edge_index": np.zeros((2, 5), np.int32), "perm": np.arange(5)}
    for kept in (np.asarray([0.0, 1, 1, 0, 1], np.float32), np.asarray([1, 2, 4])):
        assert graph_mae.kept_edges(edges | {"kept": kept}).tolist() == [1, 2, 4]
    with pytest.raises(UserError, match="drop_edge_rate"):
        graph_mae.kept_edges(edges)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "graphnorm"}, "unknown norm 'graphnorm'"),
        ({"loss_fn": "sig"}, "unknown loss_fn 'sig'; there are sce, mse"),
        ({"encoder": "dotgat"}, "unknown encoder 'dotgat'"),
        ({"decoder": "gat", "num_out_heads": 2}, "num_out_heads=2: a GAT decoder"),
    ],
)
def test_what_cannot_be_replayed_is_named(options, message):
    with pytest.raises(UserError, match=message):
        graph_mae.system_of(OPTIONS | options)


@pytest.mark.parametrize("option", [{"JK": "sum"}, {"gnn_type": "gcn"}, {"mask_edge": 1}])
def test_molecule_options_that_do_not_run_are_named(recorded, option):
    config = {"chem": recorded.record["config"]["chem"] | option}
    case = dataclasses.replace(recorded, record=recorded.record | {"config": config})
    with pytest.raises(UserError, match=f"{next(iter(option))}=.*: the released code pretrains with"):
        graph_mae.replay(case)


def test_atom_types_may_be_learned_by_their_cross_entropy():
    system = GraphMaeMolecules(loss_name="cross_entropy")
    logits = np.random.default_rng(0).normal(size=(4, 119))
    kinds, masked = jnp.asarray([5, 6, 0, 118]), jnp.asarray([True, False, True, True])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log(shares[[0, 2, 3], [5, 0, 118]]).mean()
    assert float(system.error(jnp.asarray(logits), kinds, masked)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="unknown loss_name 'sce'"):
        GraphMaeMolecules(loss_name="sce")
