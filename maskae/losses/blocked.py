"""Contrastive cross-entropy of every row, over all keys of the global batch, without the matrix of all pairs.

`row_losses` is the one primitive: for anchor i with logits z_ij = scale * q_i . k_j over the keys j that are allowed to it,
    loss_i = T_i * log sum_j exp(z_ij) - sum_j t_ij z_ij,    T_i = sum_j t_ij.
Three implementations give the same values and gradients: `plain` keeps [N, M] matrices and is what the others are tested against; `blocked`
scans over blocks of keys with a running log-sum-exp and computes each block again in the backward pass, so that memory is
O(N * (d + block)); `ring` does the same on every device's own rows while the keys travel around the devices, so that no device ever holds
all keys (the order of ring attention, Liu et al. 2023, arXiv 2310.01889, for the sum over keys).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from maskae.errors import UserError, nearest
from maskae.mesh import BATCH_AXES

IMPLEMENTATIONS = ("plain", "blocked", "ring")
# Stands for minus infinity in the running maximum: the difference of two infinities would be NaN.
LOWEST = -1e30


@dataclass(frozen=True)
class Computation:
    """How the pairs are computed.

    implementation: `plain`, `blocked` or `ring`.
    block: keys per step of `blocked` and `ring`; a block of logits is float32 [rows of this device, block].
    mesh: the devices of `ring`; the others do not read it.
    axes: the axes of `mesh` that the rows are split over.
    Raises UserError for an unknown implementation or axis, a block below 1, and a ring without a mesh.
    """

    implementation: str = "blocked"
    block: int = 512
    mesh: Mesh | None = None
    axes: tuple[str, ...] = BATCH_AXES

    def __post_init__(self) -> None:
        if self.implementation not in IMPLEMENTATIONS:
            hint = nearest(self.implementation, IMPLEMENTATIONS)
            raise UserError(f"contrastive loss: no implementation '{self.implementation}'{hint}; there are {', '.join(IMPLEMENTATIONS)}")
        if self.block < 1:
            raise UserError(f"contrastive loss: block={self.block}, which must be at least 1")
        if self.implementation == "ring" and self.mesh is None:
            raise UserError("contrastive loss: implementation 'ring' needs a mesh")
        if self.implementation == "ring" and self.mesh is not None:
            for axis in self.axes:
                if axis not in self.mesh.axis_names:
                    raise UserError(f"contrastive loss: the mesh has no axis '{axis}'{nearest(axis, self.mesh.axis_names)}")


class Anchors(NamedTuple):
    """What a query row is. position, label: int32 [N], a label below 0 leaves the row out; excluded: int32 [N, E], below 0 is nothing."""

    position: jax.Array
    label: jax.Array
    excluded: jax.Array


class Candidates(NamedTuple):
    """What a key row is: position, label and identifier, int32 [M] each; a label below 0 leaves the row out."""

    position: jax.Array
    label: jax.Array
    identifier: jax.Array


class Pairs(NamedTuple):
    """Everything about the pairs that carries no gradient. targets: float32 [N, M] by key position, or None: positives by equal label."""

    anchors: Anchors
    candidates: Candidates
    targets: jax.Array | None


@dataclass(frozen=True)
class _Plan:
    """The static part of the custom derivative's function."""

    computation: Computation
    exclude_self: bool
    key_gradient: bool


class _Sums(NamedTuple):
    """Running sums over the keys seen so far, float32 [N] each."""

    maximum: jax.Array
    exponentials: jax.Array
    target_logits: jax.Array
    targets: jax.Array


def row_losses(
    queries: jax.Array,
    keys: jax.Array,
    scale: jax.Array,
    pairs: Pairs,
    *,
    exclude_self: bool,
    key_gradient: bool,
    computation: Computation,
) -> tuple[jax.Array, jax.Array]:
    """The loss of each anchor and the sum of its targets (0: it has no positive and its loss is 0), both float32 [N].

    A pair is left out of denominator and targets where either label is below 0, where `exclude_self` and the positions are equal, and where
    the key's identifier is among the anchor's excluded ones; with positives by label a positive is never excluded. Positives by label weigh
    1/|P(i)| each; explicit targets are taken as they are, what is excluded counting as 0.

    Args:
        queries: [N, d], any float type. Products are summed in float32.
        keys: [M, d].
        scale: float32 scalar, 1/temperature.
        pairs: no gradient flows into it.
        exclude_self: for queries and keys that are the same rows.
        key_gradient: False is a stop-gradient on the keys, and saves its cost.
        computation: `blocked` and `ring` have reverse-mode derivatives of first order only.

    Raises:
        UserError: `ring` with rows that the devices do not divide.
    """
    if not key_gradient:
        keys = jax.lax.stop_gradient(keys)
    pairs = jax.lax.stop_gradient(pairs)
    if computation.implementation == "plain":
        return _plain(queries, keys, scale, pairs, exclude_self)
    if computation.implementation == "ring":
        shards = ring_size(computation)
        for name, rows in (("queries", queries), ("keys", keys)):
            if rows.shape[0] % shards:
                raise UserError(f"contrastive loss: {rows.shape[0]} {name} do not divide over the {shards} devices of the ring")
    return _streamed(_Plan(computation, exclude_self, key_gradient), queries, keys, scale, pairs)


