"""Trains on Google Kubernetes Engine: a JobSet that xpk makes, on TPU slices or GPU machines, restarted after every preemption.

    python tools/launch/gke.py run --cluster pods --name mae --zone us-east5-b --accelerator v5p-128 [--slices 2] [--wandb_secret wandb] \\
        [--dry_run] -- --config configs/mae.py:large --workdir /mnt/runs/mae_large

`run` submits, `list` shows the cluster's workloads, `delete` removes this one. Without `--image`, xpk builds this checkout onto
`--base_image` and each start installs it; an `--image` of your own must have the checkout as its working directory and maskae installed.
`--dry_run` prints the command, the environment and the compiler flags with their reasons. Exit status: 0, 1 where a command failed, 2 for
bad input.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

# So that it also works in a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from maskae.errors import UserError, nearest
from maskae.xla_flags import TPU_CHIPS
from tools.launch import commands
from tools.launch.accelerators import Accelerator, check_zone, gke_type
from tools.launch.commands import ROOT, Command, Parser

ACTIONS = ("run", "list", "delete")
# Kubernetes kills a pod so many seconds after SIGTERM; by then the checkpoint has to be written.
GRACE_SECONDS = 300
# The name of an xpk workload becomes part of pod names, which are at most 63 long.
LONGEST_NAME = 39


def place(flags: argparse.Namespace) -> list[str]:
    """Flags that say where the cluster is."""
    return [f"--cluster={flags.cluster}", f"--zone={flags.zone}", *([f"--project={flags.project}"] if flags.project else [])]


def container_script(flags: argparse.Namespace, kind: Accelerator, arguments: Sequence[str]) -> str:
    """What each pod runs. xpk puts it into parentheses and sends SIGTERM to it."""
    extras = "tpu" if kind.chip in TPU_CHIPS else "cuda"
    extras += ",wandb" if flags.wandb_secret or flags.secret_file else ""
    parts = [
        "set -euo pipefail",
        "" if flags.image else f"pip install --quiet -e '.[{extras}]'",
        commands.secrets_script(flags.wandb_secret, flags.secret_file, "python"),
        commands.stoppable(shlex.join(commands.training_words(arguments, slices=flags.slices))),
    ]
    # One line: xpk puts the command into an indented YAML block, where a second line would have to be indented too.
    script = "\n".join(part for part in parts if part)
    # exec: else the subshell gets the signal, and not the script.
    return f"exec bash -c {one_line(script)}"


def one_line(script: str) -> str:
    """The script as one shell word without a line break: bash's $'...' quoting."""
    escaped = script.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"$'{escaped}'"


def submit(flags: argparse.Namespace, kind: Accelerator, arguments: Sequence[str]) -> Command:
    """The xpk command that creates the JobSet."""
    tpu = kind.chip in TPU_CHIPS
    slices = flags.slices if tpu else 1
    count = [f"--device-type={kind.name}", f"--num-nodes={flags.nodes}"]
    if tpu:
        count = [f"--tpu-type={kind.name}", f"--num-slices={flags.slices}"]
    image = [f"--docker-image={flags.image}"] if flags.image else [f"--base-docker-image={flags.base_image}", f"--script-dir={ROOT}"]
    words = ["xpk", "workload", "create", *place(flags), f"--workload={flags.name}", *count, *image]
    words += [f"--max-restarts={flags.max_restarts}", f"--termination-grace-period-seconds={GRACE_SECONDS}", f"--priority={flags.priority}"]
    words += ["--spot"] if flags.spot else []
    words += [f"--env={name}={value}" for name, value in commands.environment(kind.chip, slices, flags.env).items()]
    words += [f"--command={container_script(flags, kind, arguments)}"]
    amount = flags.slices if tpu else flags.nodes
    return Command(tuple(words), f"a JobSet on {amount} x {kind.shown}; pods that end with 143 (stopped) restart, a failed run does not")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Command-line words -> (flags, maskae's arguments). Raises UserError."""
    own, arguments = commands.split_training(argv)
    parser = Parser(prog="python tools/launch/gke.py", description="Train on GKE through xpk.", allow_abbrev=False)
    parser.add_argument("action", metavar="ACTION", help=" | ".join(ACTIONS))
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--zone", required=True, help="such as us-east5-b")
    parser.add_argument("--project", help="gcloud's own by default")
    parser.add_argument("--name", help="of the workload")
    parser.add_argument("--accelerator", help="such as v5p-128, v6e:8x8 or h200-141gb-8")
    parser.add_argument("--slices", type=int, default=1, help="TPU slices that train together")
    parser.add_argument("--nodes", type=int, default=1, help="GPU machines that train together")
    parser.add_argument("--image", help="a container with maskae in it")
    parser.add_argument("--base_image", default="python:3.12", help="what xpk builds this checkout onto where there is no --image")
    parser.add_argument("--spot", action="store_true", help="cheaper, and may be taken away at any time")
    parser.add_argument("--priority", default="medium", choices=("very-low", "low", "medium", "high", "very-high"))
    parser.add_argument("--max_restarts", type=int, default=100)
    parser.add_argument("--wandb_secret", metavar="NAME", help="the Secret Manager secret with the Weights & Biases key")
    commands.add_training_flags(parser)
    flags = parser.parse(own)
    if flags.action not in ACTIONS:
        raise UserError(f"unknown action {flags.action}{nearest(flags.action, ACTIONS)}; one of {', '.join(ACTIONS)}")
    needed = {"run": ("name", "accelerator"), "delete": ("name",), "list": ()}[flags.action]
    for name in needed:
        if getattr(flags, name) is None:
            raise UserError(f"{flags.action} needs --{name}")
    if flags.name is not None and len(commands.check_name("--name", flags.name)) > LONGEST_NAME:
        raise UserError(f"--name={flags.name}: at most {LONGEST_NAME} characters (did you mean '{flags.name[:LONGEST_NAME].strip('-')}'?)")
    for name in ("slices", "nodes"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name}={getattr(flags, name)}: at least 1")
    check_zone(flags.zone)
    return flags, arguments


def act(argv: Sequence[str]) -> int:
    """Does what the command line says. Raises UserError and CommandError."""
    flags, arguments = parse(argv)
    lines: list[str] = []
    if flags.action == "run":
        kind = gke_type(flags.accelerator)
        if kind.chip in TPU_CHIPS and flags.nodes > 1:
            raise UserError(f"--nodes={flags.nodes}: {kind.name} is a TPU type; several slices are asked for by --slices")
        if kind.chip not in TPU_CHIPS and flags.slices > 1:
            raise UserError(f"--slices={flags.slices}: {kind.name} is a GPU machine; several are asked for by --nodes")
        command = submit(flags, kind, arguments)
        note = commands.folder_note(arguments)
        if note:
            print(note, file=sys.stderr)
        lines = commands.flag_lines(kind.chip, flags.slices)
    elif flags.action == "list":
        command = Command(("xpk", "workload", "list", *place(flags)), "the cluster's workloads")
    else:
        command = Command(("xpk", "workload", "delete", *place(flags), f"--workload={flags.name}"), "remove the workload")
    if flags.dry_run:
        print("\n".join([*lines, command.shown()]))
    else:
        command.run()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return commands.guarded(lambda: act(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
