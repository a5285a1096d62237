"""CROMA, "Remote Sensing Representations with Contrastive Radar-Optical Masked Autoencoders" (Fuller et al., NeurIPS 2023).

    python -m maskae.main --config configs/croma.py:tiny --workdir runs/croma_tiny --config.data.root=shared/data

`:tiny`   EuroSAT's 3,200 photographs as two sensors, 400 steps of 64: 2 to 3 minutes of training on 2 busy CPU cores. With seeds 0, 1, 2
          the other sensor is found among 64 in 0.540, 0.642, 0.498 of the cases (chance 0.016, untrained 0.014); the reconstruction
          loss ends at 1.13 to 1.14 (predicting zero: 2.08). Top-1 of the joint feature (untrained, seed 0: logistic 0.688, 20 labels 0.619,
          kNN 0.629), and with --config.model.reconstruction_weight=0.0 or --config.model.contrastive_weight=0.0 beside it:
            both losses           logistic 0.757, 0.759, 0.752; 20 labels per class 0.678, 0.673, 0.666; kNN 0.698, 0.700, 0.690
            contrastive alone     logistic 0.751, 0.760, 0.736; 20 labels per class 0.662, 0.664, 0.649; kNN 0.649, 0.661, 0.655
            reconstruction alone  logistic 0.729, 0.740, 0.720; 20 labels per class 0.623, 0.641, 0.629; kNN 0.671, 0.669, 0.671
          (Without a reconstruction loss the joint encoder stays as initialised.) Both losses win with few labels and in kNN; with all
          labels they win in seeds 0 and 2 and lose by 0.001 in seed 1. Seed 0, trained at 32 pixels (8 x 8 patches), evaluated without
          training at 64 (16 x 16; --evaluate RUN --config.model.feature_size=64, 800 records of each split): logistic 0.728 (0.719 at
          32), kNN 0.641 (0.653), the other sensor among 64 0.448 (0.540).
`:sentinel` six real Sentinel-1/2 pairs: a check of every part on 12 + 2 bands; no figures, with two held-out places none would mean much.
`:base`   CROMA-B on SSL4EO-S12, 300 epochs of a million pairs: 2.1e19 FLOP. `:large` CROMA-L, 600 epochs. Not run.
          Compiled for 16 v5e chips it takes 9.3 GiB of 15.75 each.
          The paper: BigEarthNet (10 %) 87.58 and 88.29 mAP fine-tuned, EuroSAT 99.22 and 99.46.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from maskae.config import default_config, set_duration

VARIANTS = ("tiny", "sentinel", "base", "large")

SIZES = {"base": {"width": 768, "depth": 12}, "large": {"width": 1024, "depth": 24}}
BOTH_AND_EACH = ("pooled", "optical", "radar")


def get_config(variant: str = "base") -> ConfigDict:
    """The recipe of one size."""
    config = default_config()
    config.system = "croma"
    config.data.channels = 0
    config.data.train_transform = ()
    config.data.val_transform = ()
    config.data.flip = False
    config.optimizer.name = "adamw"
    config.optimizer.arguments = {"b1": 0.9, "b2": 0.999, "weight_decay": 0.01}
    if variant in ("tiny", "sentinel"):
        return tiny(config) if variant == "tiny" else sentinel(tiny(config))
    config.model = {
        "image_size": 120,
        "optical_channels": 12,
        "radar_channels": 2,
        "patch_size": 8,
        **SIZES[variant],
        "heads": 16,
        "decoder_width": 512,
        "decoder_depth": 1,
        "decoder_heads": 8,
        "mask_ratio": 0.75,
        "contrastive_weight": 1.0,
        "reconstruction_weight": 1.0,
        "joint_self_bias": "radar",
        "key_stop_gradient": True,
        "target_norm": "joint",
        "crop_sides": (60, 180),
        "flip": True,
        "mixup_alpha": 0.3,
        "feature_size": 120,
        "pool": "joint",
        "dtype": "bfloat16",
        "scan": True,
        "remat": "full",
        "attention": "auto",
    }
    config.data.source = "sentinel_pairs:ssl4eo_s12@180"  # a random window of 180 of the 264 pixels, in which a crop of 60 to 180 is drawn
    config.data.fields = {"sensor_optical": "uint8[180,180,12]", "sensor_radar": "uint8[180,180,2]"}
    config.data.examples = 1_000_000
    config.data.val_percent = 1.0
    config.train.batch_size = 7200 if variant == "base" else 4096
    set_duration(config.train, total_epochs=300.0 if variant == "base" else 600.0)
    config.optimizer.base_learning_rate = 4e-6
    set_duration(config.optimizer, warmup_percent=5.0)
    config.log.every_steps = 50
    set_duration(config.checkpoint, every_epochs=5.0)
    set_duration(config.evaluate, every_epochs=50.0)
    config.evaluate.batch_size = 512
    config.evaluate.max_examples = 10_000
    config.evaluate.evaluators = {"matched": {}, "rank": {}}
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    """EuroSAT's photographs as two sensors: colours, and luminance with gradient energy; 8 x 8 patches of which 16 are kept."""
    config.model = {
        "image_size": 32,
        "optical_channels": 3,
        "radar_channels": 2,
        "patch_size": 4,
        "width": 64,
        "depth": 2,
        "heads": 4,
        "decoder_width": 32,
        "decoder_depth": 1,
        "decoder_heads": 4,
        "mask_ratio": 0.75,
        "contrastive_weight": 1.0,
        "reconstruction_weight": 1.0,
        "joint_self_bias": "radar",
        "key_stop_gradient": True,
        "target_norm": "joint",
        "crop_sides": (32, 64),
        "flip": True,
        "mixup_alpha": 0.0,
        "feature_size": 32,
        "pool": "joint",
        "dtype": "float32",
        "scan": False,
        "remat": "none",
        "attention": "xla",
    }
    config.data.source = "two_sensor:eurosat_rgb@64"
    config.data.image_size = 32
    config.data.cache = "none"
    config.train.batch_size = 64
    set_duration(config.train, total_steps=400)
    config.optimizer.base_learning_rate = 4e-3  # 1e-3 at batch 64
    set_duration(config.optimizer, warmup_percent=10.0)
    config.evaluate.evaluators = {
        "matched": {},
        "knn": {"features": BOTH_AND_EACH, "ks": (20,)},
        "logistic": {"features": BOTH_AND_EACH, "labels_per_class": 20},
        "rank": {"features": BOTH_AND_EACH},
    }
    return config


def sentinel(config: ConfigDict) -> ConfigDict:
    """Six real Sentinel-1/2 pairs, random windows of 64 pixels: too few to generalise from, enough to see every part work on 14 bands."""
    config.model.update({"image_size": 64, "optical_channels": 12, "radar_channels": 2, "patch_size": 8, "crop_sides": (0, 0)})
    config.model.feature_size = 64
    config.data.source = "sentinel_pairs:rs_s1s2_pairs/rs_s1s2_pairs.npz@64"
    config.data.image_size = 64
    config.data.val_percent = 30.0
    config.train.batch_size = 32
    set_duration(config.train, total_steps=500)
    config.evaluate.evaluators = {"matched": {"batch": 8}, "multilabel": {"features": BOTH_AND_EACH}, "rank": {"features": BOTH_AND_EACH}}
    return config
