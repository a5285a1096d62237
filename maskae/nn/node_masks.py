"""Which nodes of a graph are masked, and by what: GraphMAE's split into token, noise and untouched (Hou et al., KDD 2022, section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class NodeMask(NamedTuple):
    """The masked nodes M of N, all of which enter the loss, in draw order.

    `nodes` has room for the mask of N valid nodes; entries past the count of this graph are not `counted`.
    """

    nodes: jax.Array  # int32 [m]
    counted: jax.Array  # bool [m]
    masked: jax.Array  # bool [N]
    token: jax.Array  # bool [N]: replaced by the mask token
    noise: jax.Array | None = None  # bool [N]: replaced by the features of the node `donor`; None where no node is
    donor: jax.Array | None = None  # int32 [N]


def truncated_counts(share: float, largest: int, more: float = 0.0) -> np.ndarray:
    """int(share * n + more) for n = 0..largest in double precision, as the released code truncates; float32 on a device would differ."""
    return (share * np.arange(largest + 1, dtype=np.float64) + more).astype(np.int32)


def mask_nodes(
    order: jax.Array,
    count: jax.Array | int,
    mask_rate: float,
    replace_rate: float = 0.0,
    mixed: jax.Array | None = None,
    donors: jax.Array | None = None,
) -> NodeMask:
    """The mask that three permutations give, as in the released code, its truncations included: up to one masked node stays untouched.

    Args:
        order: int32 [N], a permutation with the `count` valid nodes first; the first int(mask_rate * count) of it are M.
        count: number of valid nodes.
        mask_rate: share p of masked nodes.
        replace_rate: share of M that is noise; 0 needs neither of the following.
        mixed: int32 [at least int(mask_rate * N)], a permutation of positions in M (positions past M last): the first
            int((1 - replace_rate) * |M|) get the token, the last int(replace_rate * |M|) become noise.
        donors: int32 [N], a permutation of the nodes, valid ones first: the features that the noise nodes get, in the order of `mixed`.
    """
    size = order.shape[0]
    largest = int(mask_rate * size)
    masked_count = jnp.asarray(truncated_counts(mask_rate, size))[count]
    place = jnp.argsort(order)  # [N]: of each node in the order
    masked = place < masked_count
    nodes, counted = order[:largest], jnp.arange(largest) < masked_count
    if replace_rate == 0 or mixed is None or donors is None:
        return NodeMask(nodes, counted, masked, masked)
    tokens = jnp.asarray(truncated_counts(1 - replace_rate, size))[masked_count]
    noisy = jnp.asarray(truncated_counts(replace_rate, size))[masked_count]
    second = jnp.argsort(mixed)[jnp.minimum(place, mixed.shape[0] - 1)]  # [N]: place in the second permutation, of masked nodes
    noise_place = second - (masked_count - noisy)
    noise = masked & (noise_place >= 0)
    return NodeMask(nodes, counted, masked, masked & (second < tokens), noise, donors[jnp.clip(noise_place, 0, size - 1)])


def draw_node_mask(draws: jax.Array, valid: jax.Array, mask_rate: float, replace_rate: float) -> NodeMask:
    """A mask over the valid nodes of a whole batch, jointly as in the released code, from uniform draws float32 [N, 3]."""
    order = jnp.argsort(jnp.where(valid, draws[:, 0], jnp.inf))
    count = valid.sum()
    if replace_rate == 0:
        return mask_nodes(order, count, mask_rate)
    masked_count = jnp.asarray(truncated_counts(mask_rate, valid.shape[0]))[count]
    # The draw belongs to the node, so that packing a batch tightly does not change who becomes what.
    own = draws[order, 1]
    mixed = jnp.argsort(jnp.where(jnp.arange(valid.shape[0]) < masked_count, own, jnp.inf))
    donors = jnp.argsort(jnp.where(valid, draws[:, 2], jnp.inf))
    return mask_nodes(order, count, mask_rate, replace_rate, mixed, donors)


def corrupt(features: jax.Array, mask: NodeMask, token: jax.Array) -> jax.Array:
    """Features [N, D] with the token [1, D] and other nodes' features put in; the donors give their ORIGINAL features."""
    if mask.noise is not None:
        features = jnp.where(mask.noise[:, None], features[mask.donor], features)
    return jnp.where(mask.token[:, None], token, features)
