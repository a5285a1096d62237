"""MaskAlign, "Stare at What You See: Masked Image Modeling without Reconstruction" (Xue et al., CVPR 2023, arXiv 2211.08887).

    python -m maskae.main --config configs/mask_align.py:tiny --workdir runs/mask_align
    python -m maskae.main --config configs/mask_align.py:base --workdir runs/mask_align_base --config.data.source=folder:/data/imagenet \\
        --config.model.teacher.weights=clip-vit-base-patch16.safetensors

`:tiny`        digits in two stages: MAE for 1,200 steps, then a student of its size aligned with it for 1,200.
               Three seeds, logistic regression on frozen pooled features with 10 labels per class / with all: the student 0.763, 0.767,
               0.763 / 0.908, 0.925, 0.911; MAE at the same number of steps, its teacher, 0.724, 0.765, 0.768 / 0.872, 0.900, 0.922. So
               0.764 against 0.752 and 0.915 against 0.898 on average, each ahead with two seeds of three; 20 nearest neighbours tie (0.815,
               0.814). The student has had the teacher's steps too: MAE alone for 3,000 steps at twice the learning rate has 0.886 with 10
               labels (configs/mae.py), so on digits a MAE teacher pays for less than its own steps do. The loss falls from 1.3 (mean of
               steps 1 to 50) to 0.06 to 0.10; zero adaptors have 0.85. Command: `:tiny --config.seed=S`.
`:supervised`  the same with a teacher trained on all labels. One seed: 0.878 with 10 labels per class, 0.944 with all, but the teacher saw
               all labels (0.969), so this says nothing about how few are needed.
`:natural`     Caltech-101's 96 pixels in patches of 12, MAE and then the student for 600 steps each; `--config.data.root=shared/data`.
               Seeds 0 to 2, linear probe of 101 classes / 20 nearest neighbours: the student 0.209, 0.193, 0.198 / 0.114, 0.110, 0.112;
               MAE, its teacher, 0.212, 0.207, 0.236 / 0.114, 0.132, 0.121; untrained 0.116, 0.140, 0.148 / 0.097, 0.112, 0.097; raw pixels
               0.251 / 0.199. The loss falls from 1.28 to 1.30 (steps 1 to 50) to 0.04. The probe does NOT beat the teacher's with any
               seed, and 600 steps leave both below raw pixels.
`:base`        ViT-B/16 with CLIP's ViT-B/16, ImageNet-1K, batch 1024, 200 epochs: 1.7e19 FLOP. The paper: 85.4 % fine-tuned.
`:large`       ViT-L/16 with the same teacher of half its depth (the paper: 86.5 %); the released command's `linear` fusion cannot work.
`:large_clip`  ViT-L/16 with CLIP's ViT-L/14 at 196 pixels (the paper: 87.4 %).
A teacher's file is in any layout of `maskae.interop.weights`, Hugging Face's CLIPVisionModel among them. DINO's ViT-B/16 is
`--config.model.teacher.architecture=vit --config.model.teacher.statistics=student`.
Fine-tuning is configs/mae_finetune.py, with layer decay 0.55 and stochastic depth 0.2 for ViT-B.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from maskae.config import default_config, set_duration, use_digits

VARIANTS = ("tiny", "supervised", "natural", "base", "large", "large_clip")

VIT_BASE = {"patch_size": 16, "width": 768, "depth": 12, "heads": 12}
VIT_LARGE = {"patch_size": 16, "width": 1024, "depth": 24, "heads": 16}
CLIP: dict[str, Any] = {"weights": "", "architecture": "clip", "statistics": "clip", "mlp_ratio": 4.0, "dtype": "bfloat16"}
DIGITS_VIT = {"image_size": 8, "channels": 1, "patch_size": 2, "width": 64, "depth": 4, "heads": 4}
DIGITS_DECODER = {"decoder_width": 32, "decoder_depth": 2, "decoder_heads": 4}
NATURAL_VIT = {"image_size": 96, "channels": 3, "patch_size": 12, "width": 96, "depth": 4, "heads": 4}
NATURAL_DECODER = {"decoder_width": 48, "decoder_depth": 2, "decoder_heads": 4}
METHOD = {"masker": "attention", "fusion": "linear", "adaptor": "linear", "target": "whiten", "distance": "smooth_l1"}


def get_config(variant: str = "base") -> ConfigDict:
    """The recipe of one size."""
    config = default_config()
    config.optimizer.name = "adamw"
    config.optimizer.arguments = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.05}
    if variant in ("tiny", "supervised", "natural"):
        return small(config, variant)
    config.system = "mask_align"
    teacher = {**CLIP, **VIT_BASE} if variant != "large_clip" else {**CLIP, **VIT_LARGE, "patch_size": 14}
    config.model = {
        "image_size": config.data.get_ref("image_size"),
        "channels": config.data.get_ref("channels"),
        **(VIT_BASE if variant == "base" else VIT_LARGE),
        "teacher": teacher,
        "mask_ratio": 0.7,
        **METHOD,
        "fusion": "sum" if variant == "large" else "linear",
        "layer_weights": "top5",
        "drop_path": 0.1 if variant == "base" else 0.2,
        "dtype": "bfloat16",
        "scan": True,
        "remat": "dots",
        "attention": "xla",
    }
    imagenet_recipe(config, epochs=200.0, warmup_epochs=20.0, batch_size=1024)
    config.optimizer.minimum = 1e-5
    return config


def imagenet_recipe(config: ConfigDict, *, epochs: float, warmup_epochs: float, batch_size: int) -> None:
    """MAE's pre-training on ImageNet-1K for so many epochs."""
    config.data.source = "tfds:imagenet2012"
    config.data.examples = 1_281_167
    config.data.statistics = "imagenet"
    config.train.batch_size = batch_size
    set_duration(config.train, total_epochs=epochs)
    config.optimizer.base_learning_rate = 1.5e-4
    set_duration(config.optimizer, warmup_epochs=warmup_epochs)
    config.log.every_steps = 100
    set_duration(config.checkpoint, every_epochs=1.0)
    set_duration(config.evaluate, every_epochs=50.0)
    config.evaluate.batch_size = 1024
    config.evaluate.max_examples = 50_000
    config.evaluate.evaluators = {"knn": {}, "linear": {}, "rank": {}}