def ring_size(computation: Computation) -> int:
    """Over how many devices the rows are split: 1 unless the implementation is `ring`."""
    if computation.implementation != "ring" or computation.mesh is None:
        return 1
    return math.prod(computation.mesh.shape[axis] for axis in computation.axes)


def _dot(contract: str, left: jax.Array, right: jax.Array) -> jax.Array:
    # The default on TPU and in TF32 rounds float32 operands to a short mantissa, which a scale of 100 turns into errors of whole logits.
    return jnp.einsum(contract, left, right, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _relation(pairs: Pairs, exclude_self: bool) -> tuple[jax.Array, jax.Array]:
    """Which keys each anchor sees, bool [N, M], and its targets on them before any normalisation, float32 [N, M]."""
    anchors, candidates, targets = pairs
    allowed = (anchors.label[:, None] >= 0) & (candidates.label >= 0)
    if exclude_self:
        allowed &= anchors.position[:, None] != candidates.position
    kept = jnp.ones_like(allowed)
    for column in range(anchors.excluded.shape[1]):
        named = anchors.excluded[:, column, None]
        kept &= (named != candidates.identifier) | (named < 0)
    if targets is None:
        positive = anchors.label[:, None] == candidates.label
        return allowed & (kept | positive), (allowed & positive).astype(jnp.float32)
    allowed &= kept
    # Padding has position -1, which would name the last column; its label is below 0, so that it is not allowed.
    columns = jnp.take(targets, jnp.maximum(candidates.position, 0), axis=1).astype(jnp.float32)  # [N, M]
    return allowed, jnp.where(allowed, columns, 0.0)


def _weight(total: jax.Array, pairs: Pairs) -> jax.Array:
    return 1 / jnp.maximum(total, 1) if pairs.targets is None else jnp.ones_like(total)


def _plain(
    queries: jax.Array, keys: jax.Array, scale: jax.Array, pairs: Pairs, exclude_self: bool
) -> tuple[jax.Array, jax.Array]:
    logits = scale * _dot("nd,md->nm", queries, keys)
    allowed, target = _relation(pairs, exclude_self)
    total = target.sum(1)
    normalizer = jax.nn.logsumexp(jnp.where(allowed, logits, LOWEST), axis=1)
    return _weight(total, pairs) * (total * normalizer - (target * logits).sum(1)), total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _streamed(plan: _Plan, queries: jax.Array, keys: jax.Array, scale: jax.Array, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
    return _streamed_forward(plan, queries, keys, scale, pairs)[0]


def _streamed_forward(
    plan: _Plan, queries: jax.Array, keys: jax.Array, scale: jax.Array, pairs: Pairs
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    rows = PartitionSpec(plan.computation.axes)
    run = _on_ring(plan, _forward, (rows, rows, PartitionSpec(), rows), (rows, rows, rows))
    loss, total, normalizer = run(queries, keys, scale, pairs)
    return (loss, total), (queries, keys, scale, pairs, total, normalizer)


def _streamed_backward(
    plan: _Plan, residuals: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    rows = PartitionSpec(plan.computation.axes)
    run = _on_ring(plan, _backward, (rows, rows, PartitionSpec(), rows, rows, rows, rows), (rows, rows, PartitionSpec()))
    queries, keys, scale = residuals[:3]
    to_queries, to_keys, to_scale = run(*residuals, cotangents[0])
    return to_queries.astype(queries.dtype), to_keys.astype(keys.dtype), to_scale.astype(scale.dtype), None


_streamed.defvjp(_streamed_forward, _streamed_backward)


def _on_ring(plan: _Plan, function: Any, in_specs: tuple[Any, ...], out_specs: tuple[Any, ...]) -> Any:
    """`function(plan, ...)` on this device's rows. The derivative is defined outside `shard_map`, so that no transpose of it is needed."""
    local = functools.partial(function, plan)
    if plan.computation.implementation != "ring":
        return local
    # Running sums start equal on all devices and differ after the first block, which the check of varying axes does not take.
    return jax.shard_map(local, mesh=plan.computation.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _rotate(plan: _Plan, tree: Any) -> Any:
    """Every array of `tree` moved to the next device of the ring."""
    size = ring_size(plan.computation)
    if size == 1:
        return tree
    steps = [(source, (source + 1) % size) for source in range(size)]
    return jax.tree.map(lambda array: jax.lax.ppermute(array, plan.computation.axes, steps), tree)


def _blocks(keys: jax.Array, candidates: Candidates, block: int) -> tuple[jax.Array, Candidates]:
    """Keys and candidates with a leading axis of blocks, padded with rows that no anchor sees (-1)."""
    block = min(block, keys.shape[0])
    missing = -keys.shape[0] % block
    padded = jnp.pad(keys, ((0, missing), (0, 0))).reshape(-1, block, keys.shape[1])  # [blocks, block, d]
    return padded, Candidates(*(jnp.pad(row, (0, missing), constant_values=-1).reshape(-1, block) for row in candidates))


def _forward(
    plan: _Plan, queries: jax.Array, keys: jax.Array, scale: jax.Array, pairs: Pairs
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss, sum of targets and log-sum-exp of this device's anchors, float32 [n] each."""

    def absorb(sums: _Sums, block: tuple[jax.Array, Candidates]) -> tuple[_Sums, None]:
        logits = scale * _dot("nd,md->nm", queries, block[0])  # [n, block]
        allowed, target = _relation(pairs._replace(candidates=block[1]), plan.exclude_self)
        maximum = jnp.maximum(sums.maximum, jnp.where(allowed, logits, LOWEST).max(1))
        exponentials = jnp.where(allowed, jnp.exp(logits - maximum[:, None]), 0).sum(1)
        return _Sums(
            maximum,
            sums.exponentials * jnp.exp(sums.maximum - maximum) + exponentials,
            sums.target_logits + (target * logits).sum(1),
            sums.targets + target.sum(1),
        ), None

    def turn(carry: tuple[_Sums, jax.Array, Candidates], _: None) -> tuple[tuple[_Sums, jax.Array, Candidates], None]:
        sums, held, candidates = carry
        arriving = _rotate(plan, (held, candidates))
        sums, _ = jax.lax.scan(absorb, sums, _blocks(held, candidates, plan.computation.block))
        return (sums, *arriving), None

    zero = jnp.zeros(queries.shape[0], jnp.float32)
    start = (_Sums(jnp.full_like(zero, LOWEST), zero, zero, zero), keys, pairs.candidates)
    (sums, _, _), _ = jax.lax.scan(turn, start, None, length=ring_size(plan.computation))
    seen = sums.exponentials > 0
    normalizer = jnp.where(seen, sums.maximum + jnp.log(jnp.where(seen, sums.exponentials, 1)), 0)
    return _weight(sums.targets, pairs) * (sums.targets * normalizer - sums.target_logits), sums.targets, normalizer


def _backward(
    plan: _Plan,
    queries: jax.Array,
    keys: jax.Array,
    scale: jax.Array,
    pairs: Pairs,
    total: jax.Array,
    normalizer: jax.Array,
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries and keys, float32 [n, d] and [m, d], and of the scale, from dz_ij = g_i (T_i p_ij - t_ij)."""
    row_weight = (cotangent * _weight(total, pairs))[:, None]  # [n, 1]
    wide_queries = queries.astype(jnp.float32)

    def absorb(to_queries: jax.Array, block: tuple[jax.Array, Candidates]) -> tuple[jax.Array, jax.Array | None]:
        logits = scale * _dot("nd,md->nm", queries, block[0])  # [n, block]
        allowed, target = _relation(pairs._replace(candidates=block[1]), plan.exclude_self)
        probabilities = jnp.where(allowed, jnp.exp(logits - normalizer[:, None]), 0)
        to_logits = row_weight * (total[:, None] * probabilities - target)
        to_keys = _dot("nm,nd->md", to_logits, wide_queries) if plan.key_gradient else None
        return to_queries + _dot("nm,md->nd", to_logits, block[0].astype(jnp.float32)), to_keys

    def turn(carry: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], None]:
        to_queries, held, candidates, to_held = carry
        arriving = _rotate(plan, (held, candidates))
        to_queries, to_blocks = jax.lax.scan(absorb, to_queries, _blocks(held, candidates, plan.computation.block))
        if to_blocks is not None:
            # The gradient travels with its keys and is at home again after the last turn.
            to_held = _rotate(plan, to_held + to_blocks.reshape(-1, held.shape[1])[: held.shape[0]])
        return (to_queries, *arriving, to_held), None

    to_keys = jnp.zeros(keys.shape if plan.key_gradient else (), jnp.float32)
    start = (jnp.zeros(queries.shape, jnp.float32), keys, pairs.candidates, to_keys)
    (to_queries, _, _, to_keys), _ = jax.lax.scan(turn, start, None, length=ring_size(plan.computation))
    to_scale = (to_queries * wide_queries).sum()
    if plan.computation.implementation == "ring":
        to_scale = jax.lax.psum(to_scale, plan.computation.axes)
    return scale * to_queries, jnp.broadcast_to(scale * to_keys, keys.shape), to_scale
