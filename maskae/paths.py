"""Leaves of nested dicts named by their path, `encoder/block_3/mlp/fc1/kernel`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def flatten_paths(tree: Any) -> dict[str, Any]:
    """`{"encoder/norm/scale": leaf, ...}` of a nested dict, in the tree's own order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten_paths(flat: dict[str, Any]) -> dict[str, Any]:
    """The nested dict of which `flat` is the `flatten_paths`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def map_paths(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`function(path, leaf, *other leaves)` on every leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(jax.tree_util.keystr(path, simple=True, separator="/"), *leaves), tree, *rest
    )
