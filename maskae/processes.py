"""Several processes as one run: joining, named barriers, values from all, a common decision to stop, and the death of one of them.

The processes find each other through the coordination service of `jax.distributed`, which process 0 hosts. jax leaves three things open
that this module adds, each because the alternative is a hang or an abort in C++ with a page of addresses: a bound with one clear line on
the wait for hosts that never come, a line that says which process was lost and why, and an end of the others within a bounded time.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maskae.errors import UserError

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 300.0
LONGEST_SILENCE_SECONDS = 100.0
GRACE_SECONDS = 2.0
LOST = 3  # exit status of a process that ends because another one was lost
ENDED = "maskae/ended/"
# What the runtimes of CPU (gloo), GPU (NCCL) and TPU, and the coordination service, say when the other end of a collective is gone.
LOST_PEER = re.compile(r"gloo|nccl|connection (closed|reset|refused)|socket closed|unavailable|deadline.exceeded|heartbeat|timed out", re.I)


@dataclass(frozen=True)
class Launch:
    """How this process joins the others. All three of `coordinator`, `count`, `index` are given, or none: then the cluster is asked.

    Args:
        coordinator: "host:port" of process 0, where nothing listens yet.
        count: how many processes there are.
        index: which of them this one is, 0..count-1.
        timeout_seconds: the longest wait for the others, at the start and in barriers.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    timeout_seconds: float = TIMEOUT_SECONDS

    def check(self) -> None:
        """Raises UserError for flags that do not make sense together."""
        given = {"--coordinator": self.coordinator, "--num_processes": self.count, "--process_id": self.index}
        missing = [name for name, value in given.items() if value is None]
        if missing and len(missing) < len(given):
            raise UserError(f"{' and '.join(missing)} missing: --coordinator, --num_processes and --process_id go together")
        if self.timeout_seconds <= 0:
            raise UserError(f"--process_timeout_seconds={self.timeout_seconds}: must be more than 0")
        if self.coordinator is None or self.count is None or self.index is None:
            return
        if not re.fullmatch(r".+:\d+", self.coordinator):
            raise UserError(f"--coordinator={self.coordinator}: expected host:port, such as 10.0.0.1:8476")
        if self.count < 1:
            raise UserError(f"--num_processes={self.count}: must be at least 1")
        if not 0 <= self.index < self.count:
            raise UserError(f"--process_id={self.index}: with --num_processes={self.count} it is 0 to {self.count - 1}")


@contextmanager
def joined(launch: Launch) -> Iterator[None]:
    """Joins the other processes, and leaves them when the block ends; nothing at all where there is one process.

    Must come before anything that touches devices. An error inside is told to the others, which end too instead of waiting for ever.
    Raises UserError where `launch` is wrong or the coordinator cannot be reached or started.
    """
    initialize(launch)
    if jax.distributed.is_initialized():
        watch = _Watch(launch.timeout_seconds)
        try:
            yield
        except BaseException as error:
            watch.fail(error)
        watch.leave()
    else:
        yield


def initialize(launch: Launch) -> None:
    """Makes this process one of several: by the flags in `launch`, or as Slurm, GKE or a Cloud TPU says; alone, it does nothing.

    Prints a table of the processes on process 0. A host that does not come within `launch.timeout_seconds` ends this process with one
    line and status 2. Raises UserError for wrong flags and for a coordinator that cannot be started.
    """
    launch.check()
    coordinator, count, index, local = launch.coordinator, launch.count, launch.index, None
    if count is None:
        coordinator, count, index, local = _detect(launch.timeout_seconds)
    if coordinator is None or count is None or count == 1:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself; the loop agrees on a common last step on its own, for every signal.
    jax.config.update("jax_enable_preemption_service", False)
    silence = min(launch.timeout_seconds, LONGEST_SILENCE_SECONDS)
    line = (
        f"process {index} of {count}: not all {count} processes were at {coordinator} within {launch.timeout_seconds:g} s"
        " (--process_timeout_seconds); is every host up, and started with the same --coordinator and --num_processes?"
    )
    with _deadline(launch.timeout_seconds, line):
        try:
            jax.distributed.initialize(
                coordinator,
                count,
                index,
                local,
                cluster_detection_method="deactivate",
                # After our own bounds: jax would abort the process instead of raising.
                initialization_timeout=int(launch.timeout_seconds) + 60,
                heartbeat_timeout_seconds=int(silence) + 60,
                shutdown_timeout_seconds=int(silence) + 1,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(f"process {index} of {count} cannot join {coordinator}: {_first_line(error)}") from error
        table = gather("hosts", _own_row(), launch.timeout_seconds)
    if index == 0:
        for text in table_lines(table):
            logger.info("%s", text)


def _detect(timeout_seconds: float) -> tuple[str | None, int | None, int | None, list[int] | None]:
    """(coordinator, process count, process index, local devices) as the cluster says; None where there is no cluster."""
    # jax.distributed.initialize would start a service even for the one process of a one-task job; its detection alone is not public.
    from jax._src.clusters import ClusterEnv

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(timeout_seconds))
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"the cluster around this process cannot be read: {_first_line(error)}; give --coordinator and its kin") from error
    coordinator, count, index, local = found
    return coordinator, count, index, None if local is None else list(local)


