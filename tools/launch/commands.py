"""What the launchers share: commands that are shown or run, the training command, and what must not stand on a command line."""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from maskae.errors import UserError, nearest
from maskae.xla_flags import environment_for, flags_for

ROOT = Path(__file__).resolve().parents[2]

INSTALL_HINTS = {
    "gcloud": "install the Google Cloud CLI and run `gcloud auth login`",
    "xpk": "pip install xpk",
    "sbatch": "run this on a login node of the Slurm cluster",
    "git": "install git",
}

# `token` alone would refuse honest model arguments such as mask_token, so it has to come with a word that makes it a credential.
SECRET_NAME = re.compile(
    r"(^|[._-])((api|wandb|access)_?key|private_?key|secret(_?key)?|passw(or)?d|credentials?|(access|api|auth|bearer|hf|id|refresh)_?token)$"
    r"|^-*token$",
    re.IGNORECASE,
)
# Weights & Biases (40 hexadecimal digits, or wandb_v1_...), Hugging Face, Google, GitHub, OpenAI-style and private keys.
SECRET_VALUE = re.compile(
    r"\b([0-9a-f]{40}|wandb_v\d_\w{20,}|hf_\w{20,}|AIza[\w-]{30,}|ya29\.[\w-]{20,}|gh[pousr]_\w{20,}|sk-[\w-]{20,})\b|-----BEGIN"
)
REFERENCES = ("--wandb_secret", "--secret_file")  # these name where a secret lies, and hold none


class CommandError(Exception):
    """A command that was run did not succeed. The message is one line."""


@dataclass(frozen=True)
class Command:
    """One command line: its words, and why it is run."""

    words: tuple[str, ...]
    why: str

    def text(self) -> str:
        """The line for a shell, quoted so that it runs as it stands."""
        return shlex.join(self.words)

    def shown(self) -> str:
        """The line with its reason above it."""
        return f"# {self.why}\n{self.text()}"

    def run(self) -> None:
        """Runs it with this terminal's input and output. Raises CommandError with the status where that is not 0."""
        status = self.status()
        if status:
            raise CommandError(f"{self._name()} ended with status {status} ({self.why})")

    def status(self) -> int:
        """Runs it with this terminal's input and output, and returns its exit status. Raises UserError where the program is missing."""
        self.find()
        print(f"+ {self.text()}", file=sys.stderr, flush=True)
        return subprocess.run(self.words, check=False).returncode

    def output(self) -> tuple[int, str, str]:
        """Runs it silently: exit status, standard output, standard error. Raises UserError where the program is missing."""
        self.find()
        done = subprocess.run(self.words, check=False, capture_output=True, text=True)
        return done.returncode, done.stdout.strip(), done.stderr.strip()

    def find(self) -> None:
        """Raises UserError where the program is missing."""
        program = self.words[0]
        if shutil.which(program) is None:
            hint = INSTALL_HINTS.get(program, "install it")
            raise UserError(f"{program} is not on the PATH: {hint}; --dry_run prints the commands without it")

    def _name(self) -> str:
        return " ".join(word for word in self.words[:5] if not word.startswith("-"))


class Parser(argparse.ArgumentParser):
    """Reports bad flags as UserError, an unknown one with the nearest right one."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError in place of printing the usage."""
        raise UserError(message)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Flags of `words`. Raises UserError."""
        flags, rest = self.parse_known_args(words)
        if rest:
            options = [option for action in self._actions for option in action.option_strings]
            word = rest[0].split("=")[0]
            raise UserError(f"unknown argument {word}{nearest(word, options)}; maskae's own arguments come after --")
        return flags


def guarded(action: Callable[[], int]) -> int:
    """The exit status of `action`: its own, 2 for bad input, 1 for a command that failed (each one line on stderr), 130 after Ctrl-C."""
    try:
        return action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def split_training(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words before and after the first `--`: the launcher's and maskae's. Raises UserError for a word that looks like a secret."""
    refuse_secrets(argv)
    words = list(argv)
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def refuse_secrets(words: Sequence[str]) -> None:
    """Raises UserError for a word that names or looks like a key, a token or a password; its value is not repeated.

    Command lines are seen by every user of a machine, and end in shell histories, job descriptions and logs.
    """
    where = "name a Secret Manager secret by --wandb_secret, or a file on the workers by --secret_file"
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--env" or (index and words[index - 1] == "--env"):
            name, equals, value = (value if name == "--env" else word).partition("=")
        if name not in REFERENCES and SECRET_NAME.search(name):
            raise UserError(f"{name} looks like a secret, which does not belong on a command line: {where}")
        if SECRET_VALUE.search(word):
            raise UserError(f"{name if equals else 'an argument'} holds what looks like a key or token: {where}")


