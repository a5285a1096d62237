"""The systems by name: one paper, one file."""

from __future__ import annotations
