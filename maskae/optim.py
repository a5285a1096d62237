"""Optimizers, gradient clipping and the moving average of parameters (learning rates: `maskae.schedules`).

An optimizer here is three pure functions. Its state is a plain nested dict that a checkpoint holds like parameters, and its update is

    updates = -schedule(step) * lr_scale(leaf) * direction(grads, state, params)

with the TRAIN step, not a count of its own: a step that is skipped (non-finite gradients) does not shift the schedule.
All work is leaf by leaf on nested dicts, so it runs under jit with any sharding.

Parameters are named by their path, `encoder/block_3/mlp/fc1/kernel`. A **vector** is a parameter whose last name is `bias` or
`scale` or that has at most one axis; class and mask tokens are not vectors (they are [1, 1, D] and do decay in MAE pre-training).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maskae.errors import UserError, nearest
from maskae.paths import flatten_paths, map_paths, unflatten_paths
from maskae.schedules import Schedule

Tree = Any


@dataclass(frozen=True)
class Optimizer:
    """A parameter update rule with its schedule.

    Attributes:
      init: `init(params) -> state`, a nested dict of arrays.
      update: `update(grads, state, params, step) -> (updates, state)`; `updates` are ADDED to the parameters (`optax.apply_updates`).
      schedule: `schedule(step) -> float32 scalar`, the learning rate of that train step (the first step is 0), for the log.
    """

    init: Callable[[Tree], Tree]
    update: Callable[[Tree, Tree, Tree, Any], tuple[Tree, Tree]]
    schedule: Schedule


def is_vector(path: str, leaf: Any) -> bool:
    """Whether a parameter is a bias, a norm's scale, or has at most one axis (a qkv bias is [3, heads, head_dim] and is one)."""
    return path.rsplit("/", 1)[-1] in ("bias", "scale") or leaf.ndim <= 1


def decay_mask(params: Tree, no_decay: Sequence[str] = ("vectors",)) -> Tree:
    """Tree of bool like `params`: True where weight decay applies.

    Args:
      params: the parameters (arrays or `ShapeDtypeStruct`).
      no_decay: last path names that do not decay; the word `vectors` stands for every vector. MAE pre-training uses
        `("vectors",)`, its fine-tuning `("vectors", "cls_token", "position")`, and `()` decays everything.

    Raises:
      UserError: a name that no parameter has.
    """
    names = {path.rsplit("/", 1)[-1] for path in flatten_paths(params)}
    for name in no_decay:
        if name != "vectors" and name not in names:
            raise UserError(f"no_decay names {name!r}, which no parameter is called{nearest(name, [*names, 'vectors'])}")

    def decays(path: str, leaf: Any) -> bool:
        return not (path.rsplit("/", 1)[-1] in no_decay or ("vectors" in no_decay and is_vector(path, leaf)))

    return map_paths(decays, params)


def layer_decay_scales(params: Tree, layer_decay: float, encoder: str = "encoder") -> Tree:
    """Tree of float like `params`: `layer_decay ** (n - group)` (Clark et al. 2020; as in MAE's fine-tuning, He et al. 2022).

    Group 0 holds the encoder's patch projection, class token and position table, group j + 1 its `block_j`, and group
    n = depth + 1 (scale 1) everything else: norms, heads, decoders.

    Raises:
      UserError: there is no `<encoder>/block_0`.
    """
    block = re.compile(rf"{re.escape(encoder)}/block_(\d+)/")
    first = re.compile(rf"{re.escape(encoder)}/(patch_embed|cls_token|position)(/|$)")
    depth = max((int(found[1]) + 1 for path in flatten_paths(params) if (found := block.match(path))), default=0)
    if depth == 0:
        raise UserError(f"layer decay needs parameters called {encoder}/block_0, {encoder}/block_1, ...; there are none")

    def scale(path: str, leaf: Any) -> float:
        if first.match(path):
            return layer_decay ** (depth + 1)
        found = block.match(path)
        return layer_decay ** (depth - int(found[1])) if found else 1.0

    return map_paths(scale, params)


def lr_scale_tree(params: Tree, layer_decay: float | None = None, lr_scales: Sequence[tuple[str, float]] = ()) -> Tree:
    """Tree of float like `params`: the factor on the learning rate of each parameter.

    Args:
      params: the parameters.
      layer_decay: see `layer_decay_scales`; None is no layer decay.
      lr_scales: `(pattern, factor)` pairs; the factor of the first pattern that `re.search` finds in the path also multiplies.

    Raises:
      UserError: a pattern that matches no parameter.
    """
    scales = layer_decay_scales(params, layer_decay) if layer_decay is not None else jax.tree.map(lambda _: 1.0, params)
    paths = list(flatten_paths(params))
    for pattern, _ in lr_scales:
        if not any(re.search(pattern, path) for path in paths):
            raise UserError(f"the learning-rate scale for {pattern!r} matches no parameter{nearest(pattern, paths)}")

    def factor(path: str, scale: float) -> float:
        return scale * next((value for pattern, value in lr_scales if re.search(pattern, path)), 1.0)

    return map_paths(factor, scales)