@contextmanager
def _deadline(seconds: float, line: str) -> Iterator[None]:
    """Ends the process with `line` and status 2 where the block takes longer; it may be stuck in C++, where no exception reaches it."""
    timer = threading.Timer(seconds, lambda: end_now(f"error: {line}", 2))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end_now(line: str, status: int) -> NoReturn:
    """Prints a line and ends the process without waiting for anything: not for peers, not for threads."""
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def _own_row() -> dict[str, Any]:
    devices = jax.local_devices()
    return {"host": socket.gethostname(), "kind": devices[0].device_kind, "devices": [device.id for device in devices]}


def table_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table of processes: a line for each with its host and its devices."""
    width = max(len("host"), *(len(row["host"]) for row in rows))
    lines = [f"process  {'host':{width}s}  devices"]
    for index, row in enumerate(rows):
        ids = row["devices"]
        span = f"{ids[0]}-{ids[-1]}" if ids == list(range(ids[0], ids[0] + len(ids))) and len(ids) > 2 else ", ".join(map(str, ids))
        lines.append(f"{index:7d}  {row['host']:{width}s}  {len(ids)} x {row['kind']} ({span})")
    return lines


def _client() -> Any:
    """The coordination service's client, or None. jax has no public barrier with a timeout and no public key-value store."""
    from jax._src.distributed import global_state

    return global_state.client


_uses: dict[str, int] = {}


def _numbered(name: str) -> str:
    """A name that no earlier use has; every process uses the names in the same order."""
    _uses[name] = _uses.get(name, 0) + 1
    return f"maskae/{name}/{_uses[name]}"


def barrier(name: str, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Waits until every process is at the barrier `name`; nothing with one process. Raises UserError that says who did not come."""
    if jax.process_count() == 1:
        return
    try:
        _client().wait_at_barrier(_numbered(name), int(timeout_seconds * 1000))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"process {jax.process_index()} waited {timeout_seconds:g} s at barrier '{name}' for {_missing(error)}") from error


def _missing(error: BaseException) -> str:
    """Who did not reach a barrier, from the service's message."""
    names = re.search(r"timed out task names:\s*((?:\d+,?\s*)+)", str(error))
    return f"process {', '.join(names[1].replace(',', ' ').split())}" if names else f"the others ({_first_line(error)})"


def gather(name: str, value: Any, timeout_seconds: float = TIMEOUT_SECONDS) -> list[Any]:
    """The JSON values of all processes, in their order, on every process. Raises UserError where one does not come.

    For small things now and then (it goes through process 0's memory, not through the accelerators' network).
    """
    if jax.process_count() == 1:
        return [json.loads(json.dumps(value))]
    client, prefix = _client(), _numbered(name)
    client.key_value_set(f"{prefix}/{jax.process_index()}", json.dumps(value))
    values = []
    for index in range(jax.process_count()):
        try:
            values.append(json.loads(client.blocking_key_value_get(f"{prefix}/{index}", int(timeout_seconds * 1000))))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"process {jax.process_index()} waited {timeout_seconds:g} s for '{name}' of process {index}") from error
    return values


def check_shared_folder(folder: Path) -> None:
    """Raises UserError, on every process, where `folder` is not one folder that all processes see."""
    if jax.process_count() == 1:
        return
    name = f".seen_by_all_{os.getpid()}"
    (name,) = {n for n in gather("shared folder", name if jax.process_index() == 0 else None) if n}
    if jax.process_index() == 0:
        (folder / name).touch()
    barrier("shared folder written")
    blind = [index for index, seen in enumerate(gather("shared folder seen", (folder / name).exists())) if not seen]
    if jax.process_index() == 0:
        (folder / name).unlink()
    if blind:
        raise UserError(f"{folder} of process 0 is not seen by process {', '.join(map(str, blind))}: all need one folder (NFS, a bucket)")


