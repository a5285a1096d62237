"""Which implementation of attention `auto` takes: a table that `tools/bench_kernels.py` writes from measurements, read here.

The file is JSON, `{"rows": [...]}`, each row one measured result:

    {"device": "NVIDIA H200", "dtype": "bfloat16", "options": "plain", "head_dim": 64, "min_length": 1, "max_length": 512,
     "implementation": "xla", ...}

`device` is JAX's name of the kind of device (`jax.devices()[0].device_kind`; "cpu" for a CPU), `options` what
`maskae.kernels.operands.feature_names` says ("plain", "mask", "segments", "mask+positions+cap", ...), and lengths, both included, are those
of the longer of queries and keys. `dtype` and `head_dim` may be left out: such a row counts for all of them. The first row that fits
counts. Other keys (ratio, spread, versions, command) are for the reader.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from maskae.errors import UserError, nearest
from maskae.kernels.operands import IMPLEMENTATIONS

TABLE = Path(__file__).with_name("attention_table.json")
FALLBACK = "xla"
REQUIRED = {"device": str, "options": str, "min_length": int, "max_length": int, "implementation": str}


@functools.cache
def load_table(path: Path = TABLE) -> tuple[dict[str, Any], ...]:
    """The rows of the table. Raises UserError where a row lacks a key, or names an implementation that does not exist."""
    rows = json.loads(path.read_text())["rows"]
    for number, row in enumerate(rows):
        for key, kind in REQUIRED.items():
            if not isinstance(row.get(key), kind):
                raise UserError(f"{path.name}: row {number} has no '{key}' of type {kind.__name__}")
        name = row["implementation"]
        if name not in IMPLEMENTATIONS or name == "auto":
            raise UserError(f"{path.name}: row {number} names the implementation '{name}'{nearest(name, IMPLEMENTATIONS)}")
    return tuple(rows)


def choose(
    device_kind: str,
    length_q: int,
    length_k: int,
    head_dim: int,
    dtype: Any,
    options: str,
    table: tuple[dict[str, Any], ...] | None = None,
) -> str:
    """The implementation that was measured to be the fastest; `xla` where nothing was measured.

    Args:
        device_kind: JAX's name of the device.
        length_q, length_k: numbers of queries and keys.
        dtype: of the inputs; its name is compared.
        options: as `feature_names` gives it.
        table: rows in place of those of the installed table.
    """
    length, name = max(length_q, length_k), getattr(dtype, "name", str(dtype))
    for row in load_table() if table is None else table:
        fits = row["device"] == device_kind and row["options"] == options and row["min_length"] <= length <= row["max_length"]
        if fits and row.get("dtype", name) == name and row.get("head_dim", head_dim) == head_dim:
            return str(row["implementation"])
    return FALLBACK
