"""Point-CMAE's reference cases; Point-MAE's and its weight names are in `point_layout`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskae.errors import UserError
from maskae.interop.case import GRADIENT, Case, Reproduced, exact
from maskae.interop.layout import Layout, from_foreign, to_foreign
from maskae.interop.point_layout import CLASSIFIER, GEOMETRY, LINEAR_CLASSIFIER, POINT_CMAE
from maskae.losses.agreement import PAIRINGS, token_agreement
from maskae.losses.chamfer import chamfer_distance
from maskae.losses.classification import label_smoothing_cross_entropy
from maskae.masking import Mask, random_mask, removed_indices, take_tokens
from maskae.nn.batch_norm import STATISTICS
from maskae.nn.point_augmentations import scale_and_shift
from maskae.nn.points import Groups, farthest_point_sampling
from maskae.optim import decay_mask
from maskae.paths import flatten_paths, unflatten_paths
from maskae.schedules import unshifted_cosine
from maskae.systems.contract import Params, Variables
from maskae.systems.point_classifier import PointClassifier
from maskae.systems.point_cmae import PointCmae

# proj_cls, a head on the CLS token that feeds no loss: two linear maps and a batch norm.
DEAD_DECAYING, DEAD_OTHERS = 2, 4


def load(tensors: Mapping[str, np.ndarray], system: Any, layout: Layout) -> Variables:
    """Official tensors by name as the variables of a system that is not frozen, float64 where that is switched on, else float32.

    Raises UserError naming what is missing or does not fit.
    """
    fresh = jax.eval_shape(system.init, jax.random.key(0), {})
    template = flatten_paths({**fresh.params, **fresh.state})
    flat, report = from_foreign(dict(tensors), template, layout, GEOMETRY)
    if wrong := report.mismatched + [f"{name} is missing" for name in report.missing]:
        raise UserError(f"the weights do not fit the model: {'; '.join(wrong[:3])}")
    tree = unflatten_paths({path: jnp.asarray(value, float) for path, value in flat.items()})
    state = {STATISTICS: {"head": {}, **tree.pop(STATISTICS)}} if "head" in tree else {STATISTICS: tree.pop(STATISTICS)}
    return Variables(tree, state)


def official_names(params: Params, layout: Layout = POINT_CMAE) -> dict[str, np.ndarray]:
    """Parameters, gradients or statistics under the names and in the shapes of the released code."""
    flat = {path: np.asarray(leaf) for path, leaf in flatten_paths(params).items()}
    return {name: np.asarray(value) for name, value in to_foreign(flat, layout, GEOMETRY)[0].items()}


def sizes_of(case: Case) -> dict[str, Any]:
    """The arguments that pre-training and classification share, to be used under `jax.enable_x64`."""
    model = case.record["config"]["model"]
    transformer = model["transformer_config"]
    return {
        "groups": model["num_group"],
        "group_size": model["group_size"],
        "width": transformer["trans_dim"],
        "depth": transformer["depth"],
        "heads": transformer["num_heads"],
        "drop_path": transformer["drop_path_rate"],
        "dtype": "float64",
    }


def system_of(case: Case, pairing: str = "all") -> PointCmae:
    """The system with the case's own options; the released code compares all pairs."""
    config = case.record["config"]
    transformer = config["model"]["transformer_config"]
    reconstruction, agreement = config["loss_weights"]
    return PointCmae(
        **sizes_of(case),
        decoder_depth=transformer["decoder_depth"],
        decoder_heads=transformer["decoder_num_heads"],
        mask_ratio=transformer["mask_ratio"],
        masker={"rand": "random"}.get(transformer["mask_type"], transformer["mask_type"]),
        chamfer=config["model"]["loss"].removeprefix("cd"),
        reconstruction_weight=reconstruction,
        agreement_weight=agreement,
        pairing=pairing,
    )


def augmented_points(case: Case) -> jax.Array:
    """The recorded clouds with the recorded scales and shifts."""
    return scale_and_shift(*(jnp.asarray(case.inputs[name], float) for name in ("pts", "aug_scale", "aug_shift")))


