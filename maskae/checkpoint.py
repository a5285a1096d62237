"""Checkpoints of a training run: asynchronous, verified before use, restored leaf by leaf onto any mesh.

A folder holds one sub-folder per step: `<step>/state/` (arrays, Orbax), `<step>/_CHECKPOINT_METADATA` (Orbax, with the caller's JSON) and
`<step>/maskae_manifest.json` (size and SHA-256 of every other file). The manifest is written last, by an atomic rename, so a step counts as
complete only when it has one, whatever moment the process was killed at. Reading changes nothing on disk; only `save` cleans up.

Orbax's single-step functions are used, not its `training.Checkpointer`: that one deletes old steps before the manifest of the new one
exists, lists steps whose write still runs, deletes a step folder it had not listed, and blocks twice as long.
On disk every container is a dictionary keyed by name or position, so a checkpoint outlives the NamedTuple classes of an optimizer.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import PurePath
from types import TracebackType
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from maskae.errors import UserError, nearest
from maskae.manifest import MANIFEST, find_damage, write_manifest
from maskae.paths import flatten_paths, map_paths, unflatten_paths

logger = logging.getLogger(__name__)

FORMAT = 1
STATE = "state"
ORBAX_METADATA = "_CHECKPOINT_METADATA"
ORBAX_TEMPORARY = ".orbax-checkpoint-tmp"


class CheckpointMismatch(UserError):
    """The checkpoint does not fit the model. `differences` has one line per leaf, by its path name; nothing was loaded."""

    def __init__(self, place: str, differences: list[str]):
        self.differences = differences
        listed = "".join(f"\n  {line}" for line in differences)
        super().__init__(f"{place} does not fit the model, {len(differences)} leaves differ:{listed}")


def _is_empty(node: Any) -> bool:
    return not jax.tree.leaves(node)


def _stored_form(tree: Any) -> dict[str, Any]:
    """The tree as nested dictionaries keyed by strings; empty containers stay, as {}.

    Raises TypeError for a leaf that is not a plain array (Python numbers and typed PRNG keys included) or has no elements.
    """
    nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_empty)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): {} if _is_empty(node) else node for path, node in nodes}
    # Orbax joins names by dots and would store two leaves "a.b" and "a/b" in one place without a word.
    if len({name.replace("/", ".") for name in named}) != len(nodes):
        raise ValueError("two leaves of the tree have the same path name; names must differ also where '.' is read as '/'")
    for name, leaf in flatten_paths(named).items():
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)) or jax.numpy.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(f"checkpoint leaf {name} is {type(leaf).__name__}, not an array of numbers")
        if leaf.size == 0:
            raise TypeError(f"checkpoint leaf {name} has shape {leaf.shape}; an array without elements cannot be stored")
    return unflatten_paths({name: np.asarray(node) if isinstance(node, np.generic) else node for name, node in named.items()})


def _differences(stored: dict[str, Any], wanted: dict[str, Any], allow_cast: bool) -> list[str]:
    lines = []
    for name in sorted(stored.keys() | wanted.keys()):
        if name not in stored:
            lines.append(f"{name}: not in the checkpoint, the model wants {wanted[name].dtype}{list(wanted[name].shape)}")
        elif name not in wanted:
            lines.append(f"{name}: not in the model, the checkpoint has {stored[name].dtype}{list(stored[name].shape)}")
        elif tuple(stored[name].shape) != tuple(wanted[name].shape):
            lines.append(f"{name}: shape {list(stored[name].shape)} in the checkpoint, {list(wanted[name].shape)} in the model")
        elif stored[name].dtype != wanted[name].dtype and not allow_cast:
            lines.append(f"{name}: dtype {stored[name].dtype} in the checkpoint, {wanted[name].dtype} in the model")
    return lines


def _read_record(folder: epath.Path) -> dict[str, Any] | None:
    """The JSON that `save` put into the step, or None where there is none of ours."""
    try:
        record = json.loads((folder / ORBAX_METADATA).read_text())["custom_metadata"]
        return record if "maskae_format" in record else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _delete(folder: epath.Path) -> None:
    """Deletes a step in an order such that a kill leaves a folder that does not count and is still known as ours."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for child in folder.iterdir():
        if child.is_dir():
            child.rmtree()
        elif child.name != ORBAX_METADATA:
            child.unlink()
    folder.rmtree()


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _agreed(compute: Callable[[], Any]) -> Any:
    """What `compute` gives on process 0 (JSON), on every process. Its UserError too is raised on all of them, so none waits for ever."""
    if jax.process_count() == 1:
        return compute()
    answer: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": compute()}
        except UserError as error:
            answer = {"error": str(error)}
    text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    answer = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(np.resize(text, length)))))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def _quiet(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or "orbax" not in PurePath(record.pathname).parts


class Checkpointer:
    """The checkpoints of one folder. With several processes every process calls every method, in the same order, on one shared folder.

    Use it as a context manager: a process that ends without `wait` or `close` loses the save that was under way (and nothing else).
    Keeps the last `keep_last` complete steps and those divisible by `keep_every_steps`; an old one goes only after a newer one is complete.
    Raises UserError where the folder is a file or may not be read.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep_last: int, keep_every_steps: int | None = None):
        if keep_last < 1 or (keep_every_steps is not None and keep_every_steps < 1):
            raise UserError(f"keep_last={keep_last} and keep_every_steps={keep_every_steps} must be at least 1")
        # The array store takes absolute paths only.
        self._folder = epath.Path(folder if "://" in str(folder) else os.path.abspath(folder))
        try:
            if self._folder.exists() and not self._folder.is_dir():
                raise UserError(f"the checkpoint folder {folder} is a file")
        except OSError as error:
            raise UserError(f"cannot read the checkpoint folder {folder}: {_reason(error)}") from error
        self._keep_last, self._keep_every_steps = keep_last, keep_every_steps
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None
        self._swept = False
        self._current: set[int] = set()  # saved or restored here: the same step of the same run
        self._damaged: set[int] = set()
        self._sound: set[int] = set()
        self._context = ocp.Context()
        # Compression takes five times as long for 8 % of the bytes. The target names the sharding; storing one doubles the blocking time.
        self._context.array.saving.use_compression = False
        self._context.array.saving.enable_write_sharding_file = False
        logging.getLogger("absl").addFilter(_quiet)

    def save(self, step: int, tree: Any, metadata: dict[str, Any]) -> None:
        """Starts to write `tree` (arrays, sharded or not) with `metadata` (JSON) as `step`, and returns.

        The values are those at the call, also when the buffers are donated right after. Waits for an earlier save that still runs. A step
        that this object saved or restored is not written again; a damaged or unfinished one is replaced.
        Raises UserError if an earlier save failed, the step exists from another run, or the folder cannot be written; TypeError for a leaf
        that is not an array or metadata that is not JSON.
        """
        self.wait()
        if step in self._current:
            logger.info("checkpoint step %d is there already", step)
            return
        state = _stored_form(tree)
        record = json.loads(json.dumps({"maskae_format": FORMAT, "metadata": metadata}))
        _agreed(lambda: self._make_room(step))
        try:
            with self._context:
                response = ocp.save_checkpointables_async(self._folder / str(step), {STATE: state}, custom_metadata=record)
        except OSError as error:
            raise UserError(f"cannot save step {step} to {self._folder}: {_reason(error)}") from error
        self._current.add(step)
        self._thread = threading.Thread(target=self._finish, args=(step, response), name=f"checkpoint-{step}")
        self._thread.start()

    def wait(self) -> None:
        """Waits until nothing is being written. Raises UserError, once, if the last save failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None

        def report() -> None:
            if failure is not None:
                step, error = failure
                raise UserError(f"saving step {step} to {self._folder} failed: {_reason(error)}") from error

        _agreed(report)
        report()

    def close(self) -> None:
        """The same as `wait`; the object may be used again."""
        self.wait()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._thread is not None:
            # The error under way must not be hidden by one of the last save, nor wait for processes that may be gone.
            self._thread.join()
            self._thread = None
            if self._failure is not None:
                logger.error("saving step %d failed too: %s", self._failure[0], _reason(self._failure[1]))

    def steps(self) -> list[int]:
        """The complete steps, ascending. Their files have not been verified."""
        try:
            return sorted(step for step in self._listed() if (self._folder / str(step) / MANIFEST).exists())
        except OSError as error:
            raise UserError(f"cannot read the checkpoint folder {self._folder}: {_reason(error)}") from error

    def latest_step(self) -> int | None:
        """The newest complete step whose files are all intact, or None. Each newer one that is passed over gets one line in the log."""
        return _agreed(self._latest_step)

    def metadata(self, step: int) -> dict[str, Any]:
        """The JSON given to `save`, read without touching the arrays. Raises UserError where it is not there."""
        self._check_listed(step)
        record = _read_record(self._folder / str(step))
        if record is None:
            raise UserError(f"checkpoint step {step} in {self._folder} has no readable {ORBAX_METADATA}")
        return record["metadata"]

    def restore(self, step: int, abstract_tree: Any, *, allow_cast: bool = False) -> Any:
        """The tree stored as `step`, in the structure, shapes, dtypes and shardings of `abstract_tree` (leaves like jax.ShapeDtypeStruct).

        A leaf without a sharding goes to the first local device. `allow_cast` lets a dtype differ; Orbax alone would cast without a word.
        Raises CheckpointMismatch, before anything is loaded, with every leaf that differs; UserError for a missing or damaged step.
        """
        self._verify(step)
        stored = self._stored(step)
        wanted = flatten_paths(abstract_tree)
        if lines := _differences(flatten_paths(stored), wanted, allow_cast):
            raise CheckpointMismatch(f"checkpoint step {step} in {self._folder}", lines)
        home = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or home)
            for name, leaf in wanted.items()
        }
        loaded = flatten_paths(self._load(step, map_paths(lambda name, _: target[name], stored)))
        self._current.add(step)
        return jax.tree.unflatten(jax.tree.structure(abstract_tree), [loaded[name] for name in wanted])

    def restore_raw(self, step: int, prefix: str = "") -> Any:
        """What is stored under `prefix` ("params", "params/encoder", "" for all) as nested dictionaries of numpy arrays, or one array.

        Tuples and NamedTuples come as dictionaries keyed by position or field; empty containers as {}. Only the wanted part is read.
        Raises UserError for an unknown prefix (it names the nearest) and for a missing or damaged step.
        """
        self._verify(step)
        names = prefix.split("/") if prefix else []
        part = self._stored(step)
        for depth, name in enumerate(names):
            if not isinstance(part, dict) or name not in part:
                hint = nearest(name, part) if isinstance(part, dict) else ""
                raise UserError(f"checkpoint step {step} has no {'/'.join(names[: depth + 1])}{hint}")
            part = part[name]
        if _is_empty(part):
            return part
        # The type asks Orbax for numpy; a ShapeDtypeStruct would put a jax.Array on a device.
        target: Any = jax.tree.map(lambda _: np.ndarray, part)
        for name in reversed(names):
            target = {name: target}
        loaded = self._load(step, target, partial=True)
        for name in names:
            loaded = loaded[name]
        return loaded

    def _listed(self) -> list[int]:
        """Every step folder, complete or not."""
        if not self._folder.exists():
            return []
        return sorted(int(child.name) for child in self._folder.iterdir() if child.name.isdecimal())

    def _latest_step(self) -> int | None:
        for step in reversed(self._listed()):
            problem = find_damage(self._folder / str(step))
            if problem is None:
                self._sound.add(step)
                return step
            self._sound.discard(step)
            if self._thread is None or step not in self._current:
                self._damaged.add(step)
                logger.warning("checkpoint step %d in %s is passed over: %s", step, self._folder, problem)
        return None

    def _check_listed(self, step: int) -> None:
        if step not in (there := self.steps()):
            raise UserError(f"no complete checkpoint of step {step} in {self._folder}; steps there: {there or 'none'}")

    def _verify(self, step: int) -> None:
        def check() -> None:
            self._check_listed(step)
            if step not in self._sound and (problem := find_damage(self._folder / str(step))) is not None:
                raise UserError(f"checkpoint step {step} in {self._folder} is damaged: {problem}")
            self._sound.add(step)

        _agreed(check)

    def _stored(self, step: int) -> dict[str, Any]:
        with self._context:
            return ocp.metadata(self._folder / str(step), checkpointable_name=STATE).metadata

    def _load(self, step: int, target: dict[str, Any], partial: bool = False) -> Any:
        context = ocp.Context(self._context)
        context.pytree.loading.partial_load = partial
        with context:
            return ocp.load(self._folder / str(step), target, checkpointable_name=STATE)

    def _make_room(self, step: int) -> None:
        """On process 0, before a save: makes the folder, removes leftovers of killed saves and a damaged copy of this step."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not self._swept:
                self._sweep()
            folder = self._folder / str(step)
            if not folder.exists():
                return
            if (problem := find_damage(folder)) is None:
                raise UserError(f"{self._folder} already has a step {step} that this run neither saved nor restored; choose another folder")
            logger.warning("checkpoint step %d in %s is replaced: %s", step, self._folder, problem)
            if (folder / MANIFEST).exists() or _read_record(folder) is not None:
                _delete(folder)
            else:
                # Nothing proves that maskae wrote it.
                folder.rename(self._folder / f"{step}.moved-away-{time.time_ns()}")
            self._damaged.discard(step)
        except OSError as error:
            raise UserError(f"cannot write the checkpoint folder {self._folder}: {_reason(error)}") from error

    def _sweep(self) -> None:
        """Removes what killed saves and deletions left. Only before a save, so that a reader never disturbs a run that still writes."""
        for child in self._folder.iterdir():
            step, temporary, _ = child.name.partition(ORBAX_TEMPORARY)
            if temporary and step.isdecimal():
                child.rmtree()
            elif child.name.isdecimal() and not (child / MANIFEST).exists() and (_read_record(child) or not list(child.iterdir())):
                logger.info("removing checkpoint step %s: its save or its deletion never finished", child.name)
                _delete(child)
        self._swept = True

    def _finish(self, step: int, response: Any) -> None:
        """In the background: waits for Orbax, then writes the manifest, then deletes old steps. In this order a kill never leaves none."""
        try:
            response.result()
            if jax.process_index() == 0:
                write_manifest(self._folder / str(step))
                self._delete_superseded(step)
        except BaseException as error:
            self._current.discard(step)
            self._swept = False
            self._failure = (step, error)

    def _delete_superseded(self, newest: int) -> None:
        """Deletes old steps once `newest` is complete. Later steps (of a run that was rewound) are left alone."""
        earlier = [step for step in self.steps() if step < newest]
        kept = [*(step for step in earlier if step not in self._damaged), newest][-self._keep_last :]
        every = self._keep_every_steps
        for step in earlier:
            if step in kept or (every is not None and step % every == 0):
                continue
            try:
                _delete(self._folder / str(step))
            except OSError as error:
                logger.warning("cannot delete checkpoint step %d: %s", step, _reason(error))
            self._sound.discard(step)