OPTIMIZERS = ("adamw", "adam", "lamb", "lars", "sgd", "nesterov")


def _trust_ratio(grads: Tree, params: Tree, trust: float) -> Tree:
    """LARS (You et al. 2017): `g * trust * |w| / |g|` per parameter, `g` where a norm is 0; vectors stay as they are."""

    def rescale(path: str, grad: jax.Array, param: jax.Array) -> jax.Array:
        if is_vector(path, param):
            return grad
        weight_norm = jnp.linalg.norm(param.astype(jnp.float32).ravel())
        grad_norm = jnp.linalg.norm(grad.astype(jnp.float32).ravel())
        usable = (weight_norm > 0) & (grad_norm > 0)
        return grad * jnp.where(usable, trust * weight_norm / jnp.where(usable, grad_norm, 1.0), 1.0).astype(grad.dtype)

    return map_paths(rescale, grads, params)


def _layer_adaptation(direction: Tree, params: Tree, mask: Tree) -> Tree:
    """LAMB (You et al. 2020): `u * |w| / |u|` per parameter that decays, `u` where a norm is 0 and for all others."""

    def rescale(way: jax.Array, param: jax.Array, decays: bool) -> jax.Array:
        if not decays:
            return way
        weight_norm, way_norm = (jnp.linalg.norm(x.astype(jnp.float32).ravel()) for x in (param, way))
        usable = (weight_norm > 0) & (way_norm > 0)
        return way * jnp.where(usable, weight_norm / jnp.where(usable, way_norm, 1.0), 1.0).astype(way.dtype)

    return jax.tree.map(rescale, direction, params, mask)


def _add_decay(grads: Tree, params: Tree, weight_decay: Any, mask: Tree) -> Tree:
    return jax.tree.map(lambda grad, param, decays: grad + weight_decay * param if decays else grad, grads, params, mask)