class Agreement:
    """The largest of the processes' numbers, the same on all of them at the same call, one call late.

    A reduction over the devices' network that is dispatched in one call and read in the next, so that the host never waits for the step
    under way. With one process it is the number itself, at once.
    """

    def __init__(self) -> None:
        self._pending: jax.Array | None = None
        if jax.process_count() > 1:
            mesh = Mesh(np.asarray(jax.devices()), ("device",), axis_types=(AxisType.Auto,))
            self._rows = NamedSharding(mesh, PartitionSpec("device"))
            self._largest = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, number: int) -> int:
        """Every process calls it equally often. Gives the agreed number of the call before (0 at the first)."""
        if jax.process_count() == 1:
            return number
        own = np.full((jax.local_device_count(),), number, np.int32)
        before = self._pending
        self._pending = self._largest(jax.make_array_from_process_local_data(self._rows, own))
        return 0 if before is None else int(np.asarray(before))


class _Watch:
    """A thread that ends this process, with a clear line, when another one is lost.

    All processes' threads meet at a barrier every few seconds. A process that does not come for `silence` seconds is lost; one that ended
    with an error has left its reason in the service. It runs while the main thread is stuck in a collective.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._silence = min(timeout_seconds, LONGEST_SILENCE_SECONDS)
        self._interval = min(5.0, self._silence / 4)
        self._leaving = threading.Event()  # no more meetings
        self._ending = threading.Event()  # the main thread ends this process and says why
        self._index, self._count = jax.process_index(), jax.process_count()
        self._thread = threading.Thread(target=self._run, name="maskae-peers", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        client, cycle = _client(), 0
        while not self._leaving.wait(self._interval):
            cycle += 1
            try:
                client.wait_at_barrier(f"maskae/alive/{cycle}", int(self._silence * 1000))
                told = dict(client.key_value_dir_get(ENDED))
            except (RuntimeError, ValueError) as error:
                if not self._ending.is_set() and not self._leaving.is_set():
                    end_now(self._line(f"{_missing(error)} gave no sign for {self._silence:g} s"), LOST)
                return
            # Where all met the same error, each tells its own.
            if told and not self._ending.wait(GRACE_SECONDS):
                end_now(self._line(next(iter(told.values()))), LOST)

    def _line(self, reason: str) -> str:
        return f"error: process {self._index} of {self._count} ends, another process was lost: {reason}; the same command resumes"

    def fail(self, error: BaseException) -> None:
        """Tells the others why this process ends. Raises `error` where all of them end; else ends this process without waiting for them."""
        self._ending.set()
        if not isinstance(error, UserError) and LOST_PEER.search(str(error)) is not None:
            end_now(self._line(self._told() or _first_line(error)), LOST)
        self._quietly(lambda: _client().key_value_set(f"{ENDED}{self._index}", f"process {self._index}: {_first_line(error)}"))
        if isinstance(error, UserError) and self._quietly(self._all_end):
            self._leaving.set()
            jax.distributed.shutdown()
            raise error
        if not isinstance(error, (UserError, SystemExit)):
            sys.excepthook(type(error), error, error.__traceback__)
        end_now(f"error: {_first_line(error)}", 2 if isinstance(error, UserError) else 1)

    def _told(self) -> str:
        """The reason that an ended process left; it may come a moment after its connections broke."""
        deadline = time.monotonic() + min(1.0, self._interval)
        while time.monotonic() < deadline:
            if told := self._quietly(lambda: dict(_client().key_value_dir_get(ENDED))):
                return str(next(iter(told.values())))
            time.sleep(0.1)
        return ""

    @staticmethod
    def _quietly(ask: Callable[[], Any]) -> Any:
        """What the service answers, or None where it is gone too: this process is ending for another reason, which must be told."""
        try:
            return ask()
        except (RuntimeError, ValueError) as error:
            logger.debug("the coordination service does not answer: %s", error)
            return None

    def _all_end(self) -> bool:
        """Waits until all processes have failed, at most as long as the others need to learn of it: process 0 must not go earlier."""
        _client().wait_at_barrier("maskae/ended", int((2 * self._interval + 2 * GRACE_SECONDS) * 1000))
        return True

    def leave(self) -> None:
        """Waits for the others to be done too, and leaves the service."""
        try:
            barrier("end of the program", self._timeout)
        except UserError as error:
            end_now(self._line(str(error)), LOST)
        self._ending.set()
        self._leaving.set()
        jax.distributed.shutdown()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