def small(config: ConfigDict, variant: str) -> ConfigDict:
    """A teacher trained here, then the student."""
    vit = small_recipe(config, natural=variant == "natural")
    student = {
        "system": "mask_align",
        "model": {**vit, "teacher": teacher_like(vit), "mask_ratio": 0.7, **METHOD, "layer_weights": "top2", "drop_path": 0.0},
    }
    config.stages = ("teacher", "student")
    config.stage = {"teacher": teacher_stage(variant), "student": student}
    return config


def small_recipe(config: ConfigDict, *, natural: bool) -> dict[str, Any]:
    """Data, optimizer and evaluation of the small runs; returns the sizes of their ViT."""
    config.train.batch_size = 64
    config.optimizer.base_learning_rate = 4e-3  # 1e-3 at batch 64
    set_duration(config.optimizer, warmup_percent=10.0)
    if natural:
        config.data.update({"source": "archive:caltech101", "image_size": 96, "cache": "ram"})
        config.data.train_transform = config.data.val_transform = (("resize_center_crop", {"resize": 96}),)
        set_duration(config.train, total_steps=600)
        config.evaluate.evaluators = {"knn": {}, "linear": {}}
        return NATURAL_VIT
    use_digits(config)
    set_duration(config.train, total_steps=1200)
    config.evaluate.evaluators = {"knn": {}, "linear": {}, "logistic": {}, "rank": {}}
    return DIGITS_VIT


def teacher_stage(variant: str) -> dict[str, Any]:
    """Stage 1: MAE on the same images, or a classifier trained on all their labels."""
    if variant == "supervised":
        model = {**DIGITS_VIT, "num_classes": 10, "drop_path": 0.0, "pool": "cls"}
        return {"system": "mae_finetune", "model": model, "train": {"total_steps": 600}}
    natural = variant == "natural"
    sizes = {**NATURAL_VIT, **NATURAL_DECODER} if natural else {**DIGITS_VIT, **DIGITS_DECODER}
    return {"system": "mae", "model": {**sizes, "mask_ratio": 0.75, "norm_pix_loss": True}}


def teacher_like(vit: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a teacher of the sizes `vit` from the stage `teacher`."""
    return {"weights": "stage:teacher", **{name: vit[name] for name in ("patch_size", "width", "depth", "heads")}}
