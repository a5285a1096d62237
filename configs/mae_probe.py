"""MAE's linear probing (He et al., CVPR 2022, appendix A.1): LARS on a linear classifier behind a batch norm, the encoder frozen.

    python -m maskae.main --config configs/mae_probe.py:tiny --workdir runs/probe_tiny --config.init_from=runs/mae_tiny
    python -m maskae.main --config configs/mae_probe.py:base --workdir runs/probe_base --config.init_from=runs/mae_base

`init_from` is the run folder of a pre-training, or a safetensors file of the paper's, timm's or Hugging Face's names. This is the paper's
protocol, with augmentation and one learning rate. The evaluator `linear` trains a grid of probes at once on cached features instead, in
minutes; `--config.evaluate.evaluators` of a pre-training names it.

`:tiny`   the digits, 90 epochs of 256: half a minute on 2 CPU cores. Top-1 0.961 on `configs/mae.py:tiny`, 0.808 on the untrained encoder
          (one seed, 360 validation images).
`:base`   ViT-B/16, ImageNet-1K, batch 16384, 90 epochs: 68.0 % top-1 after 1600 epochs of pre-training (the released code's 67.8 %).
          4.1e18 FLOP, forward only: 2 hours on 8 TPU v5e chips at 40 % of their peak (derived, not run).
`:large`  ViT-L/16, 50 epochs, 7.9e18 FLOP: 75.8 %.
`:huge`   ViT-H/14, 50 epochs, 2.1e19 FLOP: 76.6 %.
The batch norm sees the whole batch, so it is not split into microbatches: on few devices take a smaller batch; its rate follows.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from maskae.config import default_config, set_duration, use_digits

VARIANTS = ("tiny", "base", "large", "huge")

SIZES = {
    "tiny": {"patch_size": 2, "width": 64, "depth": 4, "heads": 4, "num_classes": 10},
    "base": {"patch_size": 16, "width": 768, "depth": 12, "heads": 12, "num_classes": 1000},
    "large": {"patch_size": 16, "width": 1024, "depth": 24, "heads": 16, "num_classes": 1000},
    "huge": {"patch_size": 14, "width": 1280, "depth": 32, "heads": 16, "num_classes": 1000},
}
EPOCHS = {"base": 90.0, "large": 50.0, "huge": 50.0}


def get_config(variant: str = "base") -> ConfigDict:
    """The recipe of one size."""
    config = default_config()
    config.system = "mae_probe"
    config.model = {
        "image_size": config.data.get_ref("image_size"),
        "channels": config.data.get_ref("channels"),
        **SIZES[variant],
        "pool": "cls",
        "dtype": "bfloat16",
        "scan": True,
    }
    config.optimizer.name = "lars"
    config.optimizer.arguments = {"momentum": 0.9, "trust": 0.001, "weight_decay": 0.0}
    config.optimizer.base_learning_rate = 0.1
    config.evaluate.evaluators = {"accuracy": {}}
    config.evaluate.baselines = False
    if variant == "tiny":
        return tiny(config)
    config.data.source = "tfds:imagenet2012"
    config.data.examples = 1_281_167
    config.data.statistics = "imagenet"
    config.data.train_transform = (("probe_crop", {"scale": (0.08, 1.0)}),)
    config.train.batch_size = 16384
    set_duration(config.train, total_epochs=EPOCHS[variant])
    set_duration(config.optimizer, warmup_epochs=10.0)
    config.log.every_steps = 20
    set_duration(config.checkpoint, every_epochs=5.0)
    set_duration(config.evaluate, every_epochs=10.0)
    config.evaluate.batch_size = 1024
    config.evaluate.max_examples = 50_000
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    """The digits, without augmentation."""
    config.model.update({"dtype": "float32", "scan": False})
    use_digits(config)
    config.train.batch_size = 256
    set_duration(config.train, total_epochs=90.0)
    # The paper's rate itself. LARS moves a matrix by a share of its norm per step, whatever the batch, and here are only 450 steps.
    config.optimizer.base_learning_rate = 6.4
    set_duration(config.optimizer, warmup_percent=10.0)
    return config
