"""A frozen vision transformer that looks at the whole image: its features after every block and its attention.

Its parameters lie in the system's `state`, out of reach of gradients and of the optimizer. They come, once at the start of a run, from an
earlier stage or from a file of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from maskae.data.spec import IMAGENET_MEAN, IMAGENET_STD
from maskae.errors import UserError, check_arguments, check_choice, check_heads
from maskae.interop.layout import Geometry
from maskae.interop.weights import load_weights
from maskae.nn.attention_maps import attention_weights
from maskae.nn.flops import block_flops, linear_flops
from maskae.nn.layers import DTYPES
from maskae.nn.positions import bicubic_matrix
from maskae.nn.transfer import adopt_encoder
from maskae.nn.vit import ViTEncoder
from maskae.systems.contract import Params

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
STATISTICS = ("student", "clip")
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit": {"epsilon": 1e-6},
    "clip": {"epsilon": 1e-5, "pre_norm": True, "activation": "quick_gelu"},
}
STAGE = "stage:"
RANDOM = "random"


class Seen(NamedTuple):
    """`first`: what the first block got; `hidden`: what every block gave, without a final norm; each [B, 1+N, D], CLS first."""

    first: jax.Array
    hidden: Any


@dataclass(frozen=True)
class Teacher:
    """The arguments of one teacher, ViT-B/16's where none are given.

    Args:
        grid, channels: rows and columns of patches, and image channels, of the student; the teacher's grid is the same.
        weights: "stage:NAME", an earlier stage's encoder; a safetensors file in any layout of `maskae.interop.weights`; or "random", for
            tests. Read when a run starts.
        architecture: "vit" (DINO, timm, this library's own), or "clip": a norm before the blocks and quick GELU.
        patch_size: of the teacher. Where it is not the student's, images are resized so that both have one grid.
        statistics: "student" takes images as the student gets them; "clip" gives them CLIP's mean and deviation instead of ImageNet's.
        epsilon: of the norms; None is that of the architecture.
        scan: see `maskae.nn.stack.run_blocks`; without it the compiler drops features that nobody looks at.

    Raises:
        UserError: where the sizes do not fit together or a name is unknown.
    """

    grid: tuple[int, int]
    channels: int = 3
    weights: str = ""
    architecture: str = "vit"
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    statistics: str = "student"
    epsilon: float | None = None
    dtype: str = "float32"
    attention: str = "xla"
    scan: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        check_choice("teacher architecture", self.architecture, tuple(ARCHITECTURES))
        check_choice("teacher statistics", self.statistics, STATISTICS)
        check_choice("teacher dtype", self.dtype, DTYPES)
        check_heads("teacher width", self.width, self.heads)
        if self.statistics == "clip" and self.channels != len(CLIP_MEAN):
            raise UserError(f"teacher statistics 'clip' are of {len(CLIP_MEAN)} channels; the images have {self.channels}")

    @property
    def encoder(self) -> ViTEncoder:
        """The network, without its final norm: nobody looks behind it."""
        options: dict[str, Any] = dict(ARCHITECTURES[self.architecture])
        if self.epsilon is not None:
            options["epsilon"] = self.epsilon
        options |= {"attention": self.attention, "scan": self.scan, "dtype": jnp.dtype(self.dtype), "final_norm": False}
        sizes = (self.patch_size, self.width, self.depth, self.heads, self.grid, self.mlp_ratio)
        return ViTEncoder(*sizes, trainable_position=True, **options)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the network gets."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters, to be replaced by `read`."""
        return dict(self.encoder.init(rng, jnp.zeros((1, *self.image_size, self.channels)))["params"])

    def read(self, own: Params, stage: Any) -> Params:
        """`own` with the values that `weights` names, at the start of a run; `stage` is `maskae.stages.StageData`.

        Raises UserError where `weights` names nothing, or what it names has other sizes.
        """
        if self.weights == RANDOM:
            logging.warning("the teacher's weights are random")
            return own
        if self.weights.startswith(STAGE):
            system, variables = stage.earlier(self.weights.removeprefix(STAGE))
            if "encoder" not in variables.params:
                raise UserError(f"{self.weights} has no encoder to teach; it has {', '.join(sorted(variables.params))}")
            adopted, notes = adopt_encoder(own, variables.params["encoder"], self.grid, system.grid)
            for note in notes:
                logging.info("teacher: %s", note)
            return adopted
        if not self.weights:
            raise UserError("the teacher has no weights: give teacher.weights a safetensors file, or 'stage:NAME' of an earlier stage")
        if Path(self.weights).is_dir():
            raise UserError(f"teacher.weights={self.weights} is a folder; make a file of it with tools/export_weights.py")
        return self.read_file(self.weights, own)

    def read_file(self, path: str | Path, own: Params) -> Params:
        """`own` with the values of a safetensors file. Raises UserError where it lacks one or has another shape."""
        blank = jax.tree.map(jnp.zeros_like, own)
        loaded, report = load_weights(path, {"encoder": blank}, Geometry(self.patch_size, self.grid))
        # CLIP's patch projection has no bias: zero is the same.
        missing = [name for name in report.missing if name != "encoder/patch_embed/bias" or self.architecture != "clip"]
        if wrong := report.mismatched + [f"{name} is not in it" for name in missing]:
            raise UserError(f"{path} does not fit the teacher, {len(wrong)} leaves differ: {'; '.join(wrong[:3])}")
        return dict(loaded["encoder"])

    def view(self, images: jax.Array) -> jax.Array:
        """The student's normalised images [B, H, W, C] -> what the teacher gets, `image_size` and `statistics`."""
        images = images.astype(jnp.float32)
        (height, width), (rows, columns) = images.shape[1:3], self.image_size
        if (height, width) != (rows, columns):
            high = jax.lax.Precision.HIGHEST
            down, across = (jnp.asarray(bicubic_matrix(*pair), jnp.float32) for pair in ((height, rows), (width, columns)))
            images = jnp.einsum("rh,cw,bhwk->brck", down, across, images, precision=high)  # [B, H', W', C]
        if self.statistics == "clip":
            images = images * jnp.asarray(IMAGENET_STD) + jnp.asarray(IMAGENET_MEAN)
            images = (images - jnp.asarray(CLIP_MEAN)) / jnp.asarray(CLIP_STD)
        return images

    def look(self, params: Params, images: jax.Array) -> Seen:
        """The student's normalised images [B, H, W, C] -> the teacher's features of the whole of them; no gradient flows back."""
        apply: Any = partial(self.encoder.apply, {"params": params})
        tokens = apply(self.view(images), method="embed")  # [B, N, D]
        first = apply(tokens, method="first_input")  # [B, 1+N, D]
        hidden = apply(tokens, collect=True, method="encode").blocks  # depth of [B, 1+N, D]
        return jax.tree.map(jax.lax.stop_gradient, Seen(first, hidden))

    def attention_of(self, params: Params, seen: Seen, block: int = -1, rows: int | None = None) -> jax.Array:
        """Softmax weights of one block, counted from 0 or from the end, of its first `rows` tokens (None: all).

        Returns float32 [B, heads, rows, 1+N]. Raises UserError where there is no such block.
        """
        if not -self.depth <= block < self.depth:
            raise UserError(f"the teacher has {self.depth} blocks; there is no block {block}")
        index = block % self.depth
        x = seen.first if index == 0 else seen.hidden[index - 1]
        weights = attention_weights(params[f"block_{index}"], x, self.heads, rows=rows, epsilon=self.encoder.epsilon)
        return jax.lax.stop_gradient(weights)

    def importance(self, params: Params, seen: Seen) -> jax.Array:
        """How much CLS looks at each patch in the last block, mean over heads; float32 [B, N], in sum below 1 by what CLS gives itself."""
        return self.attention_of(params, seen, rows=1)[:, :, 0, 1:].mean(1)

    def flops(self) -> float:
        """Matmul FLOPs (2 per multiply-add) of one image: 35.1 GFLOP for ViT-B/16 at 224."""
        length = self.grid[0] * self.grid[1]
        blocks = self.depth * block_flops(1 + length, self.width, self.mlp_ratio)
        return linear_flops(length, self.patch_size**2 * self.channels, self.width) + blocks


def make_teacher(arguments: Mapping[str, Any], grid: tuple[int, int], channels: int) -> Teacher:
    """The teacher of a student with that grid and those channels. Raises UserError for an unknown argument, with the nearest right one."""
    check_arguments("a teacher", arguments, Teacher, ("grid", "channels"))
    return Teacher(grid, channels, **arguments)
