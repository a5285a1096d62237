"""A stack of blocks: unrolled or scanned, with or without rematerialisation, over the same stored parameters `block_0`, `block_1`, ..."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maskae.errors import check_choice
from maskae.nn.layers import AttentionContext, DropPath
from maskae.nn.sharding import gather_parameters

REMAT_POLICIES = ("none", "dots", "full", "offload")
BLOCK_INPUT = "block_input"


def rematerialise(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Wrap a block so that the backward pass recomputes what the policy does not keep.

    "none" keeps everything, "dots" keeps the outputs of weight matmuls, "full" keeps only the block's input, "offload" keeps only that and
    keeps it in host memory. Raises UserError for another name.
    """
    check_choice("remat policy", policy, REMAT_POLICIES)
    policies = jax.checkpoint_policies
    if policy == "none":
        return function
    if policy == "dots":
        return jax.checkpoint(function, policy=policies.dots_with_no_batch_dims_saveable)
    if policy == "full":
        return jax.checkpoint(function, policy=policies.nothing_saveable)
    host = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[BLOCK_INPUT], offload_src="device", offload_dst="pinned_host"
    )
    return jax.checkpoint(function, policy=host)


def cast_for_compute(params: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """A block's parameters in the compute dtype, norms left in float32 because they compute in it."""

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf if str(path[0].key).startswith("norm") else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def drop_path_rates(rate: float, depth: int) -> jax.Array:
    """float32 [depth]: 0 at the first block, rising linearly to `rate` at the last."""
    return jnp.linspace(0.0, rate, depth)


def drop_path_draws(key: jax.Array, example: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform draws float32 [*shape, B] of stochastic depth, those of row i from `fold_in(key, example[i])`; `example` int32 [B].

    `shape` is (depth, 2) for the two branches of transformer blocks.
    """
    return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), shape), out_axes=-1)(example)


def run_blocks(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    x: jax.Array,
    *,
    position: jax.Array | None = None,
    beside: Any = None,
    drop: DropPath | None = None,
    context: AttentionContext | None = None,
    scan: bool = False,
    remat: str = "none",
    collect: bool = False,
) -> tuple[jax.Array, Any]:
    """Apply `module`'s blocks, equal but for their parameters, one after the other.

    With `scan` the blocks' parameters are cast to the compute dtype, stacked and scanned inside the program: one block is compiled instead
    of `depth`. Scanning keeps every residual of the body, so it wants `remat` at least "dots".

    Args:
        module: the owner, whose parameters hold one dict `block_{i}` per block.
        blocks: submodules of `module` named `block_{i}`.
        x: [B, N, D] tokens.
        position: added to the input of every block, broadcastable to [B, N, D] (Yu et al. 2022, Point-BERT).
        beside: the second argument of every block: for `Block` what is added to its scores, broadcastable to [B, heads, N, N]; for blocks
            that look elsewhere what they look at.
        drop: rates [depth] and draws [depth, 2, B].
        context: masks, segments and positions of the tokens, the same for every block.
        collect: also return every block's output.

    Returns:
        The last block's output [B, N, D], and with `collect` all outputs (a list, or [depth, B, N, D] from a scan), else None.
    """
    check_choice("remat policy", remat, REMAT_POLICIES)
    if module.is_initializing():
        for block in blocks:
            apply_block: Any = block
            x = apply_block(x if position is None else x + position, beside)
        return x, None
    names = [str(block.name) for block in blocks]
    params = [module.variables["params"][name] for name in names]
    # Blocks of other kinds need not know of it.
    options: dict[str, Any] = {} if context is None else {"context": context}
    plain: Any = blocks[0].clone(parent=None, name=None)

    def apply(x: jax.Array, block_params: dict[str, Any], block_drop: DropPath | None) -> jax.Array:
        x = checkpoint_name(x, BLOCK_INPUT)
        x = x if position is None else x + position
        return plain.apply({"params": gather_parameters(block_params)}, x, beside, block_drop, **options)

    step = rematerialise(apply, remat)
    if not scan:
        outputs = []
        for index, (name, block_params) in enumerate(zip(names, params, strict=True)):
            with jax.named_scope(name):
                x = step(x, block_params, None if drop is None else DropPath(drop.rate[index], drop.draws[index]))
            outputs.append(x)
        return x, outputs if collect else None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(cast_for_compute(each, plain.dtype) for each in params))

    def body(x: jax.Array, of_block: tuple[dict[str, Any], DropPath | None]) -> tuple[jax.Array, jax.Array | None]:
        x = step(x, *of_block)
        return x, x if collect else None

    return jax.lax.scan(body, x, (stacked, drop))
