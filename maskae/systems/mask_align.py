"""MaskAlign: "Stare at What You See: Masked Image Modeling without Reconstruction", Xue et al., CVPR 2023, arXiv 2211.08887.

A student sees the patches that a frozen teacher attends to; its features there, mixed over depth, have to be those that the teacher
computes from the whole image. Nothing is reconstructed: there are no mask tokens and no decoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice, check_share
from maskae.losses.mimicry import DISTANCES, TARGETS, feature_distance, normalise_features
from maskae.masking import draw_exponentials, draw_noise, keep_count, random_mask, take_tokens, weighted_noise
from maskae.nn.adaptors import ADAPTORS, Adaptor
from maskae.nn.attention_maps import shade_patches
from maskae.nn.sharding import constrain
from maskae.nn.stack import drop_path_draws
from maskae.nn.vit import ViTEncoder
from maskae.systems.contract import Batch, Outputs, Params, State, Variables
from maskae.systems.teacher import Teacher, make_teacher
from maskae.systems.vit_arguments import ViTArguments

MASKERS = ("attention", "random")
FUSIONS = ("linear", "sum", "simple")


def layer_weights(name: str, depth: int) -> tuple[float, ...]:
    """A weight per layer, in sum 1: "mean", "out" (the last), "linear_decay" (rising linearly from 0), "topK" (the last K), "midK" (layer K
    from 0). Raises UserError for another name or a K beyond `depth`.
    """
    if name == "mean":
        return (1 / depth,) * depth
    if name == "linear_decay":
        return tuple(layer / max(sum(range(depth)), 1) for layer in range(depth))
    found = re.fullmatch(r"(top|mid)(\d+)", "top1" if name == "out" else name)
    if found is None:
        raise UserError(f"unknown layer_weights '{name}'; there are mean, out, linear_decay, top1 to top{depth} and mid0 to mid{depth - 1}")
    number = int(found[2])
    chosen = range(depth - number, depth) if found[1] == "top" else range(number, number + 1)
    if not (chosen and chosen[0] >= 0 and chosen[-1] < depth):
        raise UserError(f"layer_weights='{name}': the teacher has {depth} layers")
    return tuple(1 / len(chosen) if layer in chosen else 0.0 for layer in range(depth))


@dataclass(frozen=True)
class MaskAlign(ViTArguments):
    """Arguments with the values of the paper's ViT-B/16, beside those of every ViT (`ViTArguments`).

    Args:
        teacher: arguments of `maskae.systems.teacher.Teacher`.
        masker: "attention" keeps patches with probability proportional to the attention of the teacher's CLS token in its last block
            (paper, section 3.2); "random" as MAE.
        keep: kept patches; None takes int(L * (1 - mask_ratio)).
        drop_path: rate at the student's last block, rising linearly from 0.
        fusion: what an adaptor gets: "linear", a learned mix of all student layers that starts near the layer of its own number; "sum", one
            that starts at their mean; "simple", that layer itself. All but "sum" need a student as deep as its teacher.
        adaptor: see `maskae.nn.adaptors`. A layer of weight 0 has none.
        target: how the teacher's features are normalised, see `maskae.losses.mimicry`.
        distance: between features, see there.
        layer_weights: see the function of that name.

    Raises:
        UserError: where the sizes do not fit together or a name is unknown.
    """

    teacher: Mapping[str, Any] = field(default_factory=dict, hash=False)
    masker: str = "attention"
    mask_ratio: float = 0.7
    keep: int | None = None
    drop_path: float = 0.1
    fusion: str = "linear"
    adaptor: str = "linear"
    target: str = "whiten"
    distance: str = "smooth_l1"
    layer_weights: str = "top5"

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        super().__post_init__()
        check_choice("masker", self.masker, MASKERS)
        check_choice("fusion", self.fusion, FUSIONS)
        check_choice("adaptor", self.adaptor, ADAPTORS)
        check_choice("target", self.target, TARGETS)
        check_choice("distance", self.distance, DISTANCES)
        check_share("drop_path", self.drop_path)
        depth = self.frozen.depth
        if self.fusion != "sum" and depth != self.depth:
            layers = f"{self.depth} student and {depth} teacher layers"
            raise UserError(f"fusion='{self.fusion}' needs as many of the one as of the other, not {layers}; take fusion='sum'")
        layer_weights(self.layer_weights, depth)
        self.kept(self.grid)

    @property
    def frozen(self) -> Teacher:
        """The teacher."""
        return make_teacher(self.teacher, self.grid, self.channels)

    @property
    def encoder(self) -> ViTEncoder:
        """The student. The losses look at what its blocks give, so that its final norm stays as it was made."""
        return self.vit(drop_path=self.drop_path)

    @property
    def adaptor_module(self) -> Adaptor:
        """One map from student to teacher."""
        return Adaptor(self.frozen.width, self.adaptor, dtype=jnp.dtype(self.dtype))

    @property
    def layers(self) -> dict[int, float]:
        """The teacher's layers that count, from 0, with their weights."""
        return {layer: weight for layer, weight in enumerate(layer_weights(self.layer_weights, self.frozen.depth)) if weight > 0}

    @property
    def couples_examples(self) -> bool:
        """Whether the target of an example depends on the others."""
        return self.target == "batch"

    def kept(self, grid: tuple[int, int]) -> int:
        """Number of kept patches. Raises UserError unless at least one is."""
        length = grid[0] * grid[1]
        keep = keep_count(length, self.mask_ratio) if self.keep is None else self.keep
        if not 0 < keep <= length:
            raise UserError(f"keep={self.keep}, mask_ratio={self.mask_ratio} keep {keep} of {length} patches; keep 1 to {length}")
        return keep

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh parameters of the student and its adaptors, and a teacher that `begin` fills; the batch is not read."""
        encoder_key, adaptor_key, teacher_key = jax.random.split(rng, 3)
        params: Params = {"encoder": self.encoder.init(encoder_key, self.blank_images())["params"]}
        blank = jnp.zeros((1, 1, self.width))
        for layer, key in zip(self.layers, jax.random.split(adaptor_key, len(self.layers)), strict=True):
            params[f"adaptor_{layer}"] = self.adaptor_module.init(key, blank)["params"]
        shape = (self.frozen.depth, self.depth)
        if self.fusion != "simple":
            # Called a scale so that it does not decay, as in the released code.
            params["fusion"] = {"scale": jnp.eye(self.depth) + 0.01 if self.fusion == "linear" else jnp.full(shape, 1 / self.depth)}
        return Variables(params, {"teacher": self.frozen.init(teacher_key)})

    def begin(self, variables: Variables, stage: Any) -> Variables:
        """The teacher's weights, from where `teacher.weights` says."""
        return Variables(variables.params, {"teacher": self.frozen.read(variables.state["teacher"], stage)})

    def forward(
        self, params: Params, state: State, images: jax.Array, draws: jax.Array, drop_draws: jax.Array | None = None
    ) -> dict[str, Any]:
        """Everything between images [B, H, W, C] and the loss, by name.

        Args:
            params, state: the system's variables.
            images: normalised, [B, H, W, C].
            draws: of the masker [B, L]: Exp(1) for "attention", uniform for "random".
            drop_draws: uniform float32 [depth, 2, B] for drop path; None switches it off.

        Returns:
            `seen`, `importance` [B, L] and `ids_keep` [B, n], `student_hidden` (every block's output [B, 1+n, D]), and by layer
            `student` and `target` [B, 1+n, teacher width].
        """
        teacher = self.frozen
        seen = teacher.look(state["teacher"], images)
        importance = teacher.importance(state["teacher"], seen)  # [B, L]
        noise = weighted_noise(draws, importance) if self.masker == "attention" else draws
        keep = random_mask(noise, self.kept(self.grid_of(images))).keep_indices  # [B, n]
        encode: Any = partial(self.encoder.apply, {"params": params["encoder"]})
        tokens = constrain(take_tokens(encode(images, method="embed"), keep), "batch")  # [B, n, D]
        hidden = encode(tokens, drop_draws, collect=True, method="encode").blocks  # depth of [B, 1+n, D]
        named = {"seen": seen, "importance": importance, "ids_keep": keep, "student_hidden": hidden}
        named["student"] = {layer: self.adapted(params, hidden, layer) for layer in self.layers}
        return named | {"target": {layer: self.targets(seen.hidden[layer], keep) for layer in self.layers}}

    def adapted(self, params: Params, hidden: Any, layer: int) -> jax.Array:
        """The student's layers [B, 1+n, D] mixed and mapped to the teacher's layer, [B, 1+n, teacher width] (paper, section 3.3)."""
        mixed = hidden[layer] if self.fusion == "simple" else None
        if mixed is None:
            weights = params["fusion"]["scale"][layer].astype(hidden[0].dtype)
            mixed = jnp.tensordot(weights, hidden, 1) if self.scan else sum(w * h for w, h in zip(weights, hidden, strict=True))
        adapt: Any = self.adaptor_module.apply
        return adapt({"params": params[f"adaptor_{layer}"]}, mixed)

    def targets(self, hidden: jax.Array, keep: jax.Array) -> jax.Array:
        """A teacher layer [B, 1+L, D], normalised, its CLS token and the patches `keep` int32 [B, n]: float32 [B, 1+n, D]."""
        whole = normalise_features(hidden, self.target)
        return jnp.concatenate([whole[:, :1], take_tokens(whole[:, 1:], keep)], axis=1)

    def distances(self, student: Mapping[int, jax.Array], target: Mapping[int, jax.Array]) -> jax.Array:
        """The weighted sum over layers of the distance; float32 scalar."""
        each = [weight * feature_distance(student[layer], target[layer], self.distance) for layer, weight in self.layers.items()]
        return jnp.stack(each).sum()

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """The distance to the teacher on kept patches and CLS. `trivial_loss` is that of adaptors that give zero."""
        mask_key, drop_key = jax.random.split(rng)
        drop_draws = drop_path_draws(drop_key, batch["example"], (self.depth, 2)) if self.drop_path else None  # [depth, 2, B]
        named = self.forward(params, state, batch["image"], self.draws(batch["image"], batch["example"], mask_key), drop_draws)
        trivial = self.distances(jax.tree.map(jnp.zeros_like, named["target"]), named["target"])
        return self.distances(named["student"], named["target"]), Outputs({"trivial_loss": trivial}, state)

    def draws(self, images: jax.Array, example: jax.Array, rng: jax.Array) -> jax.Array:
        """The masker's draws [B, L]."""
        rows, columns = self.grid_of(images)
        return (draw_exponentials if self.masker == "attention" else draw_noise)(rng, example, rows * columns)

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """The student's final-norm outputs of the whole image: `cls` [B, D], `tokens` [B, L, D], `pooled` [B, D]; float32."""
        encode: Any = self.encoder.apply
        return self.named_features(encode({"params": params["encoder"]}, batch["image"]))

    def reconstruct(self, params: Params, state: State, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Panels [B, H, W, C]: the image, the teacher's attention, and the patches that one draw keeps."""
        images = batch["image"].astype(jnp.float32)
        named = self.forward(params, state, images, self.draws(images, batch["example"], rng))
        length = named["importance"].shape[1]
        kept = jax.nn.one_hot(named["ids_keep"], length).sum(1)  # [B, L]
        shown = {"original": jnp.ones_like(kept), "attention": named["importance"], "kept": kept}
        return {name: shade_patches(images, weights, self.patch_size) for name, weights in shown.items()}

    @property
    def panel_labels(self) -> dict[str, str]:
        """What each panel of `reconstruct` is."""
        how = "drawn by attention" if self.masker == "attention" else "drawn at random"
        return {"original": "original", "attention": "teacher's attention, grey where it does not look", "kept": f"kept patches, {how}"}

    def student_flops(self, batch: Batch) -> float:
        """Matmul FLOPs of student and adaptors per image."""
        grid = self.grid_of(batch["image"])
        kept = self.kept(grid)
        return self.vit_flops(grid, kept) + len(self.layers) * self.adaptor_module.flops(1 + kept, self.width)

    def forward_flops(self, batch: Batch) -> float:
        """Patch projection of all patches, student on 1 + kept tokens, adaptors of the layers that count, teacher; 45.8 GFLOP for ViT-B."""
        return self.student_flops(batch) + self.frozen.flops()

    def train_flops(self, batch: Batch) -> float:
        """The teacher goes forward alone."""
        return 3 * self.student_flops(batch) + self.frozen.flops()
