"""MoCo v2 (Chen et al. 2020) in the CT study; see configs/spark_medical.py for variants and the comparison.

    python -m maskae.main --config configs/moco_v2.py:tiny --workdir runs/moco_v2 --config.data.root=shared/data

The study's command runs v1's linear head under this name: `--config.model.mlp_head=False`. Its learning rate falls once per epoch, here at
every step.
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from maskae.config import default_config, load_module, set_duration

study = load_module(Path(__file__).with_name("spark_medical.py"))
VARIANTS = study.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """The recipe of one size."""
    config: ConfigDict = default_config()
    config.system = "moco_v2"
    study.data_of(config, variant)
    study.evaluation_of(config, variant)
    config.model = study.network_of(config, variant)
    config.model.views = "ct" if variant in study.MEDICAL else "natural"
    config.model.mlp_head = True
    if variant in study.SMALL:
        # A queue of 1,024 keys that follow the encoder more closely: 400 steps are no time for 65,536 and 0.999.
        config.model.update({"outputs": 32, "queue": 1024, "momentum": 0.99})
        study.small_run(config, variant)
        return config
    if variant == "base":
        config.model.update({"mean": study.CT_MEAN, "std": study.CT_STD})
    config.train.batch_size = 128 if variant == "base" else 256
    set_duration(config.train, total_epochs=800.0)
    config.optimizer.name = "sgd"
    config.optimizer.arguments = {"momentum": 0.9, "weight_decay": 1e-4}
    config.optimizer.no_decay = ()
    config.optimizer.base_learning_rate = 0.03  # 0.015 at the study's batch of 128
    set_duration(config.optimizer, warmup_epochs=0.0)
    config.log.every_steps = 100
    return config
