"""MAE's reference cases: pre-training here, the classifiers in `mae_classifiers`, the augmentations in `mae_augmentations`."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskae.errors import UserError
from maskae.interop.case import GRADIENT, Case, Reproduced, exact
from maskae.interop.layout import Geometry, from_foreign
from maskae.interop.mae_augmentations import replay_augmentations
from maskae.interop.mae_classifiers import replay_finetune, replay_probe
from maskae.interop.record import adam_constants, image_size_of, official_names, recorded_schedule, train, trained_outputs
from maskae.interop.vit import LAYOUTS
from maskae.losses.reconstruction import normalise_patches
from maskae.masking import keep_count
from maskae.nn.patches import patchify
from maskae.nn.positions import sincos_2d
from maskae.optim import make_optimizer
from maskae.paths import flatten_paths, unflatten_paths
from maskae.systems.mae import Mae


def system_of(case: Case) -> Mae:
    """The system with the case's own options."""
    built = case.record["constructor"]
    return Mae(
        image_size=image_size_of(built),
        channels=built["in_chans"],
        patch_size=built["patch_size"],
        width=built["embed_dim"],
        depth=built["depth"],
        heads=built["num_heads"],
        mlp_ratio=built["mlp_ratio"],
        decoder_width=built["decoder_embed_dim"],
        decoder_depth=built["decoder_depth"],
        decoder_heads=built["decoder_num_heads"],
        mask_ratio=case.record["options"]["mask_ratio"],
        norm_pix_loss=built["norm_pix_loss"],
    )


def geometry_of(system: Mae) -> Geometry:
    """What the shapes of the recorded tensors depend on."""
    return Geometry(system.patch_size, system.grid)


def params_of(case: Case, system: Mae) -> dict[str, Any]:
    """The recorded weights as the system's parameters. Raises UserError where one is missing or has another shape."""
    template = flatten_paths(jax.eval_shape(system.init, jax.random.key(0), {}).params)
    flat, report = from_foreign(case.weights, template, LAYOUTS["paper"], geometry_of(system))
    if wrong := report.mismatched + report.missing + [note for note in report.notes if "not the fixed" in note]:
        raise UserError(f"{case.folder}: the weights are not those of the recorded options: {'; '.join(wrong[:3])}")
    return jax.tree.map(jnp.asarray, unflatten_paths(flat))


def images_of(case: Case, name: str = "imgs") -> jax.Array:
    """Recorded images [B, C, H, W] as [B, H, W, C]."""
    return jnp.asarray(case.inputs[name].transpose(0, 2, 3, 1))


def replay_forward(case: Case, system: Mae, params: Any) -> dict[str, Reproduced]:
    """Tokens, masks, blocks, prediction, both losses, targets."""
    images, noise = images_of(case), jnp.asarray(case.inputs["noise"])
    other = dataclasses.replace(system, norm_pix_loss=not system.norm_pix_loss)

    @jax.jit
    def forward(params: Any) -> dict[str, Any]:
        losses = {"loss": system.loss_given_noise(params, images, noise)[0]}
        losses |= {"loss_other_norm_pix": other.loss_given_noise(params, images, noise)[0]}
        return system.forward(params, images, noise, collect=True) | losses

    named = forward(params)
    near = ("embedded", "x_masked", "latent", "decoder_in", "pred", "loss", "loss_other_norm_pix")
    found = {name: Reproduced(named[name]) for name in near}
    found |= {name: exact(named[name]) for name in ("mask", "ids_restore", "ids_keep")}
    found |= {f"block{i}": Reproduced(x) for i, x in enumerate(named["encoder_blocks"])}
    found |= {f"decoder_block{i}": Reproduced(x) for i, x in enumerate(named["decoder_blocks"])}
    patches = patchify(images, system.patch_size)
    for name in case.outputs:
        if first := re.fullmatch(r"(patchify|norm_target)_first(\d+)", name):
            whole = patches if first[1] == "patchify" else normalise_patches(patches)
            found[name] = Reproduced(whole[:, : int(first[2])])
    return found


def replay_gradients(case: Case, system: Mae, params: Any) -> dict[str, Reproduced]:
    """`grad/<name>` and `gradnorm/<name>` of the loss."""
    images, noise = images_of(case), jnp.asarray(case.inputs["noise"])
    grads = official_names(jax.jit(jax.grad(lambda p: system.loss_given_noise(p, images, noise)[0]))(params), geometry_of(system))
    found = {f"grad/{name}": Reproduced(grad, GRADIENT) for name, grad in grads.items()}
    norms = {name: np.linalg.norm(grad.astype(np.float64).ravel()) for name, grad in grads.items()}
    return found | {f"gradnorm/{name}": Reproduced(norm, GRADIENT) for name, norm in norms.items()}


def replay_training(case: Case, system: Mae, params: Any) -> dict[str, Reproduced]:
    """AdamW steps on one batch with the recorded masking noise of each step."""
    options = case.record["pretrain_steps"]
    schedule = recorded_schedule(options)
    constants = adam_constants(options["optimizer"])
    optimizer = make_optimizer("adamw", schedule=schedule, weight_decay=options["weight_decay"], **constants)
    images, noise = images_of(case), jnp.asarray(case.inputs["train_noise"])

    def loss(params: Any, number: jax.Array) -> jax.Array:
        return system.loss_given_noise(params, images, noise[number])[0]

    trained = train(loss, optimizer, schedule, params, range(options["steps"]), constants["b2"])
    return trained_outputs(trained, lambda tree: official_names(tree, geometry_of(system)))


def replay_tables(case: Case) -> dict[str, Reproduced]:
    """Position tables, kept counts and schedules, whose arguments stand in their names and descriptions."""
    found = {}
    for name, recorded in case.outputs.items():
        meaning = case.meaning(name)
        if sizes := re.match(r"pos_table_(\d+)_(\d+)", name):
            table = sincos_2d(int(sizes[1]), (int(sizes[2]),) * 2)
            rows = re.search(r"rows \[([\d, ]+)\]", meaning)
            found[name] = Reproduced(table[[int(row) for row in rows[1].split(",")]] if rows else table)
        elif name == "n_keep_table":
            found[name] = exact([[length, ratio, keep_count(int(length), float(ratio))] for length, ratio, _ in recorded])
        elif name.startswith("schedule_"):
            pattern = r"lr ([\d.e-]+), min_lr ([\d.e-]+), ([\d.]+) epochs, ([\d.]+) warm-up, (\d+) steps per epoch"
            if values := re.search(pattern, meaning):
                keys = ("lr", "min_lr", "epochs", "warmup_epochs", "steps_per_epoch")
                schedule = recorded_schedule(dict(zip(keys, map(float, values.groups()), strict=True)))
                found[name] = Reproduced([float(schedule(step)) for step in range(len(recorded))])
    return found


def replay(case: Case) -> dict[str, Reproduced]:
    """Every recorded output of an MAE case that is there to compare."""
    system = system_of(case)
    params = params_of(case, system)
    found = replay_tables(case) | replay_augmentations(case) | replay_forward(case, system, params)
    if case.wants("grad/", "gradnorm/"):
        found |= replay_gradients(case, system, params)
    if case.wants("train_"):
        found |= replay_training(case, system, params)
    if case.wants("ft_"):
        found |= replay_finetune(case)
    return found | (replay_probe(case) if "probe_losses" in case.outputs else {})
