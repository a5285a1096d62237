"""MR-MAE's reference cases: the masked-convolution backbone, MCMAE, under the released code's names. The mimic loss was never released."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskae.data.spec import IMAGENET_MEAN, IMAGENET_STD
from maskae.errors import UserError
from maskae.interop.case import GRADIENT, Case, Reproduced, exact, leading
from maskae.interop.conv_layout import MCMAE
from maskae.interop.layout import Flat, Geometry, from_foreign, to_foreign
from maskae.interop.record import check_qkv_bias, numbers_of, train, trained_outputs
from maskae.losses.classification import label_smoothing_cross_entropy
from maskae.nn.positions import sincos_2d
from maskae.optim import make_optimizer
from maskae.paths import flatten_paths, unflatten_paths
from maskae.schedules import warmup_cosine
from maskae.systems.mc_mae import McFineTune, McMae


def stages_of(case: Case) -> dict[str, Any]:
    """The arguments that pre-training and fine-tuning share, from the case's own options."""
    built = case.record["constructor"]
    strides, widths, depths, ratios = (built[name] for name in ("patch_size", "embed_dim", "depth", "mlp_ratio"))
    return {
        "image_size": built["img_size"][0],
        "channels": built["in_chans"],
        "patch_size": math.prod(strides),
        "strides": tuple(strides),
        "conv_widths": tuple(widths[:2]),
        "conv_depths": tuple(depths[:2]),
        "conv_mlp_ratios": tuple(ratios[:2]),
        "width": widths[2],
        "depth": depths[2],
        "heads": built["num_heads"],
        "mlp_ratio": ratios[2],
    }


def system_of(case: Case) -> McMae:
    """The pre-training system with the case's own options."""
    built = case.record["constructor"]
    return McMae(
        **stages_of(case),
        decoder_width=built["decoder_embed_dim"],
        decoder_depth=built["decoder_depth"],
        decoder_heads=built["decoder_num_heads"],
        mask_ratio=case.record["options"]["mask_ratio"],
        norm_pix_loss=built["norm_pix_loss"],
    )


def params_of(case: Case, system: Any, tensors: Flat) -> dict[str, Any]:
    """Recorded weights as a system's parameters. Raises UserError where one is missing or has another shape."""
    template = flatten_paths(jax.eval_shape(system.init, jax.random.key(0), {}).params)
    flat, report = from_foreign(tensors, template, MCMAE, Geometry(system.patch_size, system.grid))
    wrong = report.mismatched + report.missing
    for name in {"pos_embed", "decoder_pos_embed"} & set(report.unexpected):
        table = sincos_2d(tensors[name].shape[-1], system.grid, cls_token=False)
        wrong += [f"{name} is not the fixed table"] if np.abs(tensors[name][0] - table).max() > 1e-5 else []
    if wrong:
        raise UserError(f"{case.folder}: the weights are not those of the recorded options: {'; '.join(wrong[:3])}")
    return jax.tree.map(jnp.asarray, unflatten_paths(flat))


def images_of(case: Case) -> jax.Array:
    """Recorded uint8 images [B, C, H, W] as normalised [B, H, W, C]."""
    images = jnp.asarray(case.inputs["imgs_u8"].transpose(0, 2, 3, 1), jnp.float32) / 255
    return (images - jnp.asarray(IMAGENET_MEAN)) / jnp.asarray(IMAGENET_STD)


def official(tree: Any, system: Any) -> Flat:
    """Parameters or their gradients under the names and in the shapes of the released code."""
    flat = {path: np.asarray(leaf) for path, leaf in flatten_paths(tree).items()}
    named, _ = to_foreign(flat, MCMAE, Geometry(system.patch_size, system.grid))
    return {name: np.asarray(value) for name, value in named.items()}


def part(case: Case, name: str, value: jax.Array) -> Reproduced:
    """The part of a map [B, H, W, C], channels first, or of tokens [B, N, D] that was recorded: a window, or the leading entries."""
    if name.endswith("_window"):
        low, high = (int(number) for number in numbers_of(case.meaning(name), r"(\d+)\.\.(\d+)"))
        return Reproduced(value[:, low : high + 1, low : high + 1].transpose(0, 3, 1, 2))
    value = value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
    return Reproduced(leading(value, case.outputs[name]))


