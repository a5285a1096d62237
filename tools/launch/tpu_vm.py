"""Trains on Cloud TPU VMs by a queued resource: on all workers of one slice or several, again after every preemption.

    python tools/launch/tpu_vm.py train --name mae --zone us-east5-b --accelerator v6e-64 --spot [--slices 2] [--wandb_secret wandb] \\
        [--dry_run] -- --config configs/mae.py:large --workdir /mnt/runs/mae_large

`train` does all that follows in turn; each is also a command by itself: `create` (queue the request), `wait` (until it is granted),
`install` (copy the last commit to all workers and install it there), `run` (start maskae on all workers), `delete`.
`--dry_run` prints the commands, the environment and the compiler flags with their reasons. Exit status: 0, 1 where a command failed, 2 for
bad input.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# So that it also works in a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from maskae.errors import UserError, nearest
from tools.launch import commands
from tools.launch.accelerators import Accelerator, check_zone, runtime_version, tpu_type
from tools.launch.commands import ROOT, Command, CommandError, Parser

ACTIONS = ("train", "create", "wait", "install", "run", "delete")
PYTHON = "~/maskae-env/bin/python"
QUEUED = ("gcloud", "compute", "tpus", "queued-resources")

# A run that was stopped by SIGTERM (see `stoppable`), and a connection that broke: the run itself did not fail.
STOPPED, DISCONNECTED = 143, 255
ENDED_STATES = ("SUSPENDING", "SUSPENDED", "FAILED", "DELETING")

# A connection that breaks leaves its run behind, and two runs cannot share a TPU.
END_EARLIER_RUN = """\
earlier="$(cat ~/maskae.pid 2>/dev/null || true)"
if [ -n "$earlier" ] && grep -qas maskae.main "/proc/$earlier/cmdline"; then
  kill -TERM "$earlier"
  timeout 300 tail --pid="$earlier" -f /dev/null || { pkill -KILL -P "$earlier" || true; kill -KILL "$earlier"; }
fi
echo $$ > ~/maskae.pid"""


@dataclass(frozen=True)
class Launch:
    """One request: its flags, checked, and what is to run."""

    flags: argparse.Namespace
    kind: Accelerator
    arguments: list[str]

    def place(self) -> tuple[str, ...]:
        """Flags that say where the resource is."""
        project = (f"--project={self.flags.project}",) if self.flags.project else ()
        return (f"--zone={self.flags.zone}", *project)

    def create(self) -> Command:
        """Queues the request."""
        flags = self.flags
        nodes = (f"--node-id={flags.name}",) if flags.slices == 1 else (f"--node-count={flags.slices}", f"--node-prefix={flags.name}")
        words = [*QUEUED, "create", flags.name, *nodes, *self.place()]
        words += [f"--accelerator-type={self.kind.name}", f"--runtime-version={runtime_version(self.kind)}"]
        words += [f"--service-account={flags.service_account}"] if flags.service_account else []
        words += [f"--reservation={flags.reservation}", "--reserved"] if flags.reservation else []
        words += ["--spot"] if flags.spot else []
        return Command(tuple(words), f"queue {flags.slices} x {self.kind.shown}" + (", preemptible" if flags.spot else ""))

    def describe(self) -> Command:
        """Prints the state."""
        return Command((*QUEUED, "describe", self.flags.name, *self.place(), "--format=value(state.state)"), "the request's state")

    def delete(self) -> Command:
        """Gives everything back."""
        return Command((*QUEUED, "delete", self.flags.name, *self.place(), "--force", "--quiet"), "give the TPUs and the request back")

    def on_workers(self, script: str, why: str) -> Command:
        """A shell script on every worker of every slice. It goes to bash by name: the login shell may be another."""
        bash = f"bash -c {shlex.quote(script)}"
        return Command((*QUEUED, "ssh", self.flags.name, *self.place(), "--node=all", "--worker=all", f"--command={bash}"), why)

    def install(self) -> list[Command]:
        """Copies the last commit to all workers and installs it in an environment of its own."""
        archive = str(Path(tempfile.gettempdir()) / f"maskae-{self.flags.name}.tar.gz")
        extras = "tpu,wandb" if self.flags.wandb_secret or self.flags.secret_file else "tpu"
        script = [
            "set -euo pipefail",
            "mkdir -p ~/maskae",
            "tar -xzf ~/maskae.tar.gz -C ~/maskae",
            "PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv",
            "~/.local/bin/uv venv --quiet --allow-existing --python 3.12 ~/maskae-env",
            f'~/.local/bin/uv pip install --quiet --python {PYTHON} -e "$HOME/maskae[{extras}]"',
            *self.flags.setup,
        ]
        target = f"{self.flags.name}:maskae.tar.gz"
        return [
            Command(("git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={archive}", "HEAD"), "pack the last commit"),
            Command((*QUEUED, "scp", archive, target, *self.place(), "--node=all", "--worker=all"), "copy it to all workers"),
            self.on_workers("\n".join(script), "install it on all workers (the image's own Python is too old)"),
        ]

    def run(self) -> Command:
        """Starts maskae on all workers; they find each other by themselves."""
        words = commands.training_words(self.arguments, PYTHON, self.flags.slices)
        quoted = " ".join([PYTHON, shlex.join(words[1:])])
        variables = commands.environment(self.kind.chip, self.flags.slices, self.flags.env)
        parts = [
            "set -euo pipefail",
            "cd ~/maskae",
            END_EARLIER_RUN,
            commands.secrets_script(self.flags.wandb_secret, self.flags.secret_file, PYTHON),
            commands.exports(variables),
            commands.stoppable(quoted),
        ]
        return self.on_workers("\n".join(part for part in parts if part), "train on all workers")

    def state(self) -> str:
        """The request's state, such as ACTIVE; empty where there is no such request. Raises CommandError."""
        status, output, errors = self.describe().output()
        if status and "NOT_FOUND" in errors:
            return ""
        if status:
            raise CommandError(f"gcloud describe ended with status {status}: {errors.splitlines()[-1] if errors else 'no message'}")
        return output

    def wait(self) -> None:
        """Waits until the request is granted, at most `--wait_hours`. Raises CommandError."""
        until = time.monotonic() + 3600 * self.flags.wait_hours
        seen = ""
        while (state := self.state()) != "ACTIVE":
            if not state or state in ENDED_STATES:
                raise CommandError(f"the request {self.flags.name} is {state or 'not there'}; `create` queues it")
            if time.monotonic() > until:
                raise CommandError(f"the request {self.flags.name} is still {state} after {self.flags.wait_hours:g} hours; it stays queued")
            if state != seen:
                print(f"{self.flags.name}: {state}", file=sys.stderr, flush=True)
                seen = state
            time.sleep(self.flags.poll_seconds)

    def train(self) -> int:
        """Everything, again after each preemption, at most `--max_restarts` times. Raises CommandError where the run itself failed."""
        for _ in range(self.flags.max_restarts + 1):
            state = self.state()
            if state in ENDED_STATES:
                self.delete().run()
            if not state or state in ENDED_STATES:
                self.create().run()
            self.wait()
            for command in self.install():
                command.run()
            status = self.run().status()
            if status == 0:
                return 0
            # The state follows a preemption with some delay.
            time.sleep(self.flags.poll_seconds)
            state = self.state()
            if state == "ACTIVE" and status not in (STOPPED, DISCONNECTED):
                raise CommandError(f"the run ended with status {status} (see above); the TPUs are still held: `delete` gives them back")
            print(f"{self.flags.name}: interrupted ({state or 'gone'}, status {status}); resuming", file=sys.stderr, flush=True)
        raise CommandError(f"interrupted more than --max_restarts={self.flags.max_restarts} times; the same command goes on")


