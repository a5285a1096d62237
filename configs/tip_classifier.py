"""Classification with images and incomplete tables on TIP's encoders (Du et al., ECCV 2024): configs/tip.py pretrains.

    python -m maskae.main --config configs/tip_classifier.py:tiny --workdir runs/tip_tuned --config.init_from=runs/tip_tiny

`--config.model.trained=head` trains the linear classifier alone; without `init_from` it is the supervised baseline. A table with fewer
cells is the source with a pattern: `--config.data.source=digits_table:value@0.5`, the same for training and validation.

`:base` is the recipe for the car models: Adam 1e-4, constant, no weight decay, crops of 0.6 to 1 with probability 0.8, a batch of 256 (the
released code stops 10 epochs after the best validation accuracy, at most 500; here it is a run of 100). `:covid` is a two-class task, whose
area under the curve the evaluator `missing_cells` gives.
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from maskae.config import load_module, set_duration

pretraining = load_module(Path(__file__).with_name("tip.py"))
VARIANTS = ("tiny", "covid", "base")
CLASSES = {"tiny": 10, "covid": 2, "base": 286}


def get_config(variant: str = "base") -> ConfigDict:
    """The recipe of one task."""
    config: ConfigDict = pretraining.get_config(variant)
    config.system = "tip_classifier"
    config.model.num_classes = CLASSES[variant]
    config.model.view_probability = 0.8
    config.model.crop = (0.6, 1.0)
    config.optimizer.schedule = "constant"
    config.optimizer.arguments = {}
    set_duration(config.optimizer, warmup_percent=0.0)
    shares = (0.0, *config.model.missing_shares)
    config.evaluate.evaluators = {"accuracy": {}, "missing_cells": {"shares": shares}}
    if variant == "base":
        config.optimizer.base_learning_rate = 1e-4
        set_duration(config.train, total_epochs=100.0)
    else:
        set_duration(config.train, total_steps=300)
    return config