def training_words(arguments: Sequence[str], python: str = "python", slices: int = 1) -> list[str]:
    """The words that start maskae with `arguments`, after these are checked here as maskae itself would: before anything is paid for.

    Raises UserError for a missing or wrong config, an unknown key, a missing --workdir, a mesh for another number of TPU slices.
    """
    if not arguments:
        raise UserError("maskae's arguments are missing: -- --config configs/mae.py:base --workdir FOLDER")
    from maskae.config import load_config
    from maskae.main import parse

    with contextlib.chdir(ROOT):
        flags, overrides = parse(arguments)
        config = load_config(flags.config, overrides)
    if slices > 1 and config.mesh.slice != slices:
        raise UserError(f"--slices={slices}, but mesh.slice={config.mesh.slice}: set --config.mesh.slice={slices}")
    return [python, "-m", "maskae.main", *arguments]


def folder_note(arguments: Sequence[str]) -> str | None:
    """A warning where the run's folder lies on a worker's own disk, else None."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    folder = words[words.index("--workdir") + 1] if "--workdir" in words[:-1] else ""
    if not folder or folder.startswith(("/", "gs://")):
        return None
    return f"note: --workdir={folder} lies on each worker's own disk, which a preemption takes away; use a folder that all workers share"


def exports(environment: Mapping[str, str]) -> str:
    """`export A=... ` lines for a shell, quoted."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment.items())


def secrets_script(wandb_secret: str | None, secret_file: str | None, python: str) -> str:
    """Shell lines that put the Weights & Biases key into the worker's environment; the key itself is in no command and no file of ours."""
    lines = []
    if secret_file:
        home = secret_file.startswith("~/")
        # A name without a slash would be looked for on the PATH.
        path = f"~/{shlex.quote(secret_file[2:])}" if home else shlex.quote(secret_file if "/" in secret_file else f"./{secret_file}")
        lines += ["set -a", f". {path}", "set +a"]
    if wandb_secret:
        # In two steps: `export NAME="$(...)"` would hide that the command in it failed.
        lines += [f'WANDB_API_KEY="$({python} -m tools.launch.read_secret {shlex.quote(wandb_secret)})"', "export WANDB_API_KEY"]
    return "\n".join(lines)


def stoppable(command: str) -> str:
    """Shell lines that run `command` and pass SIGTERM on to it, and that end with 143 where it is to be started again.

    maskae saves on SIGTERM and exits with 0. Whoever started it (a JobSet, our own loop) would take that for a finished run. And a process
    that lost another one ends with 3, which a JobSet would take for a fault of the run.
    """
    return "\n".join([
        "stopped=",
        "child=",
        """trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child"' TERM""",
        f"{command} &",
        "child=$!",
        "status=0",
        'wait "$child" || status=$?',
        'if [ -n "$stopped" ]; then',
        '  status=0; wait "$child" || status=$?',
        '  [ "$status" != 0 ] || status=143',
        "fi",
        '[ "$status" != 3 ] || status=143',
        'exit "$status"',
    ])


def environment(chip: str, slices: int, given: Sequence[str]) -> dict[str, str]:
    """The chip's variables, then `NAME=value` of `--env`; compiler flags given there are added to the chip's. Raises UserError."""
    merged = environment_for(chip, slices)
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(f"--env {name}: expected NAME=value")
        added = name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS") and name in merged
        merged[name] = f"{merged[name]} {value}" if added else value
    return merged


def flag_lines(chip: str, slices: int = 1) -> list[str]:
    """The chip's settings as comment lines: variable, setting, reason, source."""
    flags = flags_for(chip, slices)
    if not flags:
        return [f"# {chip}: no compiler flags"]
    texts = [flag.text if flag.name == flag.variable else f"{flag.variable}: {flag.text}" for flag in flags]
    width = max(len(text) for text in texts)
    return [f"# {chip}: settings that go by the environment"] + [
        f"#   {text:{width}s}  {flag.reason} [{flag.source}]" for text, flag in zip(texts, flags, strict=True)
    ]


def check_name(flag: str, value: str) -> str:
    """A resource name as Google Cloud, Kubernetes and Slurm take it. Raises UserError, with the nearest name that would do."""
    if re.fullmatch(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?", value):
        return value
    near = re.sub(r"[^a-z0-9]+", "-", value.lower()).strip("-0123456789")[:50] or "mae"
    raise UserError(f"{flag}={value}: small letters, digits and dashes, at most 50, a letter first (did you mean '{near}'?)")


def add_training_flags(parser: Parser) -> None:
    """The flags of every launcher."""
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a further environment variable; no secrets")
    parser.add_argument("--secret_file", metavar="PATH", help="a file of NAME=value lines on the workers, sourced there before the run")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, environment and compiler flags, run nothing")
