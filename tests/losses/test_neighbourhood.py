"""The neighbourhood contrast against its dense formula, its limits, and the sharpened clusters of DEC."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.losses.blocked import Computation
from maskae.losses.neighbourhood import Neighbourhood, neighbourhood_contrast
from maskae.losses.soft_clusters import cluster_divergence, sharpened_target, student_assignment

NODES, WIDTH = 21, 5
CODES = np.random.default_rng(3).normal(0.5, 2, (NODES, WIDTH)).astype(np.float32)


def weights(seed: int, nodes: int = NODES) -> np.ndarray:
    """Rows of a random walk with self-loops, float32 [N, N]."""
    links = np.random.default_rng(seed).random((nodes, nodes)) < 0.2
    links = links | links.T | np.eye(nodes, dtype=bool)
    return (links / links.sum(1, keepdims=True)).astype(np.float32)


def sparse(gamma: np.ndarray) -> Neighbourhood:
    """Weights above 0, padded to one length so that all tests share a compiled function."""
    rows, columns = np.nonzero(gamma)
    fill = np.zeros(NODES * NODES - len(rows), np.int32)
    values = np.concatenate([gamma[rows, columns], fill]).astype(np.float32)
    return Neighbourhood(np.concatenate([rows, fill]), np.concatenate([columns, fill]), values)  # type: ignore[arg-type]


def dense(codes: jax.Array, gamma: np.ndarray, scale: float) -> jax.Array:
    """The released code's computation, with all pairs."""
    unit = codes / jnp.maximum(jnp.linalg.norm(codes, axis=1, keepdims=True), 1e-12)
    cosines = jnp.where(jnp.eye(len(codes), dtype=bool), 0, unit @ unit.T)
    affinities = jnp.exp(scale * cosines)
    return -jnp.log((gamma * affinities).sum(1) / affinities.sum(1) + 1e-8).mean()


# 21 nodes do not divide into blocks of 8.
SPARSE = jax.jit(jax.value_and_grad(lambda z, pairs, tau: neighbourhood_contrast(z, pairs, tau, computation=Computation(block=8))))
DENSE = jax.jit(jax.value_and_grad(dense))


def contrast(codes: np.ndarray, gamma: np.ndarray, scale: float) -> tuple[float, np.ndarray]:
    loss, gradient = SPARSE(codes, sparse(gamma), scale)
    return float(loss), np.asarray(gradient)


@pytest.mark.parametrize("scale", [0.25, 2.25])
def test_blocks_and_sparse_weights_give_the_dense_loss_and_gradient(scale):
    gamma = weights(0)
    one, other = contrast(CODES, gamma, scale), DENSE(CODES, gamma, scale)
    np.testing.assert_allclose(one[0], other[0], rtol=1e-6)
    np.testing.assert_allclose(one[1], other[1], atol=1e-6 * float(np.abs(other[1]).max()) + 1e-7)


def test_no_array_of_all_pairs_is_made():
    nodes, block = 512, 16
    pairs = Neighbourhood(np.arange(nodes), np.arange(nodes), np.ones(nodes, np.float32))  # type: ignore[arg-type]
    codes, blocks = np.ones((nodes, WIDTH), np.float32), Computation(block=block)
    trace = jax.make_jaxpr(jax.grad(lambda z: neighbourhood_contrast(z, pairs, 1.0, computation=blocks)))(codes)
    assert f"{nodes},{nodes}" not in str(trace)
    assert f"{nodes},{block}" in str(trace)


def test_equal_codes_and_zero_scale_give_the_logarithms_of_the_card():
    gamma = weights(1)
    own = np.diag(gamma)
    expected = np.log(((NODES - 1) * math.e**0.7 + 1) / (math.e**0.7 * (1 - own) + own)).mean()
    assert contrast(np.tile(CODES[:1], (NODES, 1)), gamma, 0.7)[0] == pytest.approx(expected, rel=1e-5)
    for total, share in ((gamma, NODES), (gamma + gamma @ gamma, NODES / 2)):
        loss, gradient = contrast(CODES, total, 0.0)
        assert loss == pytest.approx(math.log(share), rel=1e-5)
        np.testing.assert_allclose(gradient, 0, atol=1e-7)


