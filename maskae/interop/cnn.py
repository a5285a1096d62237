"""Layouts of convolutional networks and SparK's decoder: torchvision's and timm's ResNet, the released ConvNeXt, the released SparK."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from maskae.errors import UserError
from maskae.interop.layout import VALUE, VECTOR, Geometry, Layout, Rule, Shape, from_foreign, to_foreign
from maskae.interop.vit import linear, norm
from maskae.paths import flatten_paths, map_paths

NO_GEOMETRY = Geometry(1, (1, 1))
# (rows, columns, inputs, outputs) here, (outputs, inputs, rows, columns) there.
CONV = Shape(lambda x, _: (x.transpose(3, 2, 0, 1),), lambda parts, shape: parts[0].transpose(2, 3, 1, 0))
# A transposed convolution is stored (inputs, outputs, rows, columns) there, and its taps run backwards.
TRANSPOSED = Shape(
    lambda x, _: (x[::-1, ::-1].transpose(2, 3, 0, 1),), lambda parts, shape: parts[0].transpose(2, 3, 0, 1)[::-1, ::-1]
)
CHANNELS = Shape(lambda x, _: (x.reshape(1, -1, 1, 1),), lambda parts, shape: parts[0].reshape(shape))


def conv(ours: str, theirs: str, shape: Shape = CONV) -> tuple[Rule, ...]:
    """The rules of one convolution."""
    return (Rule(f"{ours}/kernel", (f"{theirs}.weight",), shape), Rule(f"{ours}/bias", (f"{theirs}.bias",), VECTOR))


def batch_norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The rules of one norm and of its running statistics, which have the same path in another tree."""
    statistics = (("mean", "running_mean"), ("variance", "running_var"))
    return norm(ours, theirs) + tuple(Rule(f"{ours}/{mine}", (f"{theirs}.{other}",), VECTOR) for mine, other in statistics)


def resnet(ours: str = "", theirs: str = "") -> tuple[Rule, ...]:
    """torchvision's residual network under the path prefix `ours` and the name prefix `theirs`."""
    block, layer = f"{ours}stage{{i}}_block{{path}}", f"{theirs}layer{{i}}.{{path}}"
    rules = [conv(f"{ours}stem/conv", f"{theirs}conv1"), batch_norm(f"{ours}stem/norm", f"{theirs}bn1")]
    for n in (1, 2, 3):
        rules += [conv(f"{block}/conv{n}", f"{layer}.conv{n}"), batch_norm(f"{block}/norm{n}", f"{layer}.bn{n}")]
    rules += [conv(f"{block}/shortcut", f"{layer}.downsample.0"), batch_norm(f"{block}/shortcut_norm", f"{layer}.downsample.1")]
    return tuple(rule for group in rules for rule in group)


def convnext(ours: str = "", theirs: str = "") -> tuple[Rule, ...]:
    """The released ConvNeXt: the stem is a convolution and a norm, the later reductions a norm and a convolution."""
    block, layer = f"{ours}stage{{i}}_block{{path}}", f"{theirs}stages.{{i}}.{{path}}"
    down, reduce = f"{ours}downsample", f"{theirs}downsample_layers"
    rules = [conv(f"{down}0/conv", f"{reduce}.0.0"), norm(f"{down}0/norm", f"{reduce}.0.1")]
    rules += [norm(f"{down}{{i}}/norm", f"{reduce}.{{i}}.0"), conv(f"{down}{{i}}/conv", f"{reduce}.{{i}}.1")]
    rules += [conv(f"{block}/depthwise", f"{layer}.dwconv"), norm(f"{block}/norm", f"{layer}.norm")]
    rules += [linear(f"{block}/expand", f"{layer}.pwconv1"), linear(f"{block}/project", f"{layer}.pwconv2")]
    rules.append((Rule(f"{block}/gamma", (f"{layer}.gamma",), VALUE),))
    return tuple(rule for group in rules for rule in group)


def spark_decoder(ours: str = "decoder/", theirs: str = "") -> tuple[Rule, ...]:
    """SparK's densify layers and UNet."""
    densify, block, unit = f"{ours}densify{{i}}", f"{ours}block{{i}}", f"{theirs}dense_decoder.dec.{{i}}"
    rules = [batch_norm(f"{densify}/norm", f"{theirs}densify_norms.{{i}}"), conv(f"{densify}/conv", f"{theirs}densify_projs.{{i}}")]
    rules += [(Rule(f"{densify}/mask_token", (f"{theirs}mask_tokens.{{i}}",), CHANNELS),)]
    rules += [conv(f"{block}/up", f"{unit}.up_sample", TRANSPOSED)]
    for n, (first, second) in enumerate(((0, 1), (3, 4)), start=1):
        rules += [conv(f"{block}/conv{n}", f"{unit}.conv.{first}"), batch_norm(f"{block}/norm{n}", f"{unit}.conv.{second}")]
    rules += [conv(f"{ours}head", f"{theirs}dense_decoder.proj")]
    return tuple(rule for group in rules for rule in group)


def spark(encoder: str, prefix: str = "") -> Layout:
    """The released SparK around a "resnet" or a "convnext", its names beginning with `prefix`."""
    body = {"resnet": resnet, "convnext": convnext}[encoder]
    return Layout((*body("encoder/", f"{prefix}sparse_encoder.sp_cnn."), *spark_decoder("decoder/", prefix)))


def load(tensors: Mapping[str, np.ndarray], template: Any, layout: Layout, what: str) -> Any:
    """The recorded tensors in the form of `template` (parameters or state), float64 where that is switched on, else float32.

    Raises UserError where one is missing or differs in shape.
    """
    flat, report = from_foreign(dict(tensors), flatten_paths(template), layout, NO_GEOMETRY)
    if wrong := report.mismatched + report.missing:
        raise UserError(f"{what}: the weights are not those of the recorded options: {'; '.join(wrong[:3])}")
    return map_paths(lambda path, _: jnp.asarray(flat[path], float), template)


def foreign_names(tree: Any, layout: Layout) -> dict[str, np.ndarray]:
    """Parameters, gradients or statistics under the official names."""
    flat = {path: np.asarray(leaf) for path, leaf in flatten_paths(tree).items()}
    return {name: np.asarray(value) for name, value in to_foreign(flat, layout, NO_GEOMETRY)[0].items()}
