"""Prints one secret of Google Secret Manager, on a machine of Google Cloud: for `NAME="$(python -m tools.launch.read_secret wandb)"`.

It asks as the machine's (or the pod's) own service account, which needs the role `roles/secretmanager.secretAccessor`. Only the standard
library is used, so that a slim container will do. Exit status: 0, or 1 with one line on stderr.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence

METADATA = "http://metadata.google.internal/computeMetadata/v1"
MANAGER = "https://secretmanager.googleapis.com/v1"
SECONDS = 20


def fetch(url: str, headers: dict[str, str]) -> str:
    """The body at `url`."""
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=SECONDS) as reply:
        return reply.read().decode()


def read_secret(name: str, project: str | None = None) -> str:
    """The newest version of secret `name` of `project` (the machine's own by default)."""
    google = {"Metadata-Flavor": "Google"}
    project = project or fetch(f"{METADATA}/project/project-id", google)
    token = json.loads(fetch(f"{METADATA}/instance/service-accounts/default/token", google))["access_token"]
    url = f"{MANAGER}/projects/{project}/secrets/{name}/versions/latest:access"
    payload = json.loads(fetch(url, {"Authorization": f"Bearer {token}"}))["payload"]["data"]
    return base64.b64decode(payload).decode().strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.launch.read_secret", description="Print a secret of Secret Manager.")
    parser.add_argument("name", help="the secret's name")
    parser.add_argument("--project", help="the machine's own by default")
    flags = parser.parse_args(argv)
    try:
        print(read_secret(flags.name, flags.project))
    except (urllib.error.URLError, TimeoutError) as error:
        print(f"error: secret {flags.name} could not be read: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
