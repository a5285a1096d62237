"""The systems by name: one paper, one file."""

from __future__ import annotations

from maskae.systems.mae import Mae

SYSTEMS: dict[str, type] = {"mae": Mae}