def recorded_masks(case: Case, system: PointCmae) -> tuple[Mask, ...]:
    """The recorded masks, visible groups in order and then hidden ones in order."""
    return tuple(random_mask(jnp.asarray(case.inputs[f"mask{view}"], jnp.float32), system.visible) for view in (1, 2))


def replay_forward(case: Case, system: PointCmae, variables: Variables) -> dict[str, Reproduced]:
    """Augmentation, groups, tokens, both views, both losses, and the eval-mode losses."""
    points = augmented_points(case)
    masks = recorded_masks(case, system)
    both = masks[0].mask * masks[1].mask  # [B, G]

    @jax.jit
    def forward(variables: Variables, groups: Groups) -> tuple[dict[str, Any], ...]:
        params, state = variables
        named = system.forward(params, state, groups, masks, train=True)
        encoder = {"params": params["encoder"]}
        visible = (take_tokens(named[name], masks[0].keep_indices) for name in ("tokens", "positions"))
        encode: Any = system.encoder.apply
        named["blocks"] = encode(encoder, *visible, collect=True, method="encode").blocks
        frozen = system.forward(params, state, groups, masks, train=False)
        for each in (named, frozen):
            first, second = each["features"]
            pairs = zip(each["prediction"], each["target"], strict=True)
            each["chamfer"] = [chamfer_distance(prediction, target, variant=system.chamfer) for prediction, target in pairs]
            each["agreement"] = {pairing: token_agreement(first, second, both, pairing) for pairing in PAIRINGS}
            each["loss"] = system.objective(each, masks)[0]
        return named, frozen

    groups = system.group(points)
    named, frozen = forward(variables, groups)
    found = {"pts_aug": points, "center": groups.centres, "neighborhood": groups.offsets, "tokens": named["tokens"]}
    found |= {"pos_embed": named["positions"], "loss": named["loss"], "loss_recon": sum(named["chamfer"])}
    found |= {"loss_contras": named["agreement"]["all"], "contras_matched": named["agreement"]["matched"]}
    found |= {"eval/loss_recon": sum(frozen["chamfer"]), "eval/loss_contras": frozen["agreement"]["all"], "eval/tokens": frozen["tokens"]}
    found |= {f"block{i}_1": x for i, x in enumerate(named["blocks"])}
    for view, mask in enumerate(masks):
        order = jnp.concatenate([mask.keep_indices, removed_indices(mask)], axis=1)
        found[f"x_vis{view + 1}"] = named["latent"][view]
        found[f"de_feats{view + 1}"] = take_tokens(named["features"][view], order)
        found[f"rebuild{view + 1}"] = named["prediction"][view]
        found[f"loss_recon{view + 1}"] = named["chamfer"][view]
    found |= {f"after1/{name}": value for name, value in official_names(named["state"]).items()}
    shaped = {name: Reproduced(_first(case, name, value)) for name, value in found.items()}
    picks = farthest_point_sampling(points, system.groups)
    integers = {"fps_idx": picks, "knn_idx": groups.members, "comask": both}
    return shaped | {name: exact(_first(case, name, value)) for name, value in integers.items()}


def _first(case: Case, name: str, value: Any) -> np.ndarray:
    """As many of the first examples as were recorded."""
    value = np.asarray(value)
    return value[: len(case.outputs[name])] if name in case.outputs and value.ndim else value


def replay_gradients(case: Case, system: PointCmae, variables: Variables) -> dict[str, Reproduced]:
    """`grad/<name>`, `gradnorm/<name>` of the total loss, `grad_contras/<name>` of the agreement term alone."""
    masks = recorded_masks(case, system)
    groups = system.group(augmented_points(case))

    def losses(params: Params) -> tuple[jax.Array, jax.Array]:
        named = system.forward(params, variables.state, groups, masks, train=True)
        loss, metrics = system.objective(named, masks)
        return loss, metrics["agreement"]

    total, agreement = (official_names(tree) for tree in jax.jit(jax.jacrev(losses))(variables.params))
    found = {f"grad_contras/{name}": Reproduced(value, GRADIENT) for name, value in agreement.items()}
    lengths = {name: float(np.linalg.norm(value.astype(np.float64).ravel())) for name, value in total.items()}
    largest = max(lengths.values())
    for name, length in lengths.items():
        values = {f"grad/{name}": total[name], f"gradnorm/{name}": length}
        for key, value in values.items():
            tiny = np.abs(case.outputs.get(key, 1.0)).max() < 1e-9
            note = "its true gradient is 0: a bias before batch norm" if tiny else ""
            found[key] = Reproduced(value, GRADIENT, absolute=1e-6 * largest if tiny else 0.0, note=note)
    return found