def replay_forward(case: Case, system: McMae, params: Any) -> dict[str, Reproduced]:
    """Maps, tokens, masks, prediction, loss of every patch and of all."""
    images, noise = images_of(case), jnp.asarray(case.inputs["noise"])
    named = dict(jax.jit(lambda p: system.forward(p, images, noise, collect=True))(params))
    found = {"mask": exact(named["mask"]), "ids_restore": exact(named["ids_restore"])}
    near = {"patch_embed1_window": "embed1", "stage1_window": "stage1", "stage2_window": "stage2", "patch_embed4": "tokens"}
    near |= {"blocks3_in": "x_masked"} | {name: name for name in ("y1", "y2", "latent", "decoder_in", "pred")}
    named |= {f"block3_{index}": block for index, block in enumerate(named["encoder_blocks"])}
    near |= {name: name for name in named if name.startswith("block3_")}
    found |= {name: part(case, name, named[own]) for name, own in near.items() if name in case.outputs}
    errors = jnp.square(named["pred"] - system.target(images)).mean(-1)  # [B, L]
    return found | {"loss_per_patch": Reproduced(errors), "loss": Reproduced(system.pixel_loss(named, images)[0])}


def replay_gradients(case: Case, system: McMae, params: Any) -> dict[str, Reproduced]:
    """`grad/<name>` and `gradnorm/<name>` of the loss."""
    images, noise = images_of(case), jnp.asarray(case.inputs["noise"])
    grads = official(jax.jit(jax.grad(lambda p: system.loss_given_noise(p, images, noise)[0]))(params), system)
    found = {f"grad/{name}": Reproduced(grad, GRADIENT) for name, grad in grads.items()}
    norms = {name: np.linalg.norm(grad.astype(np.float64).ravel()) for name, grad in grads.items()}
    return found | {f"gradnorm/{name}": Reproduced(norm, GRADIENT) for name, norm in norms.items()}


def replay_training(case: Case, system: McMae, params: Any) -> dict[str, Reproduced]:
    """AdamW steps on one batch with the recorded masking noise of each step, at the recorded places of the schedule."""
    options = case.record["training_steps"]
    schedule = warmup_cosine(*(options[name] for name in ("lr", "min_lr", "warmup_epochs", "epochs")))
    b1, b2, decay = numbers_of(options["optimizer"], r"\(([\d.]+), ([\d.]+)\),? weight_decay ([\d.]+)")
    optimizer = make_optimizer("adamw", schedule=schedule, b1=b1, b2=b2, weight_decay=decay)
    images, noise = images_of(case), jnp.asarray(case.inputs["train_noise"])

    def loss(params: Any, number: jax.Array) -> jax.Array:
        return system.loss_given_noise(params, images, noise[number])[0]

    trained = train(loss, optimizer, schedule, params, options["epoch_of_step"], b2)
    return trained_outputs(trained, lambda tree: official(tree, system))


def replay_finetune(case: Case) -> dict[str, Reproduced]:
    """Every output `ft_*`: features, logits, loss and its gradients, without stochastic depth."""
    options = case.record["finetune"]
    check_qkv_bias(case, options)
    pool = "mean" if options["global_pool"] else "cls"
    system = McFineTune(**stages_of(case), num_classes=options["num_classes"], drop_path=options["drop_path_rate"], pool=pool)
    own = {name: value for name, value in case.weights.items() if not name.startswith("finetune.")}
    own |= {name.removeprefix("finetune."): value for name, value in case.weights.items() if name.startswith("finetune.")}
    params, images = params_of(case, system, own), images_of(case)
    labels = jnp.asarray(case.inputs["ft_labels"])

    def loss_of(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        named = system.forward(params, images)
        return label_smoothing_cross_entropy(named["logits"], labels, 0.0), named

    (loss, named), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    found = {"ft_loss": Reproduced(loss), "ft_logits": Reproduced(named["logits"]), "ft_features": Reproduced(named["pooled"])}
    for name, grad in official(grads, system).items():
        if f"ft_grad/{name}" in case.outputs:
            found[f"ft_grad/{name}"] = Reproduced(leading(grad, case.outputs[f"ft_grad/{name}"]), GRADIENT)
    return found


def replay(case: Case) -> dict[str, Reproduced]:
    """Every recorded output of an MR-MAE case that is there to compare."""
    system = system_of(case)
    params = params_of(case, system, case.weights)
    found = replay_forward(case, system, params)
    if case.wants("grad/", "gradnorm/"):
        found |= replay_gradients(case, system, params)
    if case.wants("train_"):
        found |= replay_training(case, system, params)
    return found | (replay_finetune(case) if case.wants("ft_") else {})
