"""Compare a system with what its paper's own code computed.

    python tools/parity.py CASE_DIR

Prints every recorded tensor with its largest difference relative to the tensor's largest value. Exits with 0 where all agree, 1 where any
differs or cannot be compared, 2 where the case cannot be read.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# The cases were recorded in double precision on a CPU; an accelerator's fast matmuls would differ in the third digit.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from maskae.errors import UserError
from maskae.interop.case import Case
from maskae.interop.parity import compare_case, table


def main(arguments: list[str]) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="tools/parity.py", description="Compare a system with its reference case.")
    parser.add_argument("case", type=Path, help="folder with case.json, weights, inputs and outputs (.safetensors)")
    folder = parser.parse_args(arguments).case
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        case = Case.read(folder)
        rows = compare_case(case)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(case, rows))
    return 0 if rows and all(row.agrees for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