def replay_classifier(case: Case) -> dict[str, Reproduced]:
    """Logits, cross-entropy and accuracy of the classifier in eval mode, on the same augmented clouds."""
    options = case.record["config"]["finetune"]
    linear = options["type"] == "linear"
    points = augmented_points(case)
    system = PointClassifier(**sizes_of(case), num_classes=options["cls_dim"], points=points.shape[1], head="linear" if linear else "mlp")
    tensors = {name.removeprefix("MAE_encoder."): value for name, value in case.weights.items() if name.startswith("MAE_encoder.")}
    tensors |= {name.removeprefix("finetune/"): value for name, value in case.weights.items() if name.startswith("finetune/")}
    params, state = load(tensors, system, LINEAR_CLASSIFIER if linear else CLASSIFIER)
    labels = jnp.asarray(case.inputs["label"])
    logits = jax.jit(system.features)(params, state, {"points": points})["logits"]
    loss = label_smoothing_cross_entropy(logits, labels, 0.0)
    percent = 100 * (logits.argmax(-1) == labels).mean()
    return {"finetune/logits": Reproduced(logits), "finetune/loss": Reproduced(loss), "finetune/acc_percent": Reproduced(percent)}


def replay_chamfer(case: Case) -> dict[str, Reproduced]:
    """The Chamfer losses alone."""
    sets = [jnp.asarray(case.inputs[f"chamfer/{name}"], float) for name in ("p", "t")]
    found: dict[str, Reproduced] = {}
    for variant in ("l1", "l2"):
        value, gradient = jax.value_and_grad(lambda p, v=variant: chamfer_distance(p, sets[1], variant=v))(sets[0])
        found |= {f"chamfer/{variant}": Reproduced(value), f"chamfer/d{variant}_dp": Reproduced(gradient, GRADIENT)}
    return found


def replay_schedule(case: Case) -> dict[str, Reproduced]:
    """The learning rate of every epoch."""
    options = case.record["config"]["scheduler"]
    schedule = unshifted_cosine(options["lr"], 1e-6, options["initial_epochs"], options["epochs"])
    # Stepped with e AFTER epoch e: the first two epochs share a rate.
    return {"lr_per_epoch": Reproduced(np.asarray(schedule(np.maximum(np.arange(options["epochs"] + 1) - 1, 0))))}


def replay_counts(variables: Variables) -> dict[str, Reproduced]:
    """The numbers of decaying and of other parameters."""
    flat = flatten_paths(decay_mask(variables.params, ("vectors", "cls_token", "mask_token")))
    names = {path: POINT_CMAE.names(path) for path in flat}
    decays, others = (sum(len(each[0]) for path, each in names.items() if flat[path] == decay and each) for decay in (True, False))
    return {"decay_count": exact(decays + DEAD_DECAYING), "no_decay_count": exact(others + DEAD_OTHERS)}


def replay(case: Case) -> dict[str, Reproduced]:
    """Every recorded output of a Point-CMAE case that is there to compare."""
    found = replay_schedule(case) if case.wants("lr_per_epoch") else {}
    # As it was recorded. In float32 neighbours of nearly the same distance change places, and a rectifier's input that lies within rounding
    # of 0 takes the other side, which moves gradients of the tokenizer by up to 1e-3 of their largest value.
    with jax.enable_x64(True):
        system = system_of(case)
        variables = load({name: value for name, value in case.weights.items() if not name.startswith("finetune/")}, system, POINT_CMAE)
        found |= replay_counts(variables) | replay_forward(case, system, variables)
        if case.wants("chamfer/"):
            found |= replay_chamfer(case)
        if case.wants("grad"):
            found |= replay_gradients(case, system, variables)
        return found | (replay_classifier(case) if case.wants("finetune/") else {})
