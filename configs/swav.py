"""SwAV (Caron et al., NeurIPS 2020) in the CT study; see configs/spark_medical.py for variants and the comparison.

    python -m maskae.main --config configs/swav.py:tiny --workdir runs/swav --config.data.root=shared/data

The study's script freezes the prototypes for 313 epochs; the original's 313 are iterations, which is what is done here.
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
    config.system = "swav"
    study.data_of(config, variant)
    study.evaluation_of(config, variant)
    config.model = study.network_of(config, variant)
    config.model.views = "ct_swav" if variant in study.MEDICAL else "natural"
    if variant in study.SMALL:
        config.model.update({"hidden": 64, "outputs": 32, "prototypes": 64, "small_crops": 2, "small_size": 16, "freeze_prototypes": 40})
        study.small_run(config, variant)
        return config
    if variant == "base":
        config.model.update({"mean": study.CT_MEAN, "std": study.CT_STD})
    else:
        config.model.update({"crop": (0.14, 1.0), "small_crop": (0.05, 0.14), "prototypes": 3000})
    config.train.batch_size = 128 if variant == "base" else 4096
    set_duration(config.train, total_epochs=800.0)
    config.optimizer.name = "lars"
    config.optimizer.arguments = {"momentum": 0.9, "trust": 1e-3, "weight_decay": 1e-6}
    config.optimizer.base_learning_rate = 0.3  # 0.15 at the study's batch of 128
    set_duration(config.optimizer, warmup_epochs=10.0)
    config.log.every_steps = 100
    return config
