"""What a run needs on TPUs or GPUs that are not here, before they are paid for.

    python tools/plan.py --config configs/mae.py:huge --topology v5e:16x16 [--config.key=value ...]
    python tools/plan.py --config configs/mae.py:large --topology h100:64 --json
    python tools/plan.py --config configs/mae.py:base --topology v5e:4x4 --search
    python tools/plan.py --table --cache plans

For a TPU (v4, v5e, v5p, v6e) the real train step is compiled by the `libtpu` package (`pip install 'maskae[test]'`, no TPU needed; some
minutes); for GPUs (h100, h200, b200) and with `--formula` the same report is estimated at once. Prints memory, FLOPs, bytes and collectives
per chip, and what limits the step. Exit status: 0 where it fits, 1 where it does not, 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from maskae.config import load_config, split_arguments
from maskae.errors import UserError, nearest
from maskae.merging import stage_config
from maskae.planning import prepare_environment

# Before jax is imported: the tool itself computes on no accelerator.
prepare_environment()
os.environ["JAX_PLATFORMS"] = "cpu"

FLAGS = ("--config", "--topology", "--search", "--formula", "--json", "--table", "--cache", "--help")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Command-line words -> (flags, config overrides). Raises UserError for an unknown or missing one."""
    plain, overrides = split_arguments(argv)
    parser = argparse.ArgumentParser(prog="tools/plan.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE[:VARIANT]", help="such as configs/mae.py:huge")
    parser.add_argument("--topology", metavar="CHIP:SHAPE", help="such as v5e:16x16, v5p:4x4x4, h100:64")
    parser.add_argument("--search", action="store_true", help="find the lightest rematerialisation and the largest per-chip batch that fit")
    parser.add_argument("--formula", action="store_true", help="estimate instead of compiling")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--table", action="store_true", help="plan MAE B, L, H on v5e, v5p, v6e, or those whose name begins with "
                        "--topology, and print a Markdown table (hours; with --formula, estimate what --cache does not hold)")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep and reuse reports of --table here")
    flags, rest = parser.parse_known_args(plain)
    for word in rest:
        raise UserError(f"unknown argument {word}{nearest(word.split('=')[0], FLAGS)}; config keys are set by --config.key=value")
    if not flags.table:
        for name in ("config", "topology"):
            if not getattr(flags, name):
                raise UserError(f"--{name} is missing, such as " + {"config": "configs/mae.py:huge", "topology": "v5e:16x16"}[name])
    return flags, overrides


def run(argv: Sequence[str]) -> int:
    """Plans, prints, and returns the exit status. Raises UserError."""
    from maskae.planning.chips import parse_topology
    from maskae.planning.plan import plan
    from maskae.planning.report import report_lines
    from maskae.planning.search import search
    from maskae.planning.table import table

    flags, overrides = parse(argv)
    if flags.table:
        print("\n".join(table(flags.cache, overrides, flags.topology or "", flags.formula)))
        return 0
    topology = parse_topology(flags.topology)
    config = load_config(flags.config, overrides)
    # A run in stages needs each of them to fit.
    parts = {f"{flags.config}, stage {name}": stage_config(config, name) for name in config.stages} or {flags.config: config}
    chosen = []
    for name, part in parts.items():
        given = search if flags.search else lambda *arguments, formula: [plan(*arguments, formula=formula)]
        chosen.append(given(name, part, topology, formula=flags.formula)[-1])
        if not flags.json:
            print("\n".join(report_lines(chosen[-1])))
    if flags.json:
        plain = [report.to_json() for report in chosen]
        print(json.dumps(plain if config.stages else plain[0], indent=1))
    return 0 if all(report.fits for report in chosen) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; bad input is one line on standard error and status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
