"""MaskAlign's reference cases: student, adaptors and fusion under the released code's names, teachers under those of Hugging Face."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskae.errors import UserError
from maskae.interop.case import GRADIENT, Case, Reproduced, exact
from maskae.interop.layout import VALUE, Flat, Geometry, Layout, Rule, from_foreign, to_foreign
from maskae.interop.record import image_size_of, numbers_of, recorded_schedule, train, trained_outputs
from maskae.interop.vit import LAYOUTS, linear
from maskae.interop.vit import norm as norm_rules
from maskae.masking import random_mask
from maskae.optim import make_optimizer
from maskae.paths import flatten_paths, unflatten_paths
from maskae.systems.contract import Variables
from maskae.systems.mask_align import MaskAlign

ADAPTORS = {"linear": "linear", "norm_linear": "norm_linear", "mlp": "mlp", "mlp2": "mlp_norm"}
TARGETS = {"none": "none", "l2": "l2", "whiten": "whiten", "bn": "batch"}
DISTANCES = {"l2": "l2", "l1": "l1", "smoothl1": "smooth_l1"}
# Where the parts of an adaptor stand in the released code's sequence.
PLACES = {
    "norm_linear": {"norm": "0", "out": "1"},
    "mlp": {"hidden": "0", "out": "2"},
    "mlp_norm": {"hidden": "0", "norm": "1", "out": "2"},
}


def layout_of(adaptor: str) -> Layout:
    """The released code's names of a student with adaptors of that kind."""
    rules: tuple[Rule, ...] = (Rule("fusion/scale", ("distill_weights",), VALUE),)
    if adaptor == "linear":
        rules += linear("adaptor_{i}/out", "distill_heads.{i}")
    for part, place in PLACES.get(adaptor, {}).items():
        make = norm_rules if part == "norm" else linear
        rules += make(f"adaptor_{{i}}/{part}", f"distill_heads.{{i}}.{place}")
    return Layout(rules + LAYOUTS["paper"].rules)


def teacher_of(record: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Arguments of a recorded teacher."""
    known = {"quick_gelu": "clip", "gelu": "vit"}
    if known.get(record["hidden_act"]) != architecture:
        raise UserError(f"a recorded {architecture} teacher has the activation {record['hidden_act']}")
    return {
        "architecture": architecture,
        "weights": "random",
        "patch_size": record["patch_size"],
        "width": record["hidden_size"],
        "depth": record["num_hidden_layers"],
        "heads": record["num_attention_heads"],
        # int(width * ratio) has to be the recorded size, whatever the division rounds to.
        "mlp_ratio": (record["intermediate_size"] + 0.5) / record["hidden_size"],
        "epsilon": record["layer_norm_eps"],
        "statistics": "clip" if architecture == "clip" else "student",
    }


def dino_record(case: Case) -> dict[str, Any]:
    """What the case says about its DINO-type teacher, the second one or the only one."""
    found: dict[str, Any] = case.record.get("dino_teacher", case.record["teacher"])
    return found


def system_of(case: Case) -> MaskAlign:
    """The system with the case's own options and its first teacher."""
    built = case.record["constructor"]
    dino = "dino" in built["teacher_model"]
    return MaskAlign(
        image_size=image_size_of(built),
        channels=built["in_chans"],
        patch_size=built["patch_size"],
        width=built["embed_dim"],
        depth=built["depth"],
        heads=built["num_heads"],
        mlp_ratio=built["mlp_ratio"],
        teacher=teacher_of(dino_record(case) if dino else case.record["teacher"], "vit" if dino else "clip"),
        masker=built["mask_type"],
        mask_ratio=case.record["options"]["mask_ratio"],
        drop_path=built["drop_path_rate"],
        fusion=built["fusion_type"],
        adaptor=ADAPTORS[built["head_type"]],
        target=TARGETS[built["target_norm"]],
        distance=DISTANCES[built["loss_type"]],
        layer_weights=built["loss_weights"],
    )


def student_of(case: Case, system: MaskAlign) -> dict[str, Any]:
    """The recorded student as the system's parameters. Raises UserError where one is missing or has another shape."""
    template = flatten_paths(jax.eval_shape(system.init, jax.random.key(0), {}).params)
    layout = dataclasses.replace(layout_of(system.adaptor), positions={"pos_embed": "encoder/cls_token"})
    flat, report = from_foreign(case.weights, template, layout, Geometry(system.patch_size, system.grid))
    if wrong := report.mismatched + report.missing + [note for note in report.notes if "not the fixed" in note]:
        raise UserError(f"{case.folder}: the weights are not those of the recorded options: {'; '.join(wrong[:3])}")
    return jax.tree.map(jnp.asarray, unflatten_paths(flat))


def recorded_teacher(case: Case, system: MaskAlign) -> dict[str, Any]:
    """The state with the recorded weights of the system's teacher. Raises UserError where one is missing or has another shape."""
    teacher = system.frozen
    model, layout = ("clip_model.", "clip") if teacher.architecture == "clip" else ("dino_model.", "huggingface")
    tensors = {name.removeprefix(model): value for name, value in case.weights.items() if name.startswith(model)}
    blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(teacher.init, jax.random.key(0)))
    template = flatten_paths({"encoder": blank})
    flat, report = from_foreign(tensors, template, LAYOUTS[layout], Geometry(teacher.patch_size, teacher.grid))
    # The template's zeros stand for biases that a teacher does not have.
    absent = ["patch_embed/bias"] if teacher.architecture == "clip" else []
    absent += [] if teacher.architecture == "clip" or dino_record(case).get("qkv_bias", True) else ["attention/qkv/bias"]
    missing = [name for name in report.missing if not name.endswith(tuple(absent))]
    if wrong := report.mismatched + missing:
        raise UserError(f"{case.folder}: the teacher's weights are not those of the recorded options: {'; '.join(wrong[:3])}")
    return {"teacher": jax.tree.map(jnp.asarray, unflatten_paths(flat)["encoder"])}


