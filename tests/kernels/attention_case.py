"""Random attentions, and their values and gradients by numpy in float64."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskae.kernels.operands import Operands, Options

FEATURES = ("mask", "segments", "positions", "cap")


class Case(NamedTuple):
    """Options and operands of one attention, and the cotangents of its output and log-sum-exp."""

    options: Options
    operands: Operands
    d_out: jax.Array
    d_log_sum_exp: jax.Array


def make_case(shape: tuple[int, int, int, int, int], features: tuple[str, ...] = (), dtype: str = "float32", seed: int = 0) -> Case:
    """A case of `shape` (B, N, M, H, D); with a mask the first row of the batch has no key at all."""
    batch, queries, keys, heads, width = shape
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape), dtype)

    operands = Operands(normal(batch, queries, heads, width), normal(batch, keys, heads, width), normal(batch, keys, heads, width))
    if "mask" in features:
        key_mask = random.random((batch, keys)) < 0.6
        key_mask[0] = False
        operands = operands._replace(key_mask=jnp.asarray(key_mask))
    if "segments" in features:
        segments = [jnp.asarray(random.integers(-1, 3, (batch, length)), jnp.int32) for length in (queries, keys)]
        operands = operands._replace(query_segments=segments[0], key_segments=segments[1])
    if "positions" in features:
        positions = [jnp.asarray(random.integers(0, 5, (batch, length, 2)), jnp.float32) for length in (queries, keys)]
        slopes = jnp.asarray(random.random(heads) + 0.1, jnp.float32)
        operands = operands._replace(query_positions=positions[0], key_positions=positions[1], slopes=slopes)
    cotangents = normal(*operands.query.shape), jnp.asarray(random.normal(size=(batch, heads, queries)), jnp.float32)
    return Case(Options(width**-0.5, 2.0 if "cap" in features else None), operands, *cotangents)


def expected(case: Case) -> dict[str, np.ndarray]:
    """out, log_sum_exp and the gradients d_query, d_key, d_value and, with positions, d_slopes, in float64."""
    query, key, value, d_out, d_log_sum_exp = (np.asarray(each, np.float64) for each in (*case.operands[:3], *case[2:]))
    scores = np.einsum("bnhd,bmhd->bhnm", query, key) * case.options.scale
    distance = None
    if case.operands.slopes is not None:
        positions = [np.asarray(each, np.float64) for each in case.operands[6:8]]
        distance = np.linalg.norm(positions[0][:, :, None] - positions[1][:, None], axis=-1)[:, None]  # [B, 1, N, M]
        scores = scores - np.asarray(case.operands.slopes, np.float64)[:, None, None] * distance
    derivative = np.ones_like(scores)
    if case.options.soft_cap is not None:
        scores = case.options.soft_cap * np.tanh(scores / case.options.soft_cap)
        derivative = 1 - np.square(scores / case.options.soft_cap)
    weights = np.exp(scores) * _allowed(case.operands)
    total = weights.sum(-1)
    probabilities = weights / np.where(total == 0, 1, total)[..., None]
    with np.errstate(divide="ignore"):
        log_sum_exp = np.log(total)
    out = np.einsum("bhnm,bmhd->bnhd", probabilities, value)

    d_probabilities = np.einsum("bnhd,bmhd->bhnm", d_out, value)
    centre = (probabilities * d_probabilities).sum(-1) - d_log_sum_exp
    d_scores = probabilities * (d_probabilities - centre[..., None]) * derivative
    found = {
        "out": out,
        "log_sum_exp": log_sum_exp,
        "d_query": np.einsum("bhnm,bmhd->bnhd", d_scores, key) * case.options.scale,
        "d_key": np.einsum("bhnm,bnhd->bmhd", d_scores, query) * case.options.scale,
        "d_value": np.einsum("bhnm,bnhd->bmhd", probabilities, d_out),
    }
    return found if distance is None else found | {"d_slopes": -(d_scores * distance).sum((0, 2, 3))}


def _allowed(operands: Operands) -> np.ndarray:
    allowed = np.ones((operands.query.shape[0], 1, operands.query.shape[1], operands.key.shape[1]), bool)
    if operands.key_mask is not None:
        allowed &= np.asarray(operands.key_mask)[:, None, None]
    if operands.query_segments is not None:
        allowed &= (np.asarray(operands.query_segments)[:, :, None] == np.asarray(operands.key_segments)[:, None])[:, None]
    return allowed


def assert_close(found: dict[str, jax.Array], wanted: dict[str, np.ndarray], dtype: str) -> None:
    """Each array within 2e-5 (float32) or 3e-2 (bfloat16) of the largest value that is expected in it."""
    assert found.keys() == wanted.keys()
    bound = 2e-5 if dtype == "float32" else 3e-2
    for name, values in wanted.items():
        finite = np.isfinite(values)
        scale = max(1.0, np.abs(values[finite]).max(initial=0.0))
        got = np.asarray(found[name], np.float64)
        assert got.shape == values.shape
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(values), err_msg=name)
        np.testing.assert_allclose(got[finite], values[finite], rtol=0, atol=bound * scale, err_msg=name)
