"""The command line: flags -> config -> run.

    python -m maskae.main --config configs/mae.py:base --workdir runs/mae [--config.train.batch_size=256 ...]
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ml_collections import ConfigDict

from maskae.errors import UserError, nearest
from maskae.host_memory import keep_host_memory
from maskae.processes import TIMEOUT_SECONDS, Launch, joined

PROCESS_FLAGS = ("--coordinator", "--num_processes", "--process_id", "--process_timeout_seconds")
FLAGS = ("--config", "--workdir", "--dry_run", "--evaluate", "--help", *PROCESS_FLAGS)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Command-line words -> (flags, config overrides). Raises UserError for an unknown flag."""
    from maskae.config import split_arguments

    plain, overrides = split_arguments(argv)
    parser = _Parser(prog="python -m maskae.main", description="Pretrain, resume or evaluate one system.", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="such as configs/mae.py:base")
    parser.add_argument("--workdir", type=Path, help="the run's folder; the same command resumes what is there")
    parser.add_argument("--dry_run", action="store_true", help="build everything, print sizes and shardings, run one abstract step, exit")
    parser.add_argument("--evaluate", type=Path, metavar="RUN", help="evaluate the newest checkpoint of a run, or a weights file, and exit")
    several = parser.add_argument_group("several processes", "found by themselves on Cloud TPU, GKE and Slurm; elsewhere give all three")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="a free port on the host of process 0, the same on all processes")
    several.add_argument("--num_processes", type=int, metavar="N", help="how many processes there are")
    several.add_argument("--process_id", type=int, metavar="I", help="which one this is, 0 to N-1")
    several.add_argument(
        "--process_timeout_seconds", type=float, default=TIMEOUT_SECONDS, metavar="S", help="the longest wait for the other processes"
    )
    flags, rest = parser.parse_known_args(plain)
    for word in rest:
        name = word.split("=")[0]
        raise UserError(f"unknown argument {word}{nearest(name, FLAGS)}; config keys are set by --config.key=value")
    if not (flags.workdir or flags.dry_run or flags.evaluate):
        raise UserError("--workdir is missing: the folder for this run's checkpoints and logs, such as --workdir runs/mae")
    return flags, overrides


def run(config: ConfigDict, flags: argparse.Namespace) -> int:
    """Does what the flags ask for, and returns the exit status."""
    from maskae import train

    if flags.dry_run:
        train.dry_run(config)
        return 0
    if flags.evaluate:
        train.evaluate_run(config, flags.evaluate)
        return 0
    return train.run(config, flags.workdir)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, 2 for bad input (one line on stderr), 130 after Ctrl-C,
    3 where another process was lost.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("absl", "jax"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        flags, overrides = parse(sys.argv[1:] if argv is None else argv)
        from maskae.config import load_config

        config = load_config(flags.config, overrides)
        with joined(Launch(flags.coordinator, flags.num_processes, flags.process_id, flags.process_timeout_seconds)):
            return run(config, flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    keep_host_memory()
    sys.exit(main())
