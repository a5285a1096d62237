"""SCGC and its autoencoder: what the card says has to hold, the start from k-means, and the recorded case."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.config import load_config, load_module
from maskae.errors import UserError
from maskae.interop import scgc as interop
from maskae.interop.case import Case
from maskae.interop.parity import compare_case
from maskae.losses.neighbourhood import Neighbourhood
from maskae.merging import stage_config
from maskae.mesh import make_mesh
from maskae.planning.chips import parse_topology
from maskae.planning.plan import planned_experiment
from maskae.planning.tracing import trace_step
from maskae.systems.autoencoder import Autoencoder
from maskae.systems.contract import Params, System, Variables
from maskae.systems.scgc import NEIGHBOURS, Scgc, among
from tests.systems.test_mae import dot_flops

NODES, FEATURES = 24, 10
SMALL: dict[str, Any] = {"clusters": 3, "hidden": (12, 16), "latent": 4, "block": 8}
FULL = Scgc(**SMALL, scale=1.0)
STAR = dataclasses.replace(FULL, decode=False)
KEY = jax.random.key(1)


def make_batch() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    links = generator.random((NODES, NODES)) < 0.15
    links = links | links.T | np.eye(NODES, dtype=bool)
    rows, columns = np.nonzero(links)
    arrays = {"nodes": generator.integers(0, 2, (NODES, FEATURES), np.uint8), "node_label": np.arange(NODES) % 3}
    arrays |= dict(zip(NEIGHBOURS, (rows, columns, (1 / links.sum(1))[rows].astype(np.float32)), strict=True))
    return {name: value[None] for name, value in arrays.items()} | {"example": np.zeros(1, np.int32)}


BATCH = make_batch()


@pytest.fixture(scope="module")
def params() -> Params:
    """Parameters of SCGC; without the decoder they are those of SCGC*."""
    return jax.jit(FULL.init)(KEY, BATCH).params


@functools.cache
def compiled(system: Scgc) -> Any:
    """Loss and gradients, compiled once for all tests."""
    return jax.jit(jax.value_and_grad(lambda p, b: system.loss(p, {}, b, KEY, jnp.int32(0)), has_aux=True))


def loss_of(system: Scgc, params: Params, batch: dict[str, Any] = BATCH) -> tuple[float, dict[str, float], Params]:
    (loss, outputs), gradient = compiled(system)(params, batch)
    return float(loss), {name: float(value) for name, value in outputs.metrics.items()}, gradient


@jax.jit
def features(params: Params, nodes: Any) -> dict[str, jax.Array]:
    """Those of SCGC; no graph is given."""
    return FULL.features(params, {}, {"nodes": nodes})


def test_the_loss_is_the_weighted_sum_of_its_terms(params):
    assert isinstance(FULL, System) and isinstance(Autoencoder(), System)
    loss, terms, _ = loss_of(FULL, params)
    assert loss == pytest.approx(0.5 * terms["contrast"] + 0.1 * terms["cluster"] + terms["reconstruction"], rel=1e-6)
    starred, fewer, _ = loss_of(STAR, {name: value for name, value in params.items() if name != "decoder"})
    assert starred == pytest.approx(loss - terms["reconstruction"], rel=1e-5) and "reconstruction" not in fewer
    x = BATCH["nodes"][0].astype(np.float32)
    rebuilt = jax.jit(lambda p: FULL.autoencoder.decode(p, FULL.autoencoder.encode(p, x)))(params)
    assert terms["reconstruction"] == pytest.approx(float(np.square(rebuilt - x).mean()), rel=1e-6)


def test_every_parameter_learns_and_the_graph_reaches_the_loss_alone(params):
    _, terms, gradient = loss_of(FULL, params)
    assert all(float(np.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))
    own = BATCH["neighbour_rows"] == BATCH["neighbour_columns"]
    alone = BATCH | {"neighbour_weights": np.where(own, 1, 0).astype(np.float32)}
    assert loss_of(FULL, params, alone)[1]["contrast"] != pytest.approx(terms["contrast"], rel=1e-3)
    # `features` is given no graph at all.
    assert features(params, BATCH["nodes"])["assignment"].shape == (1, NODES, 3)


def test_permuting_nodes_permutes_assignments_and_a_new_node_moves_none(params):
    order = np.random.default_rng(1).permutation(NODES)
    place = np.argsort(order)
    moved = BATCH | {"nodes": BATCH["nodes"][:, order]} | {name: place[BATCH[name]] for name in NEIGHBOURS[:2]}
    assert loss_of(FULL, params, moved)[0] == pytest.approx(loss_of(FULL, params)[0], rel=1e-6)
    found = features(params, BATCH["nodes"])
    np.testing.assert_allclose(features(params, moved["nodes"])["assignment"][0], found["assignment"][0][order], rtol=1e-5)
    np.testing.assert_allclose(found["assignment"].sum(-1), 1, rtol=1e-6)
    more = np.concatenate([BATCH["nodes"], np.ones((1, 1, FEATURES), np.uint8)], axis=1)
    np.testing.assert_allclose(features(params, more)["tokens"][:, :NODES], found["tokens"], rtol=1e-5, atol=1e-6)


def test_nodes_split_over_devices_give_the_same(params):
    loss, _, gradient = loss_of(FULL, params)
    mesh = make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    with jax.set_mesh(mesh):
        spread, _, gradients = loss_of(dataclasses.replace(FULL, restarts=1), params)  # another instance: compiled anew
        assert jax.jit(FULL.inputs)(BATCH).sharding.shard_shape((NODES, FEATURES)) == (NODES // 8, FEATURES)
    assert spread == pytest.approx(loss, rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, gradients)


def test_sampled_nodes_keep_the_weights_among_them(params):
    chosen = np.asarray([7, 2, 19, 4])
    dense = np.zeros((NODES, NODES), np.float32)
    rows, columns, values = (np.asarray(BATCH[name][0]) for name in NEIGHBOURS)
    dense[rows, columns] = values
    kept = np.zeros((4, 4), np.float32)
    part = jax.jit(among, static_argnums=2)(Neighbourhood(*(BATCH[name][0] for name in NEIGHBOURS)), chosen, NODES)
    np.add.at(kept, (np.asarray(part.rows), np.asarray(part.columns)), np.asarray(part.weights))
    np.testing.assert_array_equal(kept, dense[np.ix_(chosen, chosen)])
    sampled = dataclasses.replace(FULL, sampled_nodes=12)
    assert np.isfinite(loss_of(sampled, params)[0])
    assert sampled.forward_flops(BATCH) < FULL.forward_flops(BATCH) / 2


def test_it_begins_at_kmeans_of_the_pretrained_codes(params):
    trained = Variables(jax.tree.map(lambda leaf: np.asarray(leaf) * 2 + 0.1, params), {})
    fresh = Variables({name: value for name, value in params.items() if name != "decoder"}, {})
    started = STAR.with_pretrained(fresh, trained)
    assert "decoder" not in started.params
    np.testing.assert_array_equal(started.params["encoder"]["layer_1"]["kernel"], trained.params["encoder"]["layer_1"]["kernel"])
    whole = FULL.with_pretrained(Variables(params, {}), trained)
    np.testing.assert_array_equal(whole.params["decoder"]["layer_2"]["bias"], trained.params["decoder"]["layer_2"]["bias"])
    stage = SimpleNamespace(batches=lambda: iter([BATCH]), experiment=SimpleNamespace(config=SimpleNamespace(seed=0)))
    begun = STAR.begin(started, stage)
    found = features(begun.params, BATCH["nodes"])
    codes, assigned = np.asarray(found["tokens"][0]), np.asarray(found["assignment"][0]).argmax(1)
    for cluster in range(3):
        np.testing.assert_allclose(begun.params["centres"][cluster], codes[assigned == cluster].mean(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="pretrained encoder does not fit"):
        STAR.with_pretrained(started, Variables({"encoder": {}}, {}))


def test_noise_corrupts_the_input_and_not_the_target():
    clean, noisy = Autoencoder((8,), 2, field="image"), Autoencoder((8,), 2, field="image", noise=0.5)
    batch = {"image": np.random.default_rng(2).normal(size=(6, 3, 3, 1)).astype(np.float32), "example": np.arange(6)}
    params, state = jax.jit(clean.init)(KEY, batch)
    losses = [jax.jit(lambda p, each=each: each.loss(p, state, batch, KEY, jnp.int32(0))[0]) for each in (clean, noisy)]
    zero = jax.tree.map(jnp.zeros_like, params)
    expected = pytest.approx(float(np.square(batch["image"]).mean()), rel=1e-6)
    assert [float(loss(zero)) for loss in losses] == [expected, expected]
    assert float(losses[0](params)) != float(losses[1](params))
    assert jax.eval_shape(clean.features, params, state, batch)["pooled"].shape == (6, 2)
    with pytest.raises(UserError, match="no field 'nodes'"):
        Autoencoder((8,), 2).init(KEY, batch)


def test_every_recipe_is_a_whole_config():
    for variant in load_module(Path("configs/scgc.py")).VARIANTS:
        config = load_config(f"configs/scgc.py:{variant}")
        first, second = (stage_config(config, name) for name in config.stages)
        name = first.data.source.partition(":")[2]
        assert second.data.source.startswith(f"neighbourhood:{name}:{'power' if second.model.decode else 'sum'}")
        assert first.data.fields.nodes.partition("[")[2] == second.data.fields.nodes.partition(",")[2]
        assert second.optimizer.base_learning_rate / 256 == (1e-4 if name == "citeseer" else 1e-3)


def test_flops_and_parameters_of_the_paper():
    for name, wanted in (("dblp", (1.44e6, 2.88e6)), ("acm", (2.21e6, 4.42e6)), ("citeseer", (3.12e6, 6.25e6))):
        for variant, count in zip((f"{name}_star", name), wanted, strict=True):
            config = stage_config(load_config(f"configs/scgc.py:{variant}"), "clustering")
            system: Any = Scgc(**config.model.to_dict())
            nodes, features = map(int, config.data.fields.nodes.removeprefix("float32[").removesuffix("]").split(","))
            shapes = jax.eval_shape(lambda s=system, f=features: s.init(KEY, {"nodes": jnp.zeros((1, 1, f))}).params)
            assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(count, rel=0.005)
            batch = {"nodes": jax.ShapeDtypeStruct((1, nodes, features), jnp.float32)}
            assert system.forward_flops(batch) == pytest.approx(2 * nodes * (count + 10 * nodes), rel=0.01)


@pytest.mark.parametrize("system", [FULL, STAR], ids=["scgc", "scgc_star"])
def test_flops_by_formula_are_those_of_the_trace(system):
    params = jax.eval_shape(system.init, KEY, BATCH).params
    whole = dataclasses.replace(system, block=NODES)
    trace = jax.make_jaxpr(lambda p: whole.loss(p, {}, BATCH, KEY, jnp.int32(0))[0])(params)
    assert dot_flops(trace.jaxpr) == pytest.approx(system.forward_flops(BATCH), rel=0.05)


def test_a_whole_graph_is_planned_as_one_record():
    config = stage_config(load_config("configs/scgc.py:tiny"), "clustering")
    traced = trace_step(planned_experiment(config, parse_topology("h100:8")))
    system, width = Scgc(**config.model.to_dict()), 4057 * 334 * 4
    flops = system.forward_flops({"nodes": jax.ShapeDtypeStruct((1, 4057, 334), jnp.float32)})
    # The gradient needs no product for the input, and makes every block of similarities twice.
    assert 2.5 * flops < traced.products.flops < 4.5 * flops
    assert traced.kept > width


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "rellu"}, "unknown activation 'rellu' .did you mean 'relu'"),
        ({"clusters": 0}, "clusters=0: it must be above zero"),
        ({"scale": -1.0}, "scale=-1.0: it must not be negative"),
        ({"hidden": (0,)}, "widths must be at least 1"),
    ],
)
def test_arguments_that_cannot_work_are_named(options, message):
    with pytest.raises(UserError, match=message):
        Scgc(**(SMALL | options))
    with pytest.raises(UserError, match="one whole graph per step"):
        FULL.inputs({"nodes": np.zeros((2, 3, FEATURES))})


def test_the_recorded_case_comes_again(shared):
    rows = compare_case(Case.read(shared / "goldens" / "scgc" / "a"))
    assert len(rows) == 77 and [row for row in rows if not row.agrees] == []


def test_a_model_or_an_evaluation_that_cannot_be_replayed_is_named(shared):
    case = Case.read(shared / "goldens" / "scgc" / "a")
    config = case.record["config"] | {"other": case.record["config"]["star"] | {"model": "SDCN"}}
    with pytest.raises(UserError, match="unknown model 'SDCN'.*there are SCGC, SCGC_TRIM"):
        interop.part_of(dataclasses.replace(case, record={"config": config}), "other", None)
    with pytest.raises(UserError, match="3 clusters and 2 classes"):
        interop.official_metrics(np.asarray([0, 1, 2, 1]), np.asarray([0, 1, 1, 0]))
