"""Point-MAE, "Masked Autoencoders for Point Cloud Self-supervised Learning" (Pang et al., ECCV 2022).

    python -m maskae.main --config configs/point_mae.py:tiny --workdir runs/point_mae_tiny --config.data.root=shared/data

`:tiny`  objects of Kinect scans (mOSD), 256 points each, labelled by their scene's category. Figures: see configs/point_cmae.py.
`:base`  29.0 M parameters, ShapeNet-55's 41,952 training clouds in `shapenet55/train` (one .npy file each), 300 epochs: 1.5e17 FLOP,
         derived. The paper, fine-tuned by configs/point_classifier.py: ModelNet40 93.8 % (1,024 points, with voting), ScanObjectNN
         90.02 / 88.29 / 85.18 % (OBJ-BG, OBJ-ONLY, PB-T50-RS). Not run here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from maskae.config import default_config, set_duration

VARIANTS = ("tiny", "base")


def get_config(variant: str = "base") -> ConfigDict:
    """The recipe of one size."""
    config = default_config()
    config.system = "point_mae"
    config.data.channels = 0
    config.data.train_transform = ()
    config.data.val_transform = ()
    config.data.flip = False
    config.optimizer.name = "adamw"
    config.optimizer.arguments = {"b1": 0.9, "b2": 0.999, "weight_decay": 0.05}
    config.optimizer.no_decay = ("vectors", "mask_token")
    config.optimizer.schedule = "unshifted_cosine"
    config.optimizer.minimum = 1e-6
    config.optimizer.base_learning_rate = 2e-3  # 1e-3 at batch 128
    return tiny(config) if variant == "tiny" else base(config)


def base(config: ConfigDict) -> ConfigDict:
    """The paper's recipe: 64 groups of 32 points, 26 of them visible."""
    config.model = {
        "groups": 64,
        "group_size": 32,
        "width": 384,
        "depth": 12,
        "heads": 6,
        "decoder_depth": 4,
        "decoder_heads": 6,
        "mask_ratio": 0.6,
        "masker": "random",
        "chamfer": "l2",
        "drop_path": 0.1,
        "scale": (2 / 3, 3 / 2),
        "shift": 0.2,
        "rotate": False,
        "dtype": "float32",
        "scan": True,
        "remat": "dots",
        "attention": "xla",
    }
    config.data.source = "points:shapenet55/train@1024"
    config.data.fields = {"points": "float32[1024,3]"}
    config.data.examples = 41_952
    config.data.val_percent = 1.0
    config.train.batch_size = 128
    set_duration(config.train, total_epochs=300.0)
    set_duration(config.optimizer, warmup_epochs=10.0)
    set_duration(config.checkpoint, every_epochs=10.0)
    set_duration(config.evaluate, every_epochs=50.0)
    config.evaluate.evaluators = {"rank": {}}
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    """mOSD's 456 objects, 30 % of the scenes held out: 32 groups of 16 points, 13 of them visible."""
    config.model = {
        "groups": 32,
        "group_size": 16,
        "width": 96,
        "depth": 4,
        "heads": 4,
        "token_widths": (32, 64, 128),
        "decoder_depth": 2,
        "decoder_heads": 4,
        "mask_ratio": 0.6,
        "masker": "random",
        "chamfer": "l2",
        "drop_path": 0.1,
        "scale": (2 / 3, 3 / 2),
        "shift": 0.2,
        "rotate": False,
        "dtype": "float32",
        "scan": False,
        "remat": "none",
        "attention": "xla",
    }
    config.data.source = "points:mosd_rgbd_clouds/mosd.npz@256"
    config.data.val_percent = 30.0
    config.train.batch_size = 32
    set_duration(config.train, total_steps=300)
    config.optimizer.base_learning_rate = 8e-3  # 1e-3 at batch 32
    set_duration(config.optimizer, warmup_percent=10.0)
    config.evaluate.evaluators = {
        "knn": {"ks": (10,)},
        "logistic": {"labels_per_class": 10},
        "few_shot": {"ways": 5, "shots": (10,)},
        "rank": {},
    }
    return config
