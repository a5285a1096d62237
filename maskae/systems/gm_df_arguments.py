"""GM-DF's arguments, their checks, and the networks that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from maskae.errors import UserError, check_choice, check_heads
from maskae.interop.clip_text import GM_DF_WORDS
from maskae.losses.alignment import ALIGNMENTS
from maskae.masking import keep_count
from maskae.nn.domain_vit import DomainViT
from maskae.nn.experts import GATES
from maskae.nn.flops import block_flops, linear_flops
from maskae.nn.layers import LayerNorm
from maskae.nn.prompts import PromptLearner, TextTower
from maskae.nn.vit import MaeDecoder
from maskae.systems.contract import Batch
from maskae.systems.teacher import ARCHITECTURES
from maskae.systems.vit_arguments import ViTArguments

CLASSIFICATIONS = ("prompt", "bce")
TEXTS = ("tower", "prototypes")


@dataclass(frozen=True)
class GmDfArguments(ViTArguments):
    """Arguments with the values of the paper and its card, beside those of every ViT (`ViTArguments`).

    Args:
        architecture: of the image tower, "clip" (a norm before the blocks, quick GELU) or "vit".
        num_classes: 2, real and fake.
        domains: of the data, those that are not trained on included. Row 0 of every table is that of an unknown domain.
        train_domains, test_domains: of a meta-train and of a meta-test part of a batch. Without a meta-test part there is no inner step
            and no alignment.
        hide_domain: share of the training examples, drawn anew each step, whose domain counts as unknown: it trains row 0.
        hide_meta_test: the domain of the whole meta-test part counts as unknown, as it is where the detector will be used.
        domain_conditioning: False takes every domain for unknown, everywhere.
        code_width: of the learned domain code that norms read. conditional_norms: False has CLIP's norms.
        experts, expert_width, gate: see `maskae.nn.experts.SoftExperts`; 0 experts have none.
        second_order: layers, from 0, whose second-order effects are added to the class token; () adds nothing.
        embedding_width: of the shared space of images and prompts.
        classification: "prompt", or "bce": one linear output.
        text: "prototypes", a learned vector per domain and class, or "tower": learned words through a frozen text tower.
        text_weights: of that tower and of the projections, a safetensors file of CLIP, or "random", for tests. Read when a run starts.
        text_width, text_depth, text_heads, text_length: of that tower; the length is that of its table of positions.
        words, place: numbers of the fixed words, with the marks of start and end, and before which of them the learned ones stand.
        temperature, temperature_slope: tau + phi * |domain embedding|.
        mask_ratio, decoder_width, decoder_depth, decoder_heads: of masked reconstruction.
        reconstruction_weight, alignment_weight: 0 leaves the loss out.
        alignment, shrinkage: see `maskae.losses.alignment`.
        inner_rate: of the experts' step on the meta-train part (beta); 0 takes none: ordinary joint training.
        first_order: the inner gradient is a constant of the outer one.
        train_vision: False freezes the image tower but for norms and experts.

    Raises:
        UserError: where the sizes do not fit together or a name is unknown.
    """

    architecture: str = "clip"
    num_classes: int = 2
    domains: int = 5
    train_domains: int = 3
    test_domains: int = 1
    hide_domain: float = 0.1
    hide_meta_test: bool = True
    domain_conditioning: bool = True
    code_width: int = 64
    conditional_norms: bool = True
    experts: int = 3
    expert_width: int = 192
    gate: str = "figure"
    second_order: tuple[int, ...] = (8, 9, 10)
    embedding_width: int = 512
    classification: str = "prompt"
    text: str = "tower"
    text_weights: str = ""
    text_width: int = 512
    text_depth: int = 12
    text_heads: int = 8
    text_length: int = 77
    words: tuple[int, ...] = GM_DF_WORDS
    place: int = 2
    temperature: float = 0.07
    temperature_slope: float = 0.01
    mask_ratio: float = 0.5
    decoder_width: int = 384
    decoder_depth: int = 4
    decoder_heads: int = 6
    reconstruction_weight: float = 0.5
    alignment: str = "full"
    alignment_weight: float = 0.3
    shrinkage: float = 0.1
    inner_rate: float = 1e-4
    first_order: bool = False
    train_vision: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        super().__post_init__()
        for name, value, known in (
            ("architecture", self.architecture, ARCHITECTURES),
            ("gate", self.gate, GATES),
            ("classification", self.classification, CLASSIFICATIONS),
            ("text", self.text, TEXTS),
            ("alignment", self.alignment, ALIGNMENTS),
        ):
            check_choice(name, value, known)
        check_heads("decoder_width", self.decoder_width, self.decoder_heads)
        check_heads("text_width", self.text_width, self.text_heads)
        if self.num_classes != 2:
            raise UserError(f"num_classes={self.num_classes}: a detector tells real from fake")
        if self.train_domains < 1 or self.test_domains < 0 or self.groups > self.domains:
            parts = f"train_domains={self.train_domains} and test_domains={self.test_domains}"
            raise UserError(f"{parts} must be at least 1 and 0, and together at most domains={self.domains}")
        if not 0 <= self.hide_domain <= 1:
            raise UserError(f"hide_domain={self.hide_domain}: a share in 0..1")
        if wrong := [layer for layer in self.second_order if not 0 <= layer < self.depth - 1]:
            raise UserError(f"second_order={self.second_order}: layer {wrong[0]} has none after it; there are layers 0 to {self.depth - 2}")
        if self.adapts and not self.experts:
            raise UserError(f"inner_rate={self.inner_rate} moves the experts, and there are none; set it to 0")
        if self.adapts and not self.first_order and self.attention != "xla":
            raise UserError(f"attention='{self.attention}' has no second derivative; take 'xla', or first_order=True")
        if not 1 <= self.place < len(self.words) <= self.text_length - 2:
            raise UserError(f"place={self.place}: the learned words stand between the start and the end of {len(self.words)} fixed ones")
        if not 0 < self.kept(self.length) < self.length:
            raise UserError(f"mask_ratio={self.mask_ratio} masks all or none of {self.length} patches")

    @property
    def groups(self) -> int:
        """Domains in a batch."""
        return self.train_domains + self.test_domains

    @property
    def adapts(self) -> bool:
        """Whether there is an inner step."""
        return self.inner_rate > 0 and self.test_domains > 0

    @property
    def couples_examples(self) -> bool:
        """Always: examples share an inner step, means and covariances."""
        return True

    @property
    def length(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    def kept(self, length: int) -> int:
        """Patches that stay visible of so many."""
        return keep_count(length, self.mask_ratio)

    @property
    def encoder(self) -> DomainViT:
        """The image tower."""
        options: dict[str, Any] = {**ARCHITECTURES[self.architecture], "trainable_position": True, **self.compute}
        options |= {"expert_count": self.experts, "expert_width": self.expert_width, "gate": self.gate}
        sizes = (self.patch_size, self.width, self.depth, self.heads, self.grid, self.mlp_ratio)
        return DomainViT(*sizes, conditional=self.conditional_norms, **options)

    @property
    def decoder(self) -> MaeDecoder:
        """From the tokens of the masked image to the pixels of each patch."""
        return MaeDecoder(self.decoder_width, self.decoder_depth, self.decoder_heads, self.patch_values, self.mlp_ratio, **self.compute)

    @property
    def prompts(self) -> PromptLearner:
        """The tables of learned words."""
        return PromptLearner(self.domains, self.num_classes, self.text_width)

    @property
    def tower(self) -> TextTower:
        """The frozen text tower."""
        options: dict[str, Any] = {"scan": self.scan, "dtype": jnp.dtype(self.dtype)}
        return TextTower(self.text_length, self.text_depth, self.text_heads, self.embedding_width, **options)

    @property
    def second_norm(self) -> LayerNorm:
        """Of one layer's second-order effect."""
        return LayerNorm(self.encoder.epsilon)

    def forward_flops(self, batch: Batch) -> float:
        """Two passes of the tower, of the image and of the masked image, with experts, and the decoder; prompts are left out.

        82 GFLOP of the paper's ViT-B/16; see `passes`.
        """
        return sum(self.passes(self.grid_of(batch["image"])))

    def passes(self, grid: tuple[int, int]) -> tuple[float, float]:
        """Matmul FLOPs of one image: classification, and reconstruction (0 without it)."""
        length = grid[0] * grid[1]
        experts = self.depth * self.experts * 2 * linear_flops(1 + length, self.width, self.expert_width)
        tower = self.vit_flops(grid) + experts
        if not self.reconstruction_weight:
            return tower, 0.0
        ends = linear_flops(1 + length, self.width, self.decoder_width) + linear_flops(length, self.decoder_width, self.patch_values)
        decoder = self.decoder_depth * block_flops(1 + length, self.decoder_width, self.mlp_ratio)
        return tower, tower + decoder + ends

    def train_flops(self, batch: Batch) -> float:
        """Three times the forward pass; the classification of the meta-train part 5 times with a first-order inner step, else 9 times.

        The inner gradient adds twice its forward pass, and the derivative of it twice as much again.
        """
        classification, reconstruction = self.passes(self.grid_of(batch["image"]))
        inner = (2 if self.first_order else 6) * classification * self.train_domains / self.groups if self.adapts else 0.0
        return 3 * (classification + reconstruction) + inner