def make_optimizer(
    name: str,
    *,
    schedule: Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    momentum: float = 0.9,
    trust: float = 1e-3,
    weight_decay: float | Schedule = 0.0,
    no_decay: Sequence[str] = ("vectors",),
    layer_decay: float | None = None,
    lr_scales: Sequence[tuple[str, float]] = (),
    mu_dtype: str | None = None,
) -> Optimizer:
    """The optimizer called `name`, one of `OPTIMIZERS`, with PyTorch's semantics.

    - `adamw`: decoupled decay, `p -= lr * (adam(g) + weight_decay * p)` (Loshchilov & Hutter 2019); uses b1, b2, eps.
    - `lamb`: as adamw, then the whole step of a parameter that decays gets the length of the parameter (trust ratio |w| / |step|). The
      global clip of the released code lies before it, where `clip_by_global_norm` is.
    - `adam`: coupled L2, `g += weight_decay * p` before the moments; uses b1, b2, eps.
    - `sgd`, `nesterov`: coupled L2, `m = momentum * m + g`, `p -= lr * m` (nesterov: `lr * (g + momentum * m)`).
    - `lars`: coupled L2, then the trust ratio on everything but vectors, then as `sgd`; the learning rate stays OUTSIDE the
      momentum buffer, so a change of rate acts at once.

    Args:
      name: the rule.
      schedule: learning rate of a train step.
      b1, b2, eps: Adam's.
      momentum: of sgd, nesterov and lars; 0 keeps no buffer.
      trust: LARS' coefficient.
      weight_decay: see the rules; a number, or its schedule over train steps.
      no_decay: see `decay_mask`.
      layer_decay, lr_scales: see `lr_scale_tree`.
      mu_dtype: storage type of the first moment or momentum buffer, such as "bfloat16"; None keeps the gradients' type.

    Raises:
      UserError: unknown name; from `init` and `update`: a name or pattern that fits no parameter.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"unknown optimizer {name!r}{nearest(name, OPTIMIZERS)}; known: {', '.join(OPTIMIZERS)}")
    core: optax.GradientTransformation
    core, state_type = optax.identity(), optax.EmptyState
    decoupled = name in ("adamw", "lamb")
    if name in ("adamw", "adam", "lamb"):
        core, state_type = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype), optax.ScaleByAdamState
    elif momentum > 0:
        core, state_type = optax.trace(momentum, nesterov=name == "nesterov", accumulator_dtype=mu_dtype), optax.TraceState

    def init(params: Tree) -> Tree:
        decay_mask(params, no_decay), lr_scale_tree(params, layer_decay, lr_scales)  # bad names stop here, before anything is compiled
        # A dict, not the NamedTuple of optax: a checkpoint restored without the optimizer at hand keeps its names.
        return dict(core.init(params)._asdict())

    def update(grads: Tree, state: Tree, params: Tree, step: Any) -> tuple[Tree, Tree]:
        mask = decay_mask(params, no_decay)
        decay = weight_decay(step) if callable(weight_decay) else weight_decay
        if weight_decay and not decoupled:
            grads = _add_decay(grads, params, decay, mask)
        if name == "lars":
            grads = _trust_ratio(grads, params, trust)
        direction, moved = core.update(grads, state_type(**state), params)
        if weight_decay and decoupled:
            direction = _add_decay(direction, params, decay, mask)
            # Without decay LAMB is Adam.
            direction = _layer_adaptation(direction, params, mask) if name == "lamb" else direction
        rate = schedule(step)
        scales = lr_scale_tree(params, layer_decay, lr_scales)
        updates = jax.tree.map(lambda way, param, scale: (-rate * scale * way).astype(param.dtype), direction, params, scales)
        return updates, dict(moved._asdict())

    return Optimizer(init, update, schedule)


def partition(groups: Sequence[tuple[str, Optimizer]]) -> Optimizer:
    """One optimizer per group of parameters: a parameter belongs to the first pattern that `re.search` finds in its path.

    The state is `{"group_0": ..., "group_1": ...}`; `schedule` is that of the first group.

    Raises:
      UserError: from `init` and `update`: a parameter without a group, or a group without parameters.
    """

    def split(params: Tree) -> list[list[str]]:
        members: list[list[str]] = [[] for _ in groups]
        for path in flatten_paths(params):
            index = next((i for i, (pattern, _) in enumerate(groups) if re.search(pattern, path)), None)
            if index is None:
                raise UserError(f"no optimizer group matches the parameter {path}")
            members[index].append(path)
        for (pattern, _), paths in zip(groups, members, strict=True):
            if not paths:
                raise UserError(f"the optimizer group {pattern!r} matches no parameter{nearest(pattern, flatten_paths(params))}")
        return members

    def pick(tree: Tree, paths: list[str]) -> Tree:
        flat = flatten_paths(tree)
        return unflatten_paths({path: flat[path] for path in paths})

    def init(params: Tree) -> Tree:
        return {f"group_{i}": groups[i][1].init(pick(params, paths)) for i, paths in enumerate(split(params))}

    def update(grads: Tree, state: Tree, params: Tree, step: Any) -> tuple[Tree, Tree]:
        moved, updates = {}, {}
        for i, paths in enumerate(split(params)):
            key = f"group_{i}"
            change, moved[key] = groups[i][1].update(pick(grads, paths), state[key], pick(params, paths), step)
            updates.update(flatten_paths(change))
        return unflatten_paths(updates), moved

    return Optimizer(init, update, groups[0][1].schedule)


def clipped(optimizer: Optimizer, max_norm: float) -> Optimizer:
    """`optimizer` on gradients that `clip_by_global_norm` clips by the norm of its own parameters' alone; 0 leaves it."""
    if not max_norm:
        return optimizer

    def update(grads: Tree, state: Tree, params: Tree, step: Any) -> tuple[Tree, Tree]:
        return optimizer.update(clip_by_global_norm(grads, max_norm)[0], state, params, step)

    return dataclasses.replace(optimizer, update=update)


def clip_by_global_norm(grads: Tree, max_norm: float | None) -> tuple[Tree, jax.Array]:
    """Gradients scaled so that their joint L2 norm is at most `max_norm` (None or 0: unchanged), and their norm BEFORE that (float32)."""
    norm = optax.tree.norm(jax.tree.map(lambda grad: grad.astype(jnp.float32), grads))
    if not max_norm:
        return grads, norm
    factor = jnp.where(norm > max_norm, max_norm / norm, 1.0)
    return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads), norm


def ema_update(ema: Tree, params: Tree, decay: Any) -> Tree:
    """`decay * ema + (1 - decay) * params`, written so that equal trees stay exactly equal."""
    return jax.tree.map(lambda average, param: average + (1 - decay) * (param.astype(average.dtype) - average), ema, params)