def shown(launch: Launch, action: str) -> list[str]:
    """What `--dry_run` prints."""
    lines = [f"# {launch.flags.slices} x {launch.kind.shown}, software {runtime_version(launch.kind)}"]
    if action in ("train", "run"):
        lines += commands.flag_lines(launch.kind.chip, launch.flags.slices)
    steps = {
        "create": [launch.create()],
        "wait": [launch.describe()],
        "install": launch.install(),
        "run": [launch.run()] if action in ("train", "run") else [],
        "delete": [launch.delete()],
    }
    names = ("create", "wait", "install", "run") if action == "train" else (action,)
    lines += [command.shown() for name in names for command in steps[name]]
    if action == "train":
        lines += ["# after a preemption, then all of the above again", launch.delete().text()]
    return lines


def parse(argv: Sequence[str]) -> tuple[str, Launch]:
    """Command-line words -> (action, request). Raises UserError."""
    own, arguments = commands.split_training(argv)
    parser = Parser(prog="python tools/launch/tpu_vm.py", description="Train on Cloud TPU VMs.", allow_abbrev=False)
    parser.add_argument("action", metavar="ACTION", help=" | ".join(ACTIONS))
    parser.add_argument("--name", required=True, help="of the queued resource")
    parser.add_argument("--zone", required=True, help="such as us-east5-b")
    parser.add_argument("--accelerator", required=True, help="such as v6e-64, or by topology: v6e:8x8")
    parser.add_argument("--project", help="gcloud's own by default")
    parser.add_argument("--slices", type=int, default=1, help="slices that train together")
    parser.add_argument("--spot", action="store_true", help="cheaper, and may be taken away at any time")
    parser.add_argument("--reservation", help="take the chips from this reservation")
    parser.add_argument("--service_account", help="of the workers; it reads the data, the run's folder and the secret")
    parser.add_argument("--wandb_secret", metavar="NAME", help="the Secret Manager secret with the Weights & Biases key")
    parser.add_argument("--setup", action="append", default=[], metavar="COMMAND", help="a further command of `install` on all workers")
    parser.add_argument("--wait_hours", type=float, default=24.0, help="how long to wait in the queue")
    parser.add_argument("--poll_seconds", type=float, default=30.0)
    parser.add_argument("--max_restarts", type=int, default=100)
    commands.add_training_flags(parser)
    flags = parser.parse(own)
    if flags.action not in ACTIONS:
        raise UserError(f"unknown action {flags.action}{nearest(flags.action, ACTIONS)}; one of {', '.join(ACTIONS)}")
    if flags.slices < 1:
        raise UserError(f"--slices={flags.slices}: at least 1")
    if flags.spot and flags.reservation:
        raise UserError("--spot and --reservation exclude each other: reserved chips are not taken away")
    commands.check_name("--name", flags.name)
    check_zone(flags.zone)
    return flags.action, Launch(flags, tpu_type(flags.accelerator), arguments)


def act(argv: Sequence[str]) -> int:
    """Does what the command line says. Raises UserError and CommandError."""
    action, launch = parse(argv)
    note = commands.folder_note(launch.arguments)
    if note:
        print(note, file=sys.stderr)
    if launch.flags.dry_run:
        print("\n".join(shown(launch, action)))
        return 0
    if action == "train":
        launch.run()  # so that bad arguments are found before the queue
        return launch.train()
    if action == "wait":
        launch.wait()
    elif action == "install":
        for command in launch.install():
            command.run()
    else:
        {"create": launch.create, "run": launch.run, "delete": launch.delete}[action]().run()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return commands.guarded(lambda: act(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
