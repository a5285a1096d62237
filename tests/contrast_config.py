"""The config of the toy system with global negatives, `--config tests/contrast_config.py`; reading it makes the system known."""

from __future__ import annotations

from ml_collections import ConfigDict

from maskae.config import default_config, set_duration, use_digits
from maskae.systems import SYSTEMS
from tests.contrast import Contrast

VARIANTS = ("tiny",)


def get_config(variant: str = "tiny") -> ConfigDict:
    SYSTEMS["contrast"] = Contrast
    config = default_config()
    config.system, config.model = "contrast", {"width": 8}
    use_digits(config)
    set_duration(config.optimizer, warmup_percent=10.0)
    set_duration(config.train, total_steps=20)
    return config
