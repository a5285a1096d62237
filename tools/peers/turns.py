"""How a worker process takes its turns: JSON lines in, JSON lines out, asleep in between. Needs neither jax nor torch."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol


class Side(Protocol):
    """One implementation of the training step."""

    def describe(self) -> dict[str, Any]:
        """Device, threads and versions."""

    def step(self) -> Callable[[], float]:
        """Starts one training step and returns what waits for it and gives its loss."""


def confine(threads: int) -> None:
    """Leaves this process so many processors; must come before jax or torch starts its threads. Without effect where not supported."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads]))


def time_steps(side: Side, count: int) -> dict[str, float]:
    """Seconds per step by the clock and of processor time, of `count` steps in a row, the last of which is waited for."""
    began, used = time.perf_counter(), time.process_time()
    for _ in range(count):
        wait = side.step()
    wait()
    return {"seconds": (time.perf_counter() - began) / count, "processor_seconds": (time.process_time() - used) / count}


def answer(side: Side, request: dict[str, Any]) -> dict[str, Any]:
    """What a worker says to one request: {"do": "describe" | "losses" | "time", "count": steps}."""
    if request["do"] == "describe":
        return side.describe()
    if request["do"] == "losses":
        return {"losses": [side.step()() for _ in range(request["count"])]}
    return time_steps(side, request["count"])


def serve(make_side: Callable[[dict[str, Any]], Side]) -> None:
    """The worker's loop. The first line is the work itself, given to `make_side`; the end of the input ends the process.

    What fails is answered as {"error": its first line}, and printed whole on stderr.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout
    side: Side | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if side is None:
                confine(request["threads"])
                side, reply = make_side(request), {}
            else:
                reply = answer(side, request)
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)
            reply = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        print(json.dumps(reply), file=out, flush=True)
