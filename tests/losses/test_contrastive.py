"""Contrastive losses: each implementation against a float64 twin in numpy, on one device and on eight; and their memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from maskae.errors import UserError
from maskae.losses.blocked import Computation
from maskae.losses.contrastive import enqueue, info_nce, nt_xent, queue_info_nce, self_con, sup_con
from maskae.mesh import BATCH, make_mesh

B, D, BLOCK = 16, 6, 5
NUMBERS = np.random.default_rng(0)
GROUPS = np.asarray([0, 0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 0], np.int32)
LISTS = np.asarray([[(i + 3) % B, -1] if i % 2 else [(i + 1) % B, (i + 8) % B] for i in range(B)], np.int32)
SOFT = NUMBERS.dirichlet(np.full(B, 0.3), B).astype(np.float32)


def unit(*shape: int, seed: int = 1) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=shape)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


class Twin(NamedTuple):
    loss: float
    queries: np.ndarray
    keys: np.ndarray
    scale: float


def twin(queries: np.ndarray, keys: np.ndarray, scale: float, allowed: np.ndarray, target: np.ndarray) -> Twin:
    """Loss and gradients in float64 from the matrix of pairs; `target` has rows that sum to anything, 0 for what is no anchor."""
    queries, keys, target = queries.astype(np.float64), keys.astype(np.float64), target.astype(np.float64) * allowed
    products = queries @ keys.T
    logits = np.where(allowed, scale * products, -np.inf)
    top = np.where(allowed.any(1), logits.max(1), 0)[:, None]
    exponentials = np.exp(logits - top)
    sums = np.maximum(exponentials.sum(1, keepdims=True), 1e-300)
    anchors = max((target.sum(1) > 0).sum(), 1)
    total = target.sum(1, keepdims=True)
    loss = (total * (top + np.log(sums)))[total > 0].sum() - (target * scale * products).sum()
    to_logits = (total * exponentials / sums - target) / anchors
    return Twin(loss / anchors, scale * to_logits @ keys, scale * to_logits.T @ queries, (to_logits * products).sum())


def excluded_pairs(excluded: np.ndarray, identifiers: np.ndarray) -> np.ndarray:
    rows = range(len(identifiers))
    return np.asarray([[identifiers[j] in [e for e in np.atleast_1d(excluded[i]) if e >= 0] for j in rows] for i in rows])


def twin_info_nce(q: np.ndarray, k: np.ndarray, scale: float, *, out: np.ndarray, soft: np.ndarray | None, stop: bool) -> Twin:
    eye = np.eye(B, dtype=bool)
    allowed = ~out if soft is not None else ~out | eye
    one = twin(q, k, scale, allowed, eye if soft is None else soft)
    two = twin(k, q, scale, allowed, eye if soft is None else soft.T)
    other = 0 if stop else 1
    to_q, to_k = (one.queries + other * two.keys) / 2, (two.queries + other * one.keys) / 2
    return Twin((one.loss + two.loss) / 2, to_q, to_k, (one.scale + two.scale) / 2)


def twin_sup_con(
    embeddings: np.ndarray, labels: np.ndarray, scale: float, out: np.ndarray | None = None
) -> tuple[float, np.ndarray, float]:
    rows, views = embeddings.shape[:2]
    flat, label = embeddings.reshape(rows * views, -1), np.repeat(labels, views)
    allowed = (label[:, None] >= 0) & (label >= 0) & ~np.eye(rows * views, dtype=bool)
    positive = allowed & (label[:, None] == label)
    if out is not None:
        allowed &= positive | ~np.repeat(np.repeat(out, views, 0), views, 1)
    both = twin(flat, flat, scale, allowed, positive / np.maximum(positive.sum(1, keepdims=True), 1))
    return both.loss, (both.queries + both.keys).reshape(embeddings.shape), both.scale


def computations() -> dict[str, Computation]:
    mesh = make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
    return {
        "plain": Computation("plain"),
        "blocked": Computation("blocked", block=BLOCK),
        "ring": Computation("ring", block=3, mesh=mesh),
        "ring_beside_tensor": Computation("ring", block=4, mesh=make_mesh({"data": 2, "fsdp": 2, "tensor": 2})),
    }


WAYS = ("plain", "blocked", "ring")


def gradients(loss: Callable[..., jax.Array], computation: Computation, *arrays: np.ndarray) -> tuple[Any, Any]:
    """Value and gradients of loss(*arrays, scale) in one compiled program; on a ring the arrays lie split over its devices."""
    placed = arrays
    if computation.mesh is not None:
        placed = tuple(jax.device_put(array, NamedSharding(computation.mesh, BATCH)) for array in arrays)
    temperature = jnp.asarray(0.1, jnp.float32)
    count = tuple(range(len(arrays) + 1))
    return jax.jit(jax.value_and_grad(lambda *given: loss(*given[:-1], 1 / given[-1]), count))(*placed, temperature)


def temperature_gradient(to_scale: float) -> float:
    return -to_scale / 0.1**2


@pytest.mark.parametrize(
    ("way", "case"),
    [*product(WAYS, ("stop", "groups", "soft")), *product(("plain", "blocked"), ("bare", "lists")), ("ring_beside_tensor", "soft")],
)
def test_info_nce_equals_the_twin(way: str, case: str) -> None:
    queries, keys = unit(B, D), unit(B, D, seed=2)
    out = np.zeros((B, B), bool)
    options: dict[str, Any] = {"stop_key_gradient": case == "stop"}
    if case == "groups":
        options |= {"excluded": GROUPS, "identifiers": GROUPS}
        out = GROUPS[:, None] == GROUPS
    if case in ("lists", "soft"):
        options |= {"excluded": LISTS}
        out = excluded_pairs(LISTS, np.arange(B))
    if case == "soft":
        options |= {"soft_targets": SOFT}
    computation = computations()[way]
    value, (to_q, to_k, to_t) = gradients(lambda q, k, s: info_nce(q, k, s, computation=computation, **options), computation, queries, keys)
    want = twin_info_nce(queries, keys, 10.0, out=out, soft=SOFT if case == "soft" else None, stop=case == "stop")
    np.testing.assert_allclose(value, want.loss, rtol=2e-6)
    np.testing.assert_allclose(to_q, want.queries, atol=2e-6)
    np.testing.assert_allclose(to_k, want.keys, atol=2e-6)
    np.testing.assert_allclose(to_t, temperature_gradient(want.scale), rtol=2e-5)


@pytest.mark.parametrize(("way", "case"), [*product(WAYS, ("filled",)), ("blocked", "batch"), ("ring", "batch")])
def test_info_nce_against_a_queue_equals_the_twin(way: str, case: str) -> None:
    queries, keys, queue = unit(B, D), unit(B, D, seed=2), unit(24, D, seed=4)
    options: dict[str, Any] = {"filled": 19} if case == "filled" else {"batch_negatives": True, "stop_key_gradient": False}
    others = np.eye(B, dtype=bool) if case == "filled" else np.ones((B, B), bool)
    allowed = np.concatenate([others, np.broadcast_to(np.arange(24) < options.get("filled", 24), (B, 24))], 1)
    computation = computations()[way]
    value, (to_q, to_k, to_queue, to_t) = gradients(
        lambda q, k, u, s: queue_info_nce(q, k, u, s, computation=computation, **options), computation, queries, keys, queue
    )
    want = twin(queries, np.concatenate([keys, queue]), 10.0, allowed, np.eye(B, B + 24))
    np.testing.assert_allclose(value, want.loss, rtol=2e-6)
    np.testing.assert_allclose(to_q, want.queries, atol=2e-6)
    np.testing.assert_allclose(to_k, want.keys[:B] if case == "batch" else np.zeros((B, D)), atol=2e-6)
    np.testing.assert_array_equal(to_queue, np.zeros((24, D)))
    np.testing.assert_allclose(to_t, temperature_gradient(want.scale), rtol=2e-5)


def test_a_queue_forgets_its_oldest_keys() -> None:
    queue, pointer = jnp.zeros((5, 1)), jnp.int32(0)
    for first in (1, 3, 5):
        queue, pointer = enqueue(queue, pointer, jnp.asarray([[first], [first + 1]]))
    assert queue[:, 0].tolist() == [6, 2, 3, 4, 5] and int(pointer) == 1


def test_without_key_gradients_each_embedding_learns_as_an_anchor_only() -> None:
    views = unit(B, 2, D)
    stopped = jax.grad(lambda e: nt_xent(e[:, 0], e[:, 1], 10.0, stop_key_gradient=True))(views).reshape(2 * B, D)
    own = np.eye(2 * B, dtype=bool)
    partner = np.kron(np.eye(B), np.asarray([[0, 1], [1, 0]]))
    flat = views.reshape(2 * B, D)
    np.testing.assert_allclose(stopped, twin(flat, flat, 10.0, ~own, partner).queries, atol=2e-6)


@pytest.mark.parametrize(
    ("way", "case"), [*product(WAYS, ("labels", "one_of_a_kind", "groups")), ("ring_beside_tensor", "labels"), ("blocked", "unlabelled")]
)
def test_sup_con_equals_the_twin_with_the_labels_of_other_devices(way: str, case: str) -> None:
    embeddings = unit(B, 2, D, seed=3)
    # Every label lies on several devices; some rows (-1) are out of the loss.
    labels = {
        "labels": np.asarray([0, 1, 2, -1] * 4, np.int32),
        "one_of_a_kind": np.asarray([-1] * 9 + [0, 1, 1, 5, 5, 5, -1], np.int32),
    }.get(case)
    excluded = {"excluded": GROUPS, "identifiers": GROUPS} if case == "groups" else {}
    computation = computations()[way]
    value, (to_embeddings, to_t) = gradients(
        lambda e, s: sup_con(e, labels, s, computation=computation, **excluded), computation, embeddings
    )
    out = GROUPS[:, None] == GROUPS if case == "groups" else None
    loss, want, to_scale = twin_sup_con(embeddings, np.arange(B) if labels is None else labels, 10.0, out)
    np.testing.assert_allclose(value, loss, rtol=2e-6)
    np.testing.assert_allclose(to_embeddings, want, atol=2e-6)
    np.testing.assert_allclose(to_t, temperature_gradient(to_scale), rtol=2e-5)


@pytest.mark.parametrize("way", ["plain", "blocked"])
def test_anchors_without_a_positive_are_not_counted(way: str) -> None:
    embeddings, labels = unit(7, 1, D), np.asarray([0, 0, 1, 2, 3, 3, 3], np.int32)
    value, (to_embeddings, _) = gradients(lambda e, s: sup_con(e, labels, s, computation=computations()[way]), Computation(), embeddings)
    loss, want, _ = twin_sup_con(embeddings, labels, 10.0)
    np.testing.assert_allclose(value, loss, rtol=2e-6)
    np.testing.assert_allclose(to_embeddings, want, atol=2e-6)
    lonely, (nothing, _) = gradients(lambda e, s: sup_con(e, None, s, computation=computations()[way]), Computation(), embeddings)
    assert float(lonely) == 0
    np.testing.assert_array_equal(nothing, np.zeros_like(embeddings))


def test_nt_xent_and_self_con_are_sup_con_of_two_views() -> None:
    first, second, labels = unit(B, D), unit(B, D, seed=2), np.arange(B) % 3
    views = np.stack([first, second], 1)
    np.testing.assert_allclose(nt_xent(first, second, 5.0), twin_sup_con(views, np.arange(B), 5.0)[0], rtol=1e-6)
    np.testing.assert_allclose(self_con(first, second, None, 5.0), twin_sup_con(views, np.arange(B), 5.0)[0], rtol=1e-6)
    np.testing.assert_allclose(self_con(first, second, labels, 5.0), twin_sup_con(views, labels, 5.0)[0], rtol=1e-6)


@pytest.mark.parametrize("way", ["blocked", "ring"])
def test_duplicates_give_the_logarithm_of_the_count(way: str) -> None:
    same = np.tile(unit(1, D), (B, 1))
    computation = computations()[way]
    value, (to_q, _, _) = gradients(lambda q, k, s: info_nce(q, k, s, computation=computation), computation, same, same)
    assert float(value) == pytest.approx(np.log(B), rel=1e-5)
    np.testing.assert_allclose(to_q, np.zeros_like(same), atol=1e-5)
    labels = np.arange(B) % 4
    value, _ = gradients(lambda a, b, s: self_con(a, b, labels, s, computation=computation), computation, same, same)
    assert float(value) == pytest.approx(np.log(2 * B - 1), rel=1e-5)


@pytest.mark.parametrize("way", ["blocked", "ring"])
def test_extreme_logits_stay_finite_and_right(way: str) -> None:
    queries, keys = 30 * unit(B, D), 30 * unit(B, D, seed=2)
    computation = computations()[way]
    value, (to_q, to_k, _) = gradients(lambda q, k, s: info_nce(q, k, s, computation=computation), computation, queries, keys)
    want = twin_info_nce(queries, keys, 10.0, out=np.zeros((B, B), bool), soft=None, stop=False)
    assert want.loss > 1000
    np.testing.assert_allclose(value, want.loss, rtol=1e-6)
    np.testing.assert_allclose(to_q, want.queries, atol=1e-2 * np.abs(want.queries).max())
    np.testing.assert_allclose(to_k, want.keys, atol=1e-2 * np.abs(want.keys).max())


def test_half_precision_embeddings_are_summed_in_float32() -> None:
    queries, keys = jnp.asarray(unit(B, D), jnp.bfloat16), jnp.asarray(unit(B, D, seed=2), jnp.bfloat16)
    loss = jax.jit(jax.value_and_grad(lambda q, k: info_nce(q, k, 10.0, computation=computations()["blocked"])))
    value, to_q = loss(queries, keys)
    exact = [np.asarray(array, np.float32) for array in (queries, keys)]
    want = twin_info_nce(*exact, 10.0, out=np.zeros((B, B), bool), soft=None, stop=False)
    assert value.dtype == jnp.float32 and to_q.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, want.loss, rtol=1e-6)
    # The gradients of the two directions are each rounded to 8 bits, then summed.
    np.testing.assert_allclose(np.asarray(to_q, np.float32), want.queries, atol=2**-8 * np.abs(want.queries).max())


def temporaries(rows: int, width: int, loss: Callable[..., jax.Array]) -> int:
    """Bytes of temporaries of the compiled value and gradients; nothing runs."""
    shape = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(shape, shape, jax.ShapeDtypeStruct((), jnp.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_temporaries_of_a_large_batch_are_far_below_the_square() -> None:
    rows, width = 32_768, 768
    square = rows * rows * 4
    blocked = temporaries(rows, width, lambda q, k, s: info_nce(q, k, s, computation=Computation("blocked")))
    print(f"temporaries: blocked {blocked / 2**20:.0f} MiB, one matrix of all pairs {square / 2**20:.0f} MiB")
    assert blocked < square / 4
    half = temporaries(rows // 2, width, lambda q, k, s: info_nce(q, k, s, computation=Computation("blocked")))
    assert blocked < 2.1 * half
    assert temporaries(rows, width, lambda q, k, s: info_nce(q, k, s, computation=Computation("plain"))) > square


def test_temporaries_of_the_ring_are_those_of_one_devices_rows() -> None:
    rows, width = 32_768, 768
    computation = Computation("ring", block=512, mesh=make_mesh({"data": 8, "fsdp": 1, "tensor": 1}))
    rows_split = NamedSharding(computation.mesh, BATCH)
    shape = jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=rows_split)
    loss = jax.value_and_grad(lambda q, k, s: info_nce(q, k, s, computation=computation), (0, 1, 2))
    compiled = jax.jit(loss).lower(shape, shape, jax.ShapeDtypeStruct((), jnp.float32)).compile()
    per_device = compiled.memory_analysis().temp_size_in_bytes
    print(f"temporaries: ring {per_device / 2**20:.0f} MiB on each of 8 devices")
    assert per_device < rows * width * 4 * 2
    assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Computation("blocks"), "did you mean 'blocked'"),
        (lambda: Computation("ring"), "needs a mesh"),
        (lambda: Computation(block=0), "block=0"),
        (lambda: Computation("ring", mesh=make_mesh({"data": 8, "fsdp": 1, "tensor": 1}), axes=("dat",)), "did you mean 'data'"),
        (lambda: info_nce(unit(12, D), unit(12, D), 1.0, computation=computations()["ring"]), "12 queries do not divide over the 8"),
        (lambda: info_nce(unit(B, D), unit(B - 1, D), 1.0), "one shape"),
        (lambda: info_nce(unit(B, D), unit(B, D), 1.0, soft_targets=SOFT[:3]), "soft_targets"),
        (lambda: info_nce(unit(B, D), unit(B, D), 1.0, identifiers=GROUPS), "without what is excluded"),
        (lambda: info_nce(unit(B, D), unit(B, D), 1.0, excluded=LISTS[:3]), "excluded"),
        (lambda: nt_xent(unit(B, D), unit(B, D + 1), 1.0), "nt_xent"),
        (lambda: sup_con(unit(B, D), None, 1.0), "embeddings"),
        (lambda: queue_info_nce(unit(B, D), unit(B, D), unit(4, D + 1), 1.0), "queue_info_nce: queries"),
        (lambda: enqueue(jnp.zeros((2, 1)), jnp.int32(0), jnp.zeros((3, 1))), "3 keys do not fit into a queue of 2"),
        (lambda: sup_con(unit(B, 2, D), GROUPS[:3], 1.0), "labels"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
