"""BYOL (Grill et al., NeurIPS 2020) in the CT study; see configs/spark_medical.py for variants and the comparison.

    python -m maskae.main --config configs/byol.py:tiny --workdir runs/byol --config.data.root=shared/data

The study's learning rate has fallen to 0 after 100 epochs and rises again, whatever the run's length; here the cosine ends with the run.
With another length set `model.total_steps` too, which the target's momentum follows.
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
    config.system = "byol"
    study.data_of(config, variant)
    study.evaluation_of(config, variant)
    config.model = study.network_of(config, variant)
    config.model.views = "ct" if variant in study.MEDICAL else "natural"
    if variant in study.SMALL:
        study.small_run(config, variant)
        config.model.update({"hidden": 128, "outputs": 32, "momentum": 0.99, "total_steps": config.train.total_steps})
        return config
    if variant == "base":
        config.model.update({"mean": study.CT_MEAN, "std": study.CT_STD})
    config.train.batch_size = 64
    set_duration(config.train, total_steps=300_000)
    config.model.total_steps = 300_000
    config.optimizer.name = "adam"
    config.optimizer.arguments = {"weight_decay": 1.5e-6}
    config.optimizer.no_decay = ()
    config.optimizer.base_learning_rate = 4e-3  # 1e-3 at the study's batch of 64
    set_duration(config.optimizer, warmup_epochs=10.0)
    config.log.every_steps = 100
    return config
