"""What test_processes.py starts in every process: the ordinary program, with a record of the batches and signals.

    python -m tests.processes_entry SPEC [flags of maskae.main ...]      SPEC: JSON {"runs": [...], "signal": [process, step, number]}

Each of `runs` holds further flags; all runs are made one after the other by the same processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Sequence

import jax

from maskae import main as program
from maskae import train
from maskae.config import load_config
from maskae.evaluate import to_host
from maskae.processes import Launch, joined


def record_batches() -> None:
    """Leaves a digest of every global training batch in `<workdir>/batches.json`, gathered from all processes as the step sees it."""
    take_step, summary = train.Loop.take_step, {}

    def recorded(self, state, batch, compiling):
        arrays = {name: to_host(array) for name, array in self.experiment.put(batch).items()}
        digest = hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()
        digests = summary.setdefault(self.workdir, {})
        digests[int(state["step"])] = digest
        if jax.process_index() == 0:
            (self.workdir / "batches.json").write_text(json.dumps(digests))
        return take_step(self, state, batch, compiling)

    train.Loop.take_step = recorded


def send_signal(process: int, step: int, number: int) -> None:
    """Lets process `process` send itself a signal once it has dispatched step `step`."""
    after_step = train.Loop.after_step

    def sending(self, state, done, metrics):
        after_step(self, state, done, metrics)
        if done == step and jax.process_index() == process:
            jax.block_until_ready(state)
            os.kill(os.getpid(), number)

    train.Loop.after_step = sending


def run_all(runs: Sequence[Sequence[str]]) -> None:
    """Makes the runs one after the other."""
    for words in runs:
        flags, overrides = program.parse(words)
        assert program.run(load_config(flags.config, overrides), flags) == 0


def main(argv: Sequence[str]) -> int:
    """One run by the program's own `main`, or all of `runs` by the processes that it joins."""
    spec, words = json.loads(argv[0]), list(argv[1:])
    # The imports above have given the root logger a handler, after which the program's own setting would do nothing.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    if spec.get("signal"):
        send_signal(*spec["signal"])
    if not spec.get("runs"):
        return program.main(words)
    record_batches()
    flags, _ = program.parse([*spec["runs"][0], *words])
    with joined(Launch(flags.coordinator, flags.num_processes, flags.process_id, flags.process_timeout_seconds)):
        run_all(spec["runs"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