def recorded_draws(case: Case, system: MaskAlign) -> jax.Array:
    """The masker's draws [B, L]."""
    return jnp.asarray(case.inputs["exp_noise" if system.masker == "attention" else "noise"])


def images_of(case: Case) -> jax.Array:
    """Recorded images [B, C, H, W] as [B, H, W, C]."""
    return jnp.asarray(case.inputs["imgs"].transpose(0, 2, 3, 1))


def official(tree: Any, system: MaskAlign) -> Flat:
    """Parameters or their gradients under the names and in the shapes of the released code."""
    flat = {path: np.asarray(leaf) for path, leaf in flatten_paths(tree).items()}
    named, _ = to_foreign(flat, layout_of(system.adaptor), Geometry(system.patch_size, system.grid))
    return {name: np.asarray(value) for name, value in named.items()}


def loss_of(system: MaskAlign, params: Any, state: Any, images: jax.Array, draws: jax.Array, drops: Any = None) -> jax.Array:
    """The loss for given draws."""
    named = system.forward(params, state, images, draws, drops)
    return system.distances(named["student"], named["target"])


def leading(case: Case, name: str, value: jax.Array) -> Reproduced:
    """The first tokens of `value` [B, N, D], as many as were recorded."""
    return Reproduced(value[:, : case.outputs[name].shape[1]])


def replay_forward(case: Case, system: MaskAlign, variables: Variables) -> dict[str, Reproduced]:
    """Attention, kept patches, hidden states, adapted student, targets and loss."""
    images, draws = images_of(case), recorded_draws(case, system)
    every = dataclasses.replace(system, layer_weights="mean")
    named = jax.jit(every.forward)(student_of(case, every), variables.state, images, draws)
    found = {"importance": Reproduced(named["importance"]), "ids_keep": exact(named["ids_keep"])}
    found["loss"] = Reproduced(system.distances(named["student"], named["target"]))
    teacher_states = [named["seen"].first, *named["seen"].hidden]
    for name in case.outputs:
        if number := re.fullmatch(r"teacher_hidden_(\d+)", name):
            found[name] = leading(case, name, teacher_states[int(number[1])])
        elif number := re.fullmatch(r"student_hidden_(\d+)", name):
            found[name] = leading(case, name, named["student_hidden"][int(number[1]) - 1])
        elif number := re.fullmatch(r"student_target_(\d+)", name):
            found[name] = leading(case, name, named["student"][int(number[1]) - 1])
        elif number := re.fullmatch(r"teacher_target_(\d+)", name):
            found[name] = leading(case, name, named["target"][int(number[1]) - 1])
    return found


def replay_random_mask(case: Case, system: MaskAlign, variables: Variables) -> dict[str, Reproduced]:
    """The loss with MAE's masker."""
    chance = dataclasses.replace(system, masker="random")
    noise = jnp.asarray(case.inputs["noise"])
    keep = random_mask(noise, chance.kept(chance.grid)).keep_indices
    return {"ids_keep_random": exact(keep), "loss_random_mask": Reproduced(loss_of(chance, *variables, images_of(case), noise))}


def replay_variants(case: Case, system: MaskAlign, state: Any) -> dict[str, Reproduced]:
    """The loss under every recorded target, distance and set of layer weights."""
    every = dataclasses.replace(system, layer_weights="mean")
    params = student_of(case, every)
    named = jax.jit(every.forward)(params, state, images_of(case), recorded_draws(case, every))
    losses = []
    for target, distance, weights in case.record["variant_order"]:
        variant = dataclasses.replace(system, target=TARGETS[target], distance=DISTANCES[distance], layer_weights=weights)
        targets = {layer: variant.targets(named["seen"].hidden[layer], named["ids_keep"]) for layer in variant.layers}
        losses.append(variant.distances(named["student"], targets))
    return {"variant_losses": Reproduced(np.stack(losses))}


