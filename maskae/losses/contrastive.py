"""Contrastive losses over the global batch: InfoNCE, also against a queue, NT-Xent, SupCon and SelfCon.

Embeddings come L2-normalised from the caller. `scale` is 1/temperature, a number or a float32 scalar that gradients flow into: pass
`1 / temperature` or `exp(logit_scale)` for a learnable one. Rows are those of the global batch, split over devices or not; `computation`
chooses how the pairs are computed (maskae.losses.blocked) and changes neither value nor gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maskae.errors import UserError
from maskae.losses.blocked import Anchors, Candidates, Computation, Pairs, row_losses


def info_nce(
    queries: jax.Array,
    keys: jax.Array,
    scale: jax.Array | float,
    *,
    two_way: bool = True,
    soft_targets: jax.Array | None = None,
    excluded: jax.Array | None = None,
    identifiers: jax.Array | None = None,
    stop_key_gradient: bool = False,
    computation: Computation | None = None,
) -> jax.Array:
    """Mean over queries of the cross-entropy of scale * q_i . k_j against key i (van den Oord et al. 2018, arXiv 1807.03748, equation 4).

    Args:
        queries, keys: [B, d]; row i of one belongs to row i of the other.
        two_way: the mean of this loss and of that with queries and keys exchanged (CLIP, Radford et al. 2021, figure 3).
        soft_targets: [B, B], row i the wanted distribution over the keys in place of key i alone; its transpose in the other direction.
            It is itself the size of all pairs: only what is computed from it is kept small. No gradient flows into it. Queries whose
            targets are all 0 are not counted in the mean.
        excluded: int32 [B, E] (or [B]): query i does not see the keys whose identifier is among excluded[i]; below 0 is nothing. Key i
            itself is always seen, unless soft targets are given. In the other direction row i has the same list.
        identifiers: int32 [B]; the row number in the global batch by default, which makes `excluded` a list of rows. With a group's number
            as both, rows of the same group are no negatives of each other.
        stop_key_gradient: each embedding learns in its role as query only, in both directions.

    Returns:
        float32 scalar.

    Raises:
        UserError: shapes that do not fit.
    """
    if queries.ndim != 2 or queries.shape != keys.shape:
        raise UserError(f"info_nce: queries {queries.shape} and keys {keys.shape} must be of one shape [B, d]")
    rows = queries.shape[0]
    if soft_targets is not None and soft_targets.shape != (rows, rows):
        raise UserError(f"info_nce: soft_targets {soft_targets.shape} must be of shape [{rows}, {rows}]")
    pairs = _pairs(jnp.arange(rows, dtype=jnp.int32), excluded, identifiers, 1)

    def one_way(left: jax.Array, right: jax.Array, targets: jax.Array | None) -> jax.Array:
        return _mean_of_anchors(left, right, scale, pairs._replace(targets=targets), stop_key_gradient, computation)

    forward = one_way(queries, keys, soft_targets)
    if not two_way:
        return forward
    return (forward + one_way(keys, queries, None if soft_targets is None else soft_targets.T)) / 2


def grouped_info_nce(queries: jax.Array, keys: jax.Array, scale: float, group: int | None) -> jax.Array:
    """`info_nce` in both directions within groups of `group` consecutive rows of [B, d]: a paper's batch on one device, whatever ours is.

    Of no more rows than one group, or with None, it is that of the whole batch. Raises UserError where groups do not tile the batch.
    """
    if group is None or len(queries) <= group:
        return info_nce(queries, keys, scale)
    if len(queries) % group:
        raise UserError(f"a batch of {len(queries)} is not made of contrastive groups of group_size={group}")
    scores = jnp.einsum("gid,gjd->gij", *(x.reshape(-1, group, x.shape[-1]) for x in (queries, keys))) * scale  # [G, g, g]
    both = jax.nn.logsumexp(scores, 1) + jax.nn.logsumexp(scores, 2)
    return (both / 2 - jnp.diagonal(scores, axis1=1, axis2=2)).mean()


def queue_info_nce(
    queries: jax.Array,
    keys: jax.Array,
    queue: jax.Array,
    scale: jax.Array | float,
    *,
    filled: jax.Array | int | None = None,
    batch_negatives: bool = False,
    stop_key_gradient: bool = True,
    computation: Computation | None = None,
) -> jax.Array:
    """Cross-entropy of query i's own key against the keys of earlier batches (MoCo, He et al. 2020, arXiv 1911.05722, equation 1).

    Args:
        queries, keys: [B, d]; row i of one belongs to row i of the other.
        queue: [K, d], of the dtype of `keys`; no gradient flows into it. See `enqueue`.
        filled: int32 scalar, how many of its first rows hold keys; None for all.
        batch_negatives: the other keys of this batch are negatives too. Without it they are computed, B * B pairs beside B * K, and then
            left out.
        stop_key_gradient: True for keys of a momentum encoder.
        computation: a ring's devices must divide B and K.

    Returns:
        float32 scalar, the mean over queries.

    Raises:
        UserError: shapes that do not fit.
    """
    if queries.ndim != 2 or queries.shape != keys.shape or queue.ndim != 2 or queue.shape[1] != keys.shape[1]:
        shapes = f"queries {queries.shape}, keys {keys.shape} and queue {queue.shape}"
        raise UserError(f"queue_info_nce: {shapes} must be of shapes [B, d], [B, d] and [K, d]")
    rows, length = queries.shape[0], queue.shape[0]
    own, place = jnp.arange(rows, dtype=jnp.int32), jnp.arange(length, dtype=jnp.int32)
    # No query has the label of the queue; below 0 is left out.
    held = jnp.where(place < (length if filled is None else filled), rows, -1).astype(jnp.int32)
    # All keys of the batch have identifier 0, which every query excludes; a positive is never excluded.
    excluded = jnp.zeros((rows, 0 if batch_negatives else 1), jnp.int32)
    identifier = jnp.concatenate([jnp.zeros_like(own), jnp.ones_like(place)])
    candidates = Candidates(jnp.arange(rows + length, dtype=jnp.int32), jnp.concatenate([own, held]), identifier)
    everything = jnp.concatenate([keys, jax.lax.stop_gradient(queue).astype(keys.dtype)])  # [B + K, d]
    return _mean_of_anchors(
        queries, everything, scale, Pairs(Anchors(own, own, excluded), candidates, None), stop_key_gradient, computation
    )


def enqueue(queue: jax.Array, pointer: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The queue [K, d] with `keys` [B, d] in place of its oldest rows, from `pointer` (int32 scalar) on, and the next pointer.

    The order of the keys is that of the global batch. Raises UserError where more keys come than the queue holds.
    """
    length, rows = queue.shape[0], keys.shape[0]
    if rows > length:
        raise UserError(f"enqueue: {rows} keys do not fit into a queue of {length}")
    places = (pointer + jnp.arange(rows)) % length
    return queue.at[places].set(jax.lax.stop_gradient(keys).astype(queue.dtype)), (pointer + rows) % length


