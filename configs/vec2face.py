"""Vec2Face, "Scaling Face Dataset Generation with Loosely Constrained Vectors" (Wu et al., ICLR 2025): an image from an identity vector.

    python -m maskae.main --config configs/vec2face.py:tiny --workdir runs/vec2face_tiny

Stage `identity` trains the network that knows identities, where no ArcFace weights are at hand; stage `faces` trains the generator from
its vectors and, late, the discriminator with it. A folder of faces sorted by person goes in the same way:
--config.data.source=folder:faces with `:base`'s sizes, or --config.data.image_size and the models' `image_size` of one's own.

`:tiny`   scikit-learn's digits as ten identities, 300 and 1,000 steps of 64: 3 minutes on one CPU core. Seeds 0, 1, 2: 0.989, 0.992,
          0.992 of the validation digits are recognised; of the images painted from their vectors 0.967, 0.986, 0.983. Similarity of a
          painted image to its own vector 0.939, 0.952, 0.944, to strangers' -0.090, -0.091, -0.089; PSNR 14.5, 14.8, 14.8 (mean image
          11.3). The images of neighbours of a vector, with noise of deviation 0.3, 0.5, 0.7 on it, are 0.030, 0.074, 0.132 (1 - cosine,
          mean of the seeds, each within 0.018) away from its own.
`:base`   112-pixel crops of 50,000 people; ResNet-100 and LPIPS from files, no stage 1: --config.model.face_weights=r100.safetensors
          --config.model.perceptual_weights=lpips_vgg.safetensors. 2.2e19 FLOP. Not run; it fits 16 v5e chips. The paper: 0.5 M images
          of its HSFace10K train a recogniser to 92.00 % (mean of five sets), real CASIA-WebFace to 94.79.
Each network's gradients are clipped at 2 by their own norm. Unlike in the released code, the generator's loss does not leak into the
discriminator's gradients (--config.model.stop_at_discriminator=False leaks). Without LPIPS weights, `perceptual="identity"` measures the
same distance on the identity network's maps.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from maskae.config import default_config, set_duration, use_digits

VARIANTS = ("tiny", "base")
IMAGES, BATCH, EPOCHS, ADVERSARIAL_EPOCH = 1_022_444, 128, 100, 80


def get_config(variant: str = "base") -> ConfigDict:
    """The recipe of one size."""
    config = default_config()
    config.data.statistics = "unit"
    config.data.flip = False
    config.data.train_transform = ()
    config.data.val_transform = ()
    config.optimizer.name = "adamw"
    config.optimizer.arguments = {"b1": 0.9, "b2": 0.99, "weight_decay": 0.01}
    config.optimizer.no_decay = ()
    config.optimizer.clip_norm = 2.0
    return tiny(config) if variant == "tiny" else base(config)


def base(config: ConfigDict) -> ConfigDict:
    """The released recipe: the discriminator has a constant rate and waits for epoch 80 of 100."""
    config.system = "vec2face"
    config.model = {
        "image_size": 112,
        "channels": 3,
        "layers": (3, 13, 30, 3),
        "widths": (64, 128, 256, 512),
        "features_width": 512,
        "face_weights": "",
        "grid": (7, 7),
        "width": 768,
        "depth": 12,
        "heads": 12,
        "decoder_depth": 8,
        "decoder_heads": 16,
        "dropout": 0.1,
        "mask_rate": (0.75, 0.25, 0.5, 1.0),
        "generation_rate": (0.15, 0.25, 0.1, 1.0),
        "map_channels": 256,
        "paint_width": 128,
        "multipliers": (1, 1, 2, 2, 4),
        "paint_blocks": 2,
        "critic_widths": (64, 128, 256, 512),
        "perceptual": "vgg",
        "perceptual_weights": "",
        "adversarial_start": ADVERSARIAL_EPOCH * IMAGES // BATCH,
        "dtype": "bfloat16",
        "remat": True,
    }
    config.data.source = "folder:faces"
    config.data.examples = IMAGES
    config.data.image_size = 112
    config.data.val_percent = 1.0
    config.train.batch_size = BATCH
    set_duration(config.train, total_epochs=float(EPOCHS))
    config.optimizer.base_learning_rate = 4e-5 * 256 / 112  # the released code divides the batch by 112
    set_duration(config.optimizer, warmup_epochs=5.0)
    config.optimizer.groups = {"^discriminator/": {"schedule": "delayed", "warmup_epochs": float(ADVERSARIAL_EPOCH)}}
    set_duration(config.checkpoint, every_epochs=1.0)
    set_duration(config.evaluate, every_epochs=10.0)
    config.evaluate.max_examples = 10_000
    config.evaluate.evaluators = {"identity": {}}
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    """Digits in two stages: 8 pixels painted from a 4 x 4 map of 16 rows; the discriminator joins for the last fifth."""
    use_digits(config)
    face = {"image_size": 8, "channels": 1, "layers": (1, 1), "widths": (32, 64), "features_width": 32, "dtype": "float32"}
    config.train.batch_size = 64
    config.stages = ("identity", "faces")
    config.stage = {"identity": identity(face), "faces": faces(face)}
    return config


def identity(face: dict[str, Any]) -> dict[str, Any]:
    """Stage 1: ArcFace's loss on ten digits."""
    return {
        "system": "identity_encoder",
        "model": {**face, "num_classes": 10, "margin": 0.5, "scale": 16.0},
        "train": {"total_steps": 300},
        "optimizer": {"base_learning_rate": 4e-3, "warmup_percent": 5.0},
        "evaluate": {"evaluators": {"accuracy": {}}, "baselines": False},
    }


def faces(face: dict[str, Any]) -> dict[str, Any]:
    """Stage 2: the generator, and the discriminator for the last fifth; LPIPS' stand-in are the identity network's maps."""
    return {
        "system": "vec2face",
        "model": {
            **face,
            "face_weights": "stage:identity",
            "grid": (4, 4),
            "width": 64,
            "depth": 2,
            "heads": 4,
            "decoder_depth": 1,
            "decoder_heads": 4,
            "dropout": 0.1,
            "map_channels": 32,
            "paint_width": 32,
            "multipliers": (1, 2),
            "paint_blocks": 1,
            "groups": 8,
            "critic_widths": (16, 32),
            "critic_groups": 8,
            "perceptual": "identity",
            "adversarial_start": 800,
        },
        "train": {"total_steps": 1000},
        "optimizer": {
            "base_learning_rate": 4e-3,
            "warmup_percent": 5.0,
            "groups": {"^discriminator/": {"schedule": "delayed", "warmup_percent": 80.0}},
        },
        "evaluate": {"evaluators": {"identity": {}}, "baselines": False},
    }
