"""Trains on a Slurm cluster: writes a batch script and submits it; the job saves before its time is up, and queues itself again.

    python tools/launch/slurm.py --name mae --nodes 4 --gpu h100 --gpus_per_node 8 --time 24:00:00 [--processes host] [--dry_run] \\
        -- --config configs/mae.py:large --workdir /shared/runs/mae_large

`--processes gpu` (default): one process per GPU, each with its own input pipeline. `--processes host`: one per machine. `--dry_run` prints
the script and the compiler flags with their reasons. Exit status: 0, 1 where sbatch failed, 2 for bad input.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

# So that it also works in a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from maskae.errors import UserError, nearest
from maskae.xla_flags import GPU_CHIPS
from tools.launch import commands
from tools.launch.commands import Command, Parser

# Slurm signals the script so many seconds before the time limit: enough for a step and a checkpoint.
WARNING_SECONDS = 300
TIME_FORMAT = r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+|\d+-\d+:\d\d|\d+-\d+:\d\d:\d\d"


def directives(flags: argparse.Namespace) -> list[str]:
    """The `#SBATCH` lines."""
    tasks = flags.gpus_per_node if flags.processes == "gpu" else 1
    options = {
        "job-name": flags.name,
        "nodes": flags.nodes,
        "ntasks-per-node": tasks,
        # Not --gpus-per-task: it hides the other GPUs of the machine from each process, which costs NCCL its direct paths.
        "gpus-per-node": flags.gpus_per_node,
        "cpus-per-task": flags.cpus_per_node // tasks if flags.cpus_per_node else None,
        "time": flags.time,
        "partition": flags.partition,
        "account": flags.account,
        "output": f"{flags.name}-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{WARNING_SECONDS}",
    }
    return [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None] + ["#SBATCH --requeue"]


def started(flags: argparse.Namespace, arguments: Sequence[str]) -> tuple[list[str], str]:
    """(lines to run before, the command that srun starts on each machine or for each GPU).

    maskae finds the other processes by Slurm's variables, and then each process takes the one GPU of its number on the machine. A process
    for a whole machine is therefore told where the others are, and takes all GPUs that it sees.
    """
    words = shlex.join(commands.training_words(arguments, flags.python))
    if flags.processes == "gpu":
        return [], words
    before = [
        """coordinator="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p):$((61440 + SLURM_JOB_ID % 4096))\"""",
        "export coordinator",
    ]
    joining = '--coordinator "$coordinator" --num_processes "$SLURM_NTASKS" --process_id "$SLURM_PROCID"'
    return before, f"bash -c {shlex.quote(f'exec {words} {joining}')}"


def batch_script(flags: argparse.Namespace, arguments: Sequence[str]) -> str:
    """The batch script.

    SIGUSR1 comes before the time limit and asks for saving and queueing again; a cancelled job is not queued again. The steps are
    signalled by scancel, since srun answers a SIGTERM of its own by killing them.
    """
    before, command = started(flags, arguments)
    secrets = commands.secrets_script(None, flags.secret_file, flags.python)
    lines = [
        "#!/bin/bash",
        *directives(flags),
        "set -euo pipefail",
        'cd "$SLURM_SUBMIT_DIR"',
        *flags.setup,
        *([secrets] if secrets else []),
        commands.exports(commands.environment(flags.gpu, 1, flags.env)),
        *before,
        "again=",
        """trap 'again=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1""",
        "# One dead process ends all, else the others would wait for it; every process sees all GPUs of its machine.",
        f"srun --kill-on-bad-exit=1 --gpu-bind=none {command} &",
        "steps=$!",
        "status=0",
        'wait "$steps" || status=$?',
        'if [ -n "$again" ]; then',
        '  status=0; wait "$steps" || status=$?',
        '  [ "$status" != 0 ] || scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$status"',
    ]
    return "\n".join(lines) + "\n"


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Command-line words -> (flags, maskae's arguments). Raises UserError."""
    own, arguments = commands.split_training(argv)
    parser = Parser(prog="python tools/launch/slurm.py", description="Train on a Slurm cluster.", allow_abbrev=False)
    parser.add_argument("--name", required=True, help="of the job")
    parser.add_argument("--gpu", required=True, help=" | ".join(GPU_CHIPS))
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument("--cpus_per_node", type=int, default=0, help="shared out over the processes; 0: the cluster's default")
    parser.add_argument("--processes", default="gpu", help="gpu: one process per GPU; host: one per machine")
    parser.add_argument("--time", default="24:00:00", help="of one turn; the job queues itself again until the run is done")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--python", default="python", help="with maskae installed, on the machines")
    parser.add_argument("--setup", action="append", default=[], metavar="COMMAND", help="run first, e.g. 'module load cuda'")
    parser.add_argument("--out", type=Path, help="the script's file; NAME.sbatch by default")
    commands.add_training_flags(parser)
    flags = parser.parse(own)
    commands.check_name("--name", flags.name)
    for name, options in (("gpu", GPU_CHIPS), ("processes", ("gpu", "host"))):
        value = getattr(flags, name)
        if value not in options:
            raise UserError(f"--{name}={value}: one of {', '.join(options)}{nearest(value, options)}")
    for name in ("nodes", "gpus_per_node"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name}={getattr(flags, name)}: at least 1")
    if not re.fullmatch(TIME_FORMAT, flags.time):
        raise UserError(f"--time={flags.time}: hours:minutes:seconds or days-hours, such as 24:00:00 or 2-12")
    for name in ("partition", "account"):
        value = getattr(flags, name)
        if value is not None and not re.fullmatch(r"[\w.,-]+", value):
            raise UserError(f"--{name}={value}: letters, digits, dots, commas and dashes")
    check_secret_file(flags.secret_file)
    return flags, arguments


def check_secret_file(path: str | None) -> None:
    """Raises UserError where others can read the file (where it can be seen from here)."""
    file = Path(path).expanduser() if path else None
    if file is not None and file.exists() and file.stat().st_mode & 0o077:
        raise UserError(f"--secret_file={path} can be read by other users: chmod 600 {path}")


def act(argv: Sequence[str]) -> int:
    """Does what the command line says. Raises UserError and CommandError."""
    flags, arguments = parse(argv)
    script = batch_script(flags, arguments)
    path = flags.out or Path(f"{flags.name}.sbatch")
    command = Command(("sbatch", str(path)), f"submit {path}, which is the script above")
    if flags.dry_run:
        print("\n".join([*commands.flag_lines(flags.gpu), f"# {path}", script.rstrip(), command.shown()]))
        return 0
    command.find()
    path.write_text(script)
    command.run()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return commands.guarded(lambda: act(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