def nt_xent(
    first: jax.Array,
    second: jax.Array,
    scale: jax.Array | float,
    *,
    excluded: jax.Array | None = None,
    identifiers: jax.Array | None = None,
    stop_key_gradient: bool = False,
    computation: Computation | None = None,
) -> jax.Array:
    """Two views of each example against all 2B - 1 other embeddings (SimCLR, Chen et al. 2020, arXiv 2002.05709, equation 1).

    Args:
        first, second: [B, d].
        excluded, identifiers: as for `info_nce`, of examples: both views of an excluded example are left out.
        stop_key_gradient: as for `info_nce`.

    Returns:
        float32 scalar, the mean over the 2B embeddings.

    Raises:
        UserError: shapes that do not fit.
    """
    embeddings = _stack("nt_xent", first, second)
    stop = stop_key_gradient
    return sup_con(
        embeddings, None, scale, excluded=excluded, identifiers=identifiers, stop_key_gradient=stop, computation=computation
    )


def self_con(
    early: jax.Array,
    final: jax.Array,
    labels: jax.Array | None,
    scale: jax.Array | float,
    *,
    computation: Computation | None = None,
) -> jax.Array:
    """SupCon whose two views are two exits of one network on one image (Bae et al. 2021, arXiv 2106.15499).

    Args:
        early, final: [B, d], the embeddings of the early exit and of the whole network.
        labels: as for `sup_con`; None is the form without labels.

    Returns:
        float32 scalar, the mean over the 2B embeddings (those with a label).

    Raises:
        UserError: shapes that do not fit.
    """
    return sup_con(_stack("self_con", early, final), labels, scale, computation=computation)


