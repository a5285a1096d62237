"""Reference cases: what the papers' own code computed from recorded weights, inputs and random draws."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskae.errors import UserError
from maskae.interop.weights import read_tensors

FORWARD = 1e-5
GRADIENT = 1e-4


@dataclass(frozen=True)
class Case:
    """`record` is case.json; `weights`, `inputs` and `outputs` are the recorded arrays by their official names."""

    folder: Path
    record: dict[str, Any]
    weights: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    @staticmethod
    def read(folder: str | Path) -> Case:
        """The case in `folder`. Raises UserError where a part of it is missing."""
        folder = Path(folder)
        path = folder / "case.json"
        if not path.is_file():
            raise UserError(f"{folder} is not a reference case: it has no case.json")
        try:
            record = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON: {error}") from error
        parts = [read_tensors(folder / f"{part}.safetensors")[0] for part in ("weights", "inputs", "outputs")]
        return Case(folder, record, *parts)

    @property
    def meanings(self) -> dict[str, str]:
        """Every output that the record lists, in its order, with what it says about it, if anything.

        Records list them in two ways under two names.
        """
        tensors = self.record["tensors"]
        listed = tensors["outputs" if "outputs" in tensors else "outputs.safetensors"]
        pairs = listed.items() if isinstance(listed, dict) else [(each["name"], each) for each in listed]
        return {name: each.get("meaning", "") for name, each in pairs}

    def meaning(self, name: str) -> str:
        """What the record says about an output; "" where it does not list it."""
        return self.meanings.get(name, "")

    def wants(self, *prefixes: str) -> bool:
        """Whether any recorded output's name begins with one of these."""
        return any(name.startswith(prefixes) for name in self.outputs)


@dataclass(frozen=True)
class Reproduced:
    """A recomputed output and how near it has to be.

    Attributes:
        value: of the recorded shape.
        relative: allowed largest difference, as a share of the recorded array's largest absolute value.
        absolute: allowed largest difference beside that.
        skip: bool array, True where an entry is not compared; None compares all.
        slack: how much farther each entry may lie; None is 0.
        note: why entries are skipped or the tolerance is wider; shown in the table.
    """

    value: Any
    relative: float = FORWARD
    absolute: float = 0.0
    skip: np.ndarray | None = None
    note: str = ""
    slack: np.ndarray | None = None


def exact(value: Any) -> Reproduced:
    """A table, an index or a mask: not one entry may differ."""
    return Reproduced(value, relative=0.0)


def leading(value: Any, recorded: np.ndarray) -> np.ndarray:
    """The leading entries of every axis of `value`, as many as were recorded; all of it where it has other axes than the record."""
    value = np.asarray(value)
    return value[tuple(slice(size) for size in recorded.shape)] if value.ndim == recorded.ndim else value


def after_steps(value: Any, learning_rates: Any, skip: np.ndarray | None = None, note: str = "") -> Reproduced:
    """A parameter after optimizer steps: 1e-4 of the sum of the learning rates, the farthest that Adam can have moved it."""
    return Reproduced(value, relative=1e-6, absolute=1e-4 * float(np.sum(learning_rates)), skip=skip, note=note)
