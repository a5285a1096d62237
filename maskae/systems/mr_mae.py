"""MR-MAE: "Mimic before Reconstruct: Enhancing Masked Autoencoders with Feature Mimicking", Gao et al., IJCV 2023, arXiv 2303.05475.

What the encoder gives on visible patches mimics frozen teachers, while the decoder goes on reconstructing the removed ones: two targets on
tokens that do not overlap. The mimic loss was never released; what stands here follows the paper's text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice
from maskae.losses.mimicry import feature_distance, normalise_features
from maskae.masking import draw_exponentials, take_tokens, weighted_noise
from maskae.nn.adaptors import Adaptor
from maskae.nn.attention_maps import shade_patches
from maskae.systems.contract import Batch, Outputs, Params, State, Variables
from maskae.systems.mae import Mae
from maskae.systems.mc_mae import McMae
from maskae.systems.teacher import Seen, Teacher, make_teacher

FOCUSES = ("attention", "random")


@dataclass(frozen=True)
class Mimic:
    """The arguments of mimicking, and what it adds to a masked autoencoder.

    Args:
        teachers: arguments of `maskae.systems.teacher.Teacher` by a name of one's own; their mimic losses are added.
        focus: "attention" lets patches be visible with probability proportional to the attention of the first teacher's CLS token in its
            last block (focused mimicking); "random" leaves it to the autoencoder's masker.
        mimic_layers: encoder blocks, from 1, whose linear maps are added to mimic (multi-layer fusion); () maps the encoder's output alone.
        mimic_cls: the CLS token mimics the teacher's too.
        whiten: targets are normalised to mean 0 and mean square 1 per token.
        mimic_weight, reconstruction_weight: of the two losses.

    Raises:
        UserError: where the sizes do not fit together or a name is unknown.
    """

    teachers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False, kw_only=True)
    focus: str = field(default="attention", kw_only=True)
    mimic_layers: tuple[int, ...] = field(default=(), kw_only=True)
    mimic_cls: bool = field(default=False, kw_only=True)
    whiten: bool = field(default=True, kw_only=True)
    mimic_weight: float = field(default=1.0, kw_only=True)
    reconstruction_weight: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        super().__post_init__()  # type: ignore[misc]
        check_choice("focus", self.focus, FOCUSES)
        if not self.teachers:
            raise UserError("there is nobody to mimic: teachers is empty; give it one as {'name': {'weights': ...}}")
        if any(not 1 <= layer <= self._student.depth for layer in self.mimic_layers):
            raise UserError(f"mimic_layers={self.mimic_layers}: the encoder has the blocks 1 to {self._student.depth}")
        if self.mimic_cls and isinstance(self, McMae):
            raise UserError("mimic_cls=True needs an encoder with a CLS token")
        _ = self.frozen

    @property
    def _student(self) -> Any:
        return self

    @property
    def frozen(self) -> dict[str, Teacher]:
        """The teachers by name, in their order."""
        return {name: make_teacher(arguments, self._student.grid, self._student.channels) for name, arguments in self.teachers.items()}

    def maps(self) -> dict[str, Adaptor]:
        """By teacher, the linear map that every mimicking layer has of its own."""
        return {name: Adaptor(teacher.width, dtype=jnp.dtype(self._student.dtype)) for name, teacher in self.frozen.items()}

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh parameters of the autoencoder and the maps, and teachers that `begin` fills; the batch is not read."""
        params = super().init(rng, batch).params  # type: ignore[misc]
        mimic: Params = {}
        teachers: Params = {}
        for number, (name, teacher) in enumerate(self.frozen.items()):
            head_key, teacher_key = jax.random.split(jax.random.fold_in(rng, number + 1))
            blank = jnp.zeros((1, 1, self._student.width))
            taps = self.mimic_layers or ("output",)
            keys = jax.random.split(head_key, len(taps))
            mimic[name] = {f"tap_{tap}": self.maps()[name].init(key, blank)["params"] for tap, key in zip(taps, keys, strict=True)}
            teachers[name] = teacher.init(teacher_key)
        return Variables(params | {"mimic": mimic}, {"teacher": teachers})

    def begin(self, variables: Variables, stage: Any) -> Variables:
        """The teachers' weights, from where each one's `weights` says."""
        read = {name: teacher.read(variables.state["teacher"][name], stage) for name, teacher in self.frozen.items()}
        return Variables(variables.params, {"teacher": read})

    def look(self, state: State, images: jax.Array) -> dict[str, Seen]:
        """What every teacher sees in the whole images [B, H, W, C]."""
        return {name: teacher.look(state["teacher"][name], images) for name, teacher in self.frozen.items()}

    def importance(self, state: State, seen: Mapping[str, Seen]) -> jax.Array:
        """The first teacher's attention to each patch, float32 [B, L]."""
        name, teacher = next(iter(self.frozen.items()))
        return teacher.importance(state["teacher"][name], seen[name])

    def focused_noise(self, state: State, seen: Mapping[str, Seen], batch: Batch, rng: jax.Array) -> jax.Array:
        """The masking noise [B, L]."""
        if self.focus == "random":
            return self._student.noise(batch["image"], batch["example"], rng)
        importance = self.importance(state, seen)
        return weighted_noise(draw_exponentials(rng, batch["example"], importance.shape[1]), importance)

    def mimic_loss(self, params: Params, named: Mapping[str, Any], seen: Mapping[str, Seen]) -> tuple[jax.Array, jax.Array]:
        """Mean squared error between visible tokens, mapped, and the teachers' (added over teachers), and that of maps that give zero."""
        keep = named["ids_keep"]
        prefix = named["latent"].shape[1] - keep.shape[1]  # CLS, where there is one
        first = 0 if self.mimic_cls else prefix
        taps = {"tap_output": named["latent"]} if not self.mimic_layers else {}
        taps |= {f"tap_{layer}": named["encoder_blocks"][layer - 1] for layer in self.mimic_layers}
        losses, trivial = [], []
        for name, head in self.maps().items():
            apply: Any = head.apply
            mapped = jnp.stack([apply({"params": params[name][tap]}, tokens[:, first:]) for tap, tokens in taps.items()]).sum(0)
            whole = normalise_features(seen[name].hidden[-1], "whiten" if self.whiten else "none")  # [B, 1+L, D]
            target = take_tokens(whole[:, 1:], keep)  # [B, n, D], in the order of the visible tokens
            target = jnp.concatenate([whole[:, :1], target], axis=1) if self.mimic_cls else target
            losses.append(feature_distance(mapped, target, "l2"))
            trivial.append(feature_distance(jnp.zeros_like(target), target, "l2"))
        return jnp.stack(losses).sum(), jnp.stack(trivial).sum()

    def loss_given_seen(
        self, params: Params, seen: Mapping[str, Seen], images: jax.Array, noise: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss, float32 scalar, and its metrics, for what the teachers saw and the masking noise [B, L]."""
        named = self._student.forward(params, images, noise, collect=bool(self.mimic_layers))
        reconstruction, metrics = self._student.pixel_loss(named, images)
        mimic, trivial_mimic = self.mimic_loss(params["mimic"], named, seen)
        trivial = self.reconstruction_weight * metrics["trivial_loss"] + self.mimic_weight * trivial_mimic
        metrics = {"trivial_loss": trivial, "reconstruction_loss": reconstruction, "mimic_loss": mimic}
        return self.reconstruction_weight * reconstruction + self.mimic_weight * mimic, metrics

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Reconstruction of removed patches and mimicry of visible ones. `trivial_loss` is that of predicting zero everywhere."""
        seen = self.look(state, batch["image"])
        loss, metrics = self.loss_given_seen(params, seen, batch["image"], self.focused_noise(state, seen, batch, rng))
        return loss, Outputs(metrics, state)

    def reconstruct(self, params: Params, state: State, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """The autoencoder's panels and the first teacher's attention, each [B, H, W, C] in normalised units."""
        images = batch["image"].astype(jnp.float32)
        seen = self.look(state, images)
        panels = self._student.panels(params, images, self.focused_noise(state, seen, batch, rng))
        return panels | {"attention": shade_patches(images, self.importance(state, seen), self._student.patch_size)}

    @property
    def panel_labels(self) -> dict[str, str]:
        """What each panel of `reconstruct` is."""
        labels: dict[str, str] = super().panel_labels  # type: ignore[misc]
        return labels | {"attention": "teacher's attention, grey where it does not look"}

    def student_flops(self, batch: Batch) -> float:
        """Matmul FLOPs of the autoencoder and the maps per image."""
        student = self._student
        tokens = student.kept(student.grid_of(batch["image"])) + self.mimic_cls
        extra = sum(head.flops(tokens, student.width) for head in self.maps().values()) * max(1, len(self.mimic_layers))
        return float(super().forward_flops(batch) + extra)  # type: ignore[misc]

    def forward_flops(self, batch: Batch) -> float:
        """Autoencoder, maps, teachers: 54.7 GFLOP for ViT-B/16 and one teacher of its size."""
        return self.student_flops(batch) + sum(teacher.flops() for teacher in self.frozen.values())

    def train_flops(self, batch: Batch) -> float:
        """Teachers go forward alone."""
        return 3 * self.student_flops(batch) + sum(teacher.flops() for teacher in self.frozen.values())


@dataclass(frozen=True)
class MrMae(Mimic, Mae):
    """The plain variant: arguments of `Mae` and of `Mimic`."""


@dataclass(frozen=True)
class MrMcMae(Mimic, McMae):
    """The paper's MR-MCMAE, on the masked-convolution backbone: arguments of `McMae` and of `Mimic`."""