def replay_gradients(case: Case, system: MaskAlign, variables: Variables) -> dict[str, Reproduced]:
    """`grad/<name>` and `gradnorm/<name>` of the loss; zero for what the system has no parameter of."""
    images, draws = images_of(case), recorded_draws(case, system)
    grads = official(jax.jit(jax.grad(lambda p: loss_of(system, p, variables.state, images, draws)))(variables.params), system)
    found = {f"grad/{name}": Reproduced(grad, GRADIENT) for name, grad in grads.items()}
    norms = {name: np.linalg.norm(grad.astype(np.float64).ravel()) for name, grad in grads.items()}
    return found | {f"gradnorm/{name}": Reproduced(norm, GRADIENT) for name, norm in norms.items()}


def replay_training(case: Case, system: MaskAlign, variables: Variables) -> dict[str, Reproduced]:
    """AdamW steps on one batch with the recorded draws of masker and drop path."""
    options = case.record["training_steps"]
    system = dataclasses.replace(system, drop_path=options["drop_path_rate"])
    schedule = recorded_schedule(options)
    b1, b2, decay = numbers_of(options["optimizer"], r"\(([\d.]+), ([\d.]+)\), weight_decay ([\d.]+)")
    optimizer = make_optimizer("adamw", schedule=schedule, b1=b1, b2=b2, weight_decay=decay)
    images = images_of(case)
    draws = training_draws(case, system)
    drops = recorded_drops(case, system)

    def loss(params: Any, number: jax.Array) -> jax.Array:
        return loss_of(system, params, variables.state, images, draws[number], None if drops is None else drops[number])

    trained = train(loss, optimizer, schedule, variables.params, range(options["steps"]), b2)
    found = trained_outputs(trained, lambda tree: official(tree, system))
    # What the loss does not reach the released optimizer leaves as it is, also by weight decay.
    for name in case.record["parameters_without_gradient"]:
        if name in case.weights:
            found[f"train_params/{name}"] = dataclasses.replace(exact(case.weights[name]), note="never trained: no gradient")
    return found


def training_draws(case: Case, system: MaskAlign) -> jax.Array:
    """The masker's draws of every step [steps, B, L]. Raises UserError where the case has none for its masker."""
    name = "train_exp_noise" if system.masker == "attention" else "train_noise"
    if name not in case.inputs:
        raise UserError(f"{case.folder}: the training with mask_type={system.masker} needs the recorded draws {name}, which are not there")
    return jnp.asarray(case.inputs[name])


def recorded_drops(case: Case, system: MaskAlign) -> jax.Array | None:
    """Drop path's draws [steps, depth, 2, B]. Blocks of rate 0, the first one always, draw nothing in the released code."""
    if not system.drop_path or system.depth == 1:
        return None
    drawn = case.inputs["train_drop_path_u"]
    steps, calls, batch = drawn.shape
    pairs = drawn.reshape(steps, calls // 2, 2, batch)
    silent = np.zeros((steps, system.depth - calls // 2, 2, batch), drawn.dtype)
    return jnp.asarray(np.concatenate([silent, pairs], axis=1))


def replay_dino(case: Case, system: MaskAlign, params: Any) -> dict[str, Reproduced]:
    """The second teacher."""
    other = dataclasses.replace(system, teacher=teacher_of(dino_record(case), "vit"))
    state = recorded_teacher(case, other)
    named = jax.jit(other.forward)(params, state, images_of(case), recorded_draws(case, other))
    found = {"dino/importance": Reproduced(named["importance"]), "dino/ids_keep": exact(named["ids_keep"])}
    found["dino/loss"] = Reproduced(other.distances(named["student"], named["target"]))
    if "dino/teacher_hidden_last" in case.outputs:
        found["dino/teacher_hidden_last"] = leading(case, "dino/teacher_hidden_last", named["seen"].hidden[-1])
    return found


def replay(case: Case) -> dict[str, Reproduced]:
    """Every recorded output of a MaskAlign case that is there to compare."""
    system = system_of(case)
    params = student_of(case, system)
    variables = Variables(params, recorded_teacher(case, system))
    found = replay_forward(case, system, variables)
    if case.wants("ids_keep_random", "loss_random_mask"):
        found |= replay_random_mask(case, system, variables)
    if case.wants("variant_losses"):
        found |= replay_variants(case, system, variables.state)
    if case.wants("grad/", "gradnorm/"):
        found |= replay_gradients(case, system, variables)
    if case.wants("train_"):
        found |= replay_training(case, system, variables)
    return found | (replay_dino(case, system, params) if case.wants("dino/") else {})
