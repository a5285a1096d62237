"""Point-CMAE, "Bringing Masked Autoencoders Explicit Contrastive Properties for Point Cloud Self-Supervised Learning" (Ren et al.,
ACCV 2024): Point-MAE's recipe with a second masked view, a second decoder and the agreement of both.

    python -m maskae.main --config configs/point_cmae.py:tiny --workdir runs/point_cmae_tiny --config.data.root=shared/data
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from maskae.config import load_module

point_mae = load_module(Path(__file__).with_name("point_mae.py"))
VARIANTS = point_mae.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Point-MAE's recipe with a second view and the agreement of both."""
    config: ConfigDict = point_mae.get_config(variant)
    config.system = "point_cmae"
    config.model.update({"reconstruction_weight": 1000.0, "agreement_weight": 1.0, "pairing": "matched"})
    config.optimizer.no_decay = ("vectors", "cls_token", "mask_token")
    return config
