"""MAE's fine-tuning and linear probing replayed on a reference case, through the systems and optimizers that a run uses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskae.errors import UserError
from maskae.interop.case import GRADIENT, Case, Reproduced
from maskae.interop.layout import Geometry, from_foreign
from maskae.interop.record import (
    adam_constants,
    check_qkv_bias,
    image_size_of,
    numbers_of,
    official_names,
    recorded_schedule,
    train,
    trained_outputs,
)
from maskae.interop.vit import LAYOUTS
from maskae.losses.classification import label_smoothing_cross_entropy, soft_target_cross_entropy
from maskae.nn.stack import drop_path_rates
from maskae.optim import Optimizer, make_optimizer
from maskae.paths import flatten_paths, unflatten_paths
from maskae.systems.mae_finetune import FineTune
from maskae.systems.mae_probe import LinearProbe

Tree = Any


def train_on(gradient: Any, optimizer: Optimizer, params: Tree, state: Tree, steps: int) -> tuple[Tree, Tree, np.ndarray]:
    """`steps` full-batch steps: `gradient(params, state) -> ((loss, state), grads)`. Returns parameters, state, and each step's loss."""

    @jax.jit
    def one(params: Tree, state: Tree, opt: Tree, step: jax.Array) -> tuple[Tree, Tree, Tree, jax.Array]:
        (loss, state), grads = gradient(params, state)
        updates, opt = optimizer.update(grads, opt, params, step)
        return jax.tree.map(jnp.add, params, updates), state, opt, loss

    opt, losses = optimizer.init(params), []
    for step in range(steps):
        params, state, opt, loss = one(params, state, opt, jnp.int32(step))
        losses.append(float(loss))
    return params, state, np.asarray(losses)


def finetune_system(case: Case) -> FineTune:
    """The fine-tuned network of a case."""
    shape, options = case.record["constructor"], case.record["finetune"]
    check_qkv_bias(case, options)
    return FineTune(
        image_size=image_size_of(options),
        channels=shape["in_chans"],
        patch_size=shape["patch_size"],
        width=shape["embed_dim"],
        depth=shape["depth"],
        heads=shape["num_heads"],
        mlp_ratio=shape["mlp_ratio"],
        num_classes=options["num_classes"],
        drop_path=options["drop_path_rate"],
        pool="mean" if options["global_pool"] else "cls",
    )


def finetune_params(case: Case, system: FineTune) -> Tree:
    """The recorded weights: the pre-training encoder's, and where they differ those named `finetune.`. Raises UserError where any lacks."""
    tensors = {name: value for name, value in case.weights.items() if not name.startswith(("finetune.", "probe."))}
    tensors |= {name.removeprefix("finetune."): value for name, value in case.weights.items() if name.startswith("finetune.")}
    template = flatten_paths(jax.eval_shape(system.init, jax.random.key(0), {}).params)
    params, report = from_foreign(tensors, template, LAYOUTS["paper"], Geometry(system.patch_size, system.grid))
    if report.missing or report.mismatched:
        raise UserError(f"the case's fine-tuning weights do not fit: {', '.join(report.missing + report.mismatched)}")
    return jax.tree.map(jnp.asarray, unflatten_paths(params))


def drop_path_draws(case: Case, rates: np.ndarray) -> jax.Array:
    """The recorded draws [2 * blocks with rate > 0, B] as [depth, 2, B]; blocks at rate 0 drew none and keep both branches anyway."""
    batch = len(case.inputs["ft_imgs"])
    draws = np.zeros((len(rates), 2, batch), np.float32)
    if (rates > 0).any():
        draws[rates > 0] = case.inputs["ft_drop_path_u"].reshape(-1, 2, batch)
    return jnp.asarray(draws)


def replay_finetune(case: Case) -> dict[str, Reproduced]:
    """Every output `ft_*` of the case: forward, losses, gradients, stochastic depth, and the training with layer decay."""
    system = finetune_system(case)
    params = finetune_params(case, system)
    geometry = Geometry(system.patch_size, system.grid)
    images = jnp.asarray(case.inputs["ft_imgs"].transpose(0, 2, 3, 1))  # [B, H, W, C]
    targets = jnp.asarray(case.inputs["ft_soft_targets"])
    stated = case.meaning("ft_loss_smooth")
    (smoothing,) = numbers_of(stated, r"LabelSmoothingCrossEntropy\(([\d.]+)\)") if stated else (0.0,)
    rates = np.asarray(drop_path_rates(system.drop_path, system.depth))

    @jax.jit
    def forward(params: Tree) -> dict[str, jax.Array]:
        named = system.forward(params, images)
        labels = jnp.asarray(case.inputs["ft_labels"])
        losses = {"ft_loss_soft": soft_target_cross_entropy(named["logits"], targets)}
        losses |= {"ft_loss_smooth": label_smoothing_cross_entropy(named["logits"], labels, smoothing)}
        dropped = system.forward(params, images, drop_path_draws(case, rates))["logits"]
        return losses | {"ft_features": named["pooled"], "ft_logits": named["logits"], "ft_logits_drop_path": dropped}

    outputs = {name: Reproduced(value) for name, value in forward(params).items()}
    outputs["ft_drop_path_rates"] = Reproduced(rates)

    still = replace(system, drop_path=0.0)
    batch = {"image": images, "soft_label": targets, "label": targets.argmax(-1), "example": jnp.arange(len(images))}

    def loss(params: Tree, number: jax.Array) -> jax.Array:
        return still.loss(params, {}, batch, jax.random.key(0), number)[0]

    for name, value in official_names(jax.jit(jax.grad(loss))(params, jnp.int32(0)), geometry).items():
        outputs[f"ft_grad/{name}"] = Reproduced(value, relative=GRADIENT)
    return outputs | _train_finetune(case, loss, params, geometry)


