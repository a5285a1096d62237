"""The systems by name: one paper, one file."""

from __future__ import annotations

from maskae.systems.croma import Croma
from maskae.systems.mae import Mae
from maskae.systems.mae_finetune import FineTune
from maskae.systems.mae_probe import LinearProbe

SYSTEMS: dict[str, type] = {"croma": Croma, "mae": Mae, "mae_finetune": FineTune, "mae_probe": LinearProbe}
