"""The reference cases of the CT study: SparK here, its contrastive comparison in `cnn_contrastive`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskae.interop.case import Case, Reproduced, exact, leading
from maskae.interop.cnn import foreign_names, load, spark
from maskae.interop.cnn_contrastive import replay_contrastive, with_norms
from maskae.interop.layout import Layout
from maskae.losses.reconstruction import normalise_patches, patch_statistics
from maskae.nn.patches import patchify
from maskae.systems.contract import Variables
from maskae.systems.spark_medical import SparK


def spark_of(options: dict[str, Any], channels: int) -> SparK:
    """The system with the recorded options of its section."""
    shared: dict[str, Any] = {"image_size": options["input_size"], "channels": channels, "decoder_width": options["decoder_width"]}
    # The released code takes every other word for no norm.
    norm = str(options["densify_norm"]).lower()
    shared |= {"mask_ratio": options["mask_ratio"], "densify_norm": norm if norm in ("bn", "ln") else "none"}
    shared |= {"mean": (0.0,), "std": (1.0,), "drop_path": 0.0, "dtype": "float64"}
    if options["encoder"] == "convnext":
        sizes: dict[str, Any] = {"network": "convnext_tiny", "layers": tuple(options["depths"]), "widths": tuple(options["dims"])}
        return SparK(**shared, **sizes, layer_scale=options["layer_scale_init_value"])
    network = "resnet50" if options["block"] == "Bottleneck" else "resnet18"
    sizes = {"network": network, "layers": tuple(options["layers"]), "widths": tuple(options["channels"])}
    return SparK(**shared, **sizes, stem_width=options.get("stem_width", 64))


def variables_of(case: Case, system: SparK, layout: Layout) -> Variables:
    """The recorded weights and running statistics."""
    template = jax.eval_shape(system.init, jax.random.key(0), {})
    return Variables(*(load(case.weights, part, layout, str(case.folder)) for part in template))


def channels_first(x: Any) -> Any:
    """[B, H, W, C] -> [B, C, H, W]; other arrays stay."""
    return np.asarray(x).transpose(0, 3, 1, 2) if np.ndim(x) == 4 else x


def replay_spark(case: Case, section: str, prefix: str, *, whole: bool = True) -> dict[str, Reproduced]:
    """Masks, maps, pixels, losses, moved statistics and gradients of one recorded SparK, whose names begin with `prefix`.

    `whole` False leaves out gradients and the pass in evaluation mode, which are two thirds of the work.
    """
    images = jnp.asarray(case.inputs[f"{prefix}image"], float).transpose(0, 2, 3, 1)
    system = spark_of(case.record["config"][section], images.shape[-1])
    layout = spark(case.record["config"][section]["encoder"], prefix)
    variables = variables_of(case, system, layout)
    grid = system.grid_of(*images.shape[1:3])
    visible = system.visible(jnp.asarray(case.inputs[f"{prefix}noise"], jnp.float32), grid)

    def run(params: Any, train: bool) -> tuple[jax.Array, tuple[dict[str, Any], Any]]:
        named, moved = system.forward(Variables(params, variables.state), images, visible, train=train)
        loss, _ = system.reconstruction_loss(named["rec_image"], images, visible)
        return loss, (named | {"loss": loss}, moved)

    grads: Any = {}
    if whole:
        (_, (train, moved)), grads = jax.jit(jax.value_and_grad(lambda p: run(p, True), has_aux=True))(variables.params)
    else:
        _, (train, moved) = jax.jit(lambda p: run(p, True))(variables.params)
    named = {f"{prefix}train/{name}": value for name, value in train.items()}
    if whole:
        evaluated = jax.jit(lambda p: run(p, False))(variables.params)[1][0]
        named |= {f"{prefix}eval/{name}": value for name, value in evaluated.items()}
    found = {name: Reproduced(channels_first(value)) for name, value in named.items()}
    found |= {f"{prefix}active": exact(np.asarray(visible)[:, None])} | replay_patches(system, images, train, prefix)
    # The prefix comes before "train/" there and before the layer's name in the weights.
    for name, value in foreign_names(moved, layout).items():
        found[f"{prefix}train/after/{name.removeprefix(prefix)}"] = Reproduced(value)
    return found | with_norms(grads, layout)


def replay_patches(system: SparK, images: jax.Array, named: dict[str, Any], prefix: str) -> dict[str, Reproduced]:
    """The target and its statistics, and the error of every patch, hidden or not."""
    patches = patchify(images, system.cell)
    mean, deviation = patch_statistics(patches)
    target = normalise_patches(patches)
    error = jnp.square(patchify(named["rec_image"], system.cell) - target).mean(-1)
    values = {"patch_mean": mean, "patch_std": deviation, "target_patch": target, "patch_loss": error}
    return {f"{prefix}{'train/' if name == 'patch_loss' else ''}{name}": Reproduced(value) for name, value in values.items()}


def replay(case: Case) -> dict[str, Reproduced]:
    """Every recorded output of a case of the CT study that is there to compare."""
    found: dict[str, Reproduced] = {}
    # As it was recorded. In float32 the outputs agree to 1e-5, but a rectifier's input that lies within rounding of 0 or 6 takes the other
    # side, which moves some gradients by up to 5e-3 of their largest value.
    with jax.enable_x64(True):
        for section, prefix in (("spark", ""), ("convnext", "convnext.")):
            if f"{prefix}image" in case.inputs:
                found |= replay_spark(case, section, prefix)
        found |= replay_contrastive(case)
    for name, reproduced in found.items():
        if name in case.outputs:
            found[name] = dataclasses.replace(reproduced, value=leading(reproduced.value, case.outputs[name]))
    return found