def _train_finetune(case: Case, loss: Any, params: Tree, geometry: Geometry) -> dict[str, Reproduced]:
    options = case.record["finetune"]
    schedule, constants = recorded_schedule(options), adam_constants(options["optimizer"])
    optimizer = make_optimizer(
        "adamw",
        schedule=schedule,
        **constants,
        weight_decay=options["weight_decay"],
        no_decay=("vectors", "cls_token", "position"),
        layer_decay=options["layer_decay"],
    )
    trained = train(loss, optimizer, schedule, params, range(options["steps"]), constants["b2"])
    return trained_outputs(trained, lambda tree: official_names(tree, geometry), "ft_train_")


def probe_system(case: Case) -> LinearProbe:
    """The probe of a case."""
    shape = case.record["constructor"]
    return LinearProbe(
        image_size=image_size_of(shape),
        channels=shape["in_chans"],
        patch_size=shape["patch_size"],
        width=shape["embed_dim"],
        depth=shape["depth"],
        heads=shape["num_heads"],
        mlp_ratio=shape["mlp_ratio"],
        num_classes=case.weights["probe.1.weight"].shape[0],
    )


def top_percent(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of rows [N, K] whose label [N] is among the `k` largest, in percent."""
    best = np.argsort(-logits, axis=1)[:, :k]  # [N, k]
    return 100 * float((best == labels[:, None]).any(1).mean())


def replay_probe(case: Case) -> dict[str, Reproduced]:
    """Every output `probe_*` of the case that is about the head: step 0, the training with LARS, and the evaluation after it."""
    system, options = probe_system(case), case.record["linear_probe"]
    pooled, labels = jnp.asarray(case.inputs["probe_features"]), jnp.asarray(case.inputs["probe_labels"])
    weight, bias = case.weights["probe.1.weight"], case.weights["probe.1.bias"]
    params: Tree = {"head": {"kernel": jnp.asarray(weight.T), "bias": jnp.asarray(bias)}}
    statistics = {"mean": jnp.zeros(system.width), "variance": jnp.ones(system.width)}

    def gradient(params: Tree, statistics: Tree) -> tuple[tuple[jax.Array, Tree], Tree]:
        (loss, classified), grads = jax.value_and_grad(system.loss_of_features, has_aux=True)(params, statistics, pooled, labels)
        return (loss, classified.statistics), grads

    first = system.classify(params, statistics, pooled, train=True).logits
    first_gradient = jax.jit(gradient)(params, statistics)[1]["head"]["kernel"].T
    schedule, steps = recorded_schedule(options), options["steps"]
    momentum, trust = numbers_of(options["optimizer"], r"LARS momentum ([\d.]+) trust ([\d.]+)")
    optimizer = make_optimizer("lars", schedule=schedule, momentum=momentum, trust=trust, weight_decay=options["weight_decay"])
    params, statistics, losses = train_on(gradient, optimizer, params, statistics, steps)
    logits = system.classify(params, statistics, pooled, train=False).logits
    accuracies = [top_percent(np.asarray(logits), np.asarray(labels), k) for k in (1, 5)]
    return {
        "probe_logits_step0": Reproduced(first),
        "probe_grad_step0": Reproduced(first_gradient, relative=GRADIENT),
        "probe_losses": Reproduced(losses),
        "probe_lrs": Reproduced(np.asarray([float(schedule(step)) for step in range(steps)])),
        "probe_weight": Reproduced(params["head"]["kernel"].T),
        "probe_bias": Reproduced(params["head"]["bias"]),
        "probe_running_mean": Reproduced(statistics["mean"]),
        "probe_running_var": Reproduced(statistics["variance"]),
        "probe_logits_eval": Reproduced(logits),
        "probe_acc1_acc5": Reproduced(np.asarray(accuracies)),
    }