def test_a_complete_graph_teaches_nothing():
    loss, gradient = contrast(CODES, np.full((NODES, NODES), 1 / NODES, np.float32), 1.5)
    assert loss == pytest.approx(math.log(NODES), rel=1e-5)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


def test_an_edgeless_graph_only_pushes_apart():
    unit = CODES / np.linalg.norm(CODES, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, 0)
    loss = contrast(CODES, np.eye(NODES, dtype=np.float32), 1.0)[0]
    assert loss == pytest.approx(np.log(np.exp(cosines).sum(1)).mean(), rel=1e-5)


def test_it_is_invariant_to_scale_and_order_and_bounded():
    gamma, tau = weights(2), 1.3
    loss = contrast(CODES, gamma, tau)[0]
    assert contrast(7 * CODES, gamma, tau)[0] == pytest.approx(loss, rel=1e-6)
    order = np.random.default_rng(0).permutation(NODES)
    assert contrast(CODES[order], gamma[order][:, order], tau)[0] == pytest.approx(loss, rel=1e-6)
    lowest = math.log((NODES - 1) * math.exp(-tau) + 1) - tau
    assert lowest <= loss <= math.log((NODES - 1) * math.exp(tau) + 1) + tau


def test_codes_of_length_zero_are_no_nan():
    codes = CODES.copy()
    codes[3] = 0
    loss, gradient = contrast(codes, weights(0), 1.0)
    assert loss == pytest.approx(float(DENSE(codes, weights(0), 1.0)[0]), rel=1e-6)
    assert np.isfinite(gradient).all()
    with pytest.raises(UserError, match="want .N, d. and .P. three times"):
        neighbourhood_contrast(codes, Neighbourhood(np.zeros(3, int), np.zeros(2, int), np.ones(3)), 1.0)  # type: ignore[arg-type]


def test_student_assignments_by_hand_and_at_their_limits():
    assign = jax.jit(student_assignment)
    codes, centres = np.asarray([[0.0, 0.0], [3.0, 4.0]]), np.asarray([[0.0, 0.0], [0.0, 1.0]])
    by_hand = [[2 / 3, 1 / 3], [(1 / 26) / (1 / 26 + 1 / 19), (1 / 19) / (1 / 26 + 1 / 19)]]
    np.testing.assert_allclose(assign(codes, centres), by_hand, rtol=1e-6)
    np.testing.assert_allclose(assign(CODES, np.zeros((3, WIDTH), np.float32), 3.0), 1 / 3, rtol=1e-6)
    kernel = (1 + np.square(CODES[:, None] - CODES[:3]).sum(-1) / 3.0) ** -2
    np.testing.assert_allclose(assign(CODES, CODES[:3], 3.0), kernel / kernel.sum(1, keepdims=True), rtol=1e-5)


def test_targets_sharpen_and_one_hot_rows_stay():
    @jax.jit
    def whole(assignment):
        divergence = jax.value_and_grad(lambda q: cluster_divergence(q, sharpened_target(q)))(assignment)
        return sharpened_target(assignment), *divergence

    sure = np.eye(3, dtype=np.float32)[np.arange(150) % 3]
    target, divergence, _ = whole(sure)
    np.testing.assert_array_equal(target, sure)
    assert float(divergence) == 0
    half = np.random.default_rng(0).dirichlet(np.ones(3), 50).astype(np.float32)
    even = np.concatenate([half, np.roll(half, 1, 1), np.roll(half, 2, 1)])  # clusters of equal mass
    target, divergence, gradient = map(np.asarray, whole(even))
    np.testing.assert_array_equal(target.argmax(1), even.argmax(1))
    np.testing.assert_allclose(target, np.square(even) / np.square(even).sum(1, keepdims=True), rtol=1e-4)
    assert divergence == pytest.approx((target * np.log(target / even)).sum(1).mean(), rel=1e-4) and divergence > 0
    np.testing.assert_allclose(gradient, -target / even / len(even), rtol=1e-5, err_msg="a gradient flows into the target")