def sup_con(
    embeddings: jax.Array,
    labels: jax.Array | None,
    scale: jax.Array | float,
    *,
    excluded: jax.Array | None = None,
    identifiers: jax.Array | None = None,
    stop_key_gradient: bool = False,
    computation: Computation | None = None,
) -> jax.Array:
    """Mean over anchors of -1/|P| sum over positives of the log-softmax over all others (Khosla et al. 2020, arXiv 2004.11362, L_out).

    Args:
        embeddings: [B, V, d], V views of each example; each of the B * V is an anchor and sees all but itself.
        labels: int32 [B]; positives are all other embeddings of the same label. Examples with a label below 0 are left out, as anchors and
            as keys, which restricts the loss to a subset at a fixed shape. None: the other views of the same example.
        excluded, identifiers: int32 [B, E] and [B] as for `info_nce`; positives are never excluded.
        stop_key_gradient: each embedding learns in its role as anchor only.

    Returns:
        float32 scalar; anchors without a positive are not counted, and 0 where there are none.

    Raises:
        UserError: shapes that do not fit.
    """
    if embeddings.ndim != 3:
        raise UserError(f"contrastive loss: embeddings {embeddings.shape} must be of shape [B, V, d]")
    examples, views, width = embeddings.shape
    labels = jnp.arange(examples, dtype=jnp.int32) if labels is None else labels
    if labels.shape != (examples,):
        raise UserError(f"contrastive loss: labels {labels.shape} must be of shape [{examples}]")
    flat = embeddings.reshape(examples * views, width)  # [B * V, d]
    pairs = _pairs(labels, excluded, identifiers, views)
    return _mean_of_anchors(flat, flat, scale, pairs, stop_key_gradient, computation, exclude_self=True)


def _stack(name: str, first: jax.Array, second: jax.Array) -> jax.Array:
    if first.ndim != 2 or first.shape != second.shape:
        raise UserError(f"{name}: {first.shape} and {second.shape} must be of one shape [B, d]")
    return jnp.stack([first, second], 1)  # [B, 2, d]


def _pairs(labels: jax.Array, excluded: jax.Array | None, identifiers: jax.Array | None, views: int) -> Pairs:
    """The description of B examples with `views` rows each, the rows of an example side by side (so that a split by example stays one)."""
    examples = labels.shape[0]
    if identifiers is not None and excluded is None:
        raise UserError("contrastive loss: identifiers are given without what is excluded")
    excluded = jnp.zeros((examples, 0), jnp.int32) if excluded is None else excluded
    excluded = excluded[:, None] if excluded.ndim == 1 else excluded
    identifiers = jnp.arange(examples, dtype=jnp.int32) if identifiers is None else identifiers
    if excluded.ndim != 2 or excluded.shape[0] != examples or identifiers.shape != (examples,):
        shapes = f"excluded {excluded.shape} and identifiers {identifiers.shape}"
        raise UserError(f"contrastive loss: {shapes} must be of shapes [{examples}, E] and [{examples}]")
    position = jnp.arange(examples * views, dtype=jnp.int32)
    label, excluded, identifier = (jnp.repeat(rows, views, axis=0) for rows in (labels, excluded, identifiers))
    return Pairs(Anchors(position, label, excluded), Candidates(position, label, identifier), None)


def _mean_of_anchors(
    queries: jax.Array,
    keys: jax.Array,
    scale: jax.Array | float,
    pairs: Pairs,
    stop_key_gradient: bool,
    computation: Computation | None,
    exclude_self: bool = False,
) -> jax.Array:
    """The mean loss of the rows of `queries` that have a positive among `keys`; 0 where there are none."""
    loss, total = row_losses(
        queries,
        keys,
        jnp.asarray(scale, jnp.float32),
        pairs,
        exclude_self=exclude_self,
        key_gradient=not stop_key_gradient,
        computation=computation or Computation(),
    )
    return loss.sum() / jnp.maximum((total > 0).sum(), 1)
