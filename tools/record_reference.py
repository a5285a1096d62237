"""Records the losses of a config's first steps as a reference curve, which a test repeats and `tools/compare.py` takes.

    python tools/record_reference.py configs/mae.py:tiny tests/refs/mae_tiny.json --config.train.total_steps=20

A run to compare with it logs every step: `--config.log.every_steps=1`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

# So that it also works in a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from maskae.config import load_config, split_arguments
from maskae.errors import UserError
from maskae.experiment import build

STEPS = 20
TOLERANCE = 1e-5


def losses_of(spec: str, overrides: Sequence[str], steps: int = STEPS) -> list[float]:
    """The losses of the first `steps` steps of the config `spec`."""
    experiment = build(load_config(spec, overrides))
    with jax.set_mesh(experiment.mesh):
        state, losses = experiment.start_state(), []
        for k in range(steps):
            state, metrics = experiment.train_step(state, experiment.put(experiment.pipeline.batch(k)))
            losses.append(float(metrics["loss"]))
    return losses


def main(argv: Sequence[str]) -> int:
    """Writes the reference file; refuses to replace one."""
    words, overrides = split_arguments(argv)
    if len(words) != 2:
        print("usage: python tools/record_reference.py CONFIG OUT.json [--config.key=value ...]", file=sys.stderr)
        return 2
    spec, out = words[0], Path(words[1])
    try:
        if out.exists():
            raise UserError(f"{out} is there already; a new reference is a decision: remove the old one first")
        losses = losses_of(spec, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    steps = list(range(1, len(losses) + 1))
    record = {"config": spec, "overrides": overrides, "jax": jax.__version__, "tolerance": TOLERANCE, "steps": steps, "losses": losses}
    out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
