"""Where a run's variables come from when not from scratch: another run's newest whole checkpoint, or a file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from maskae.checkpoint import Checkpointer
from maskae.errors import UserError, nearest
from maskae.interop.layout import Geometry
from maskae.interop.weights import load_weights
from maskae.nn.patches import patch_grid
from maskae.paths import flatten_paths, unflatten_paths
from maskae.systems.contract import System, Variables


class Pretrained(NamedTuple):
    """Stored variables as numpy trees.

    Attributes:
      params: the trained parameters, or their average where the run kept one.
      state: what else the system kept; {} from a weights file.
      step: of the checkpoint; 0 from a weights file.
      grid: rows and columns of patches that it was trained with, where known.
    """

    params: dict[str, Any]
    state: dict[str, Any]
    step: int
    grid: tuple[int, int] | None


def read_run(folder: Path) -> Pretrained:
    """The newest whole checkpoint of a run folder. Raises UserError where there is none."""
    if not folder.is_dir():
        beside = [str(folder.parent / path.name) for path in folder.parent.glob("*")] if folder.parent.is_dir() else []
        raise UserError(f"no run folder {folder}{nearest(str(folder), beside)}")
    with Checkpointer(str(folder / "checkpoints"), keep_last=1) as checkpointer:
        step = checkpointer.latest_step()
        if step is None:
            raise UserError(f"{folder} holds no whole checkpoint")
        model = checkpointer.metadata(step)["config"]["model"]
        params = checkpointer.restore_raw(step, "ema") or checkpointer.restore_raw(step, "params")
        state = checkpointer.restore_raw(step, "state")
    size = model.get("image_size")
    pair = (size, size) if isinstance(size, int) else size
    grid = patch_grid(pair[0], pair[1], model["patch_size"]) if pair and "patch_size" in model else None
    return Pretrained(params, state, step, grid)


def read(path: Path, system: Any, template: dict[str, Any]) -> Pretrained:
    """A run folder, or a weights file for parameters shaped like `template`; what of a file does not fit is listed in the log."""
    if not path.is_file():
        return read_run(path)
    params, _ = load_weights(path, template, Geometry(system.patch_size, system.grid))
    return Pretrained(params, {}, 0, system.grid)


def read_variables(path: Path, fresh: Variables) -> Variables:
    """Parameters and state of a run folder, or of a weights file, whose names say which is which and which then stand in both."""
    if not path.is_file():
        run = read_run(path)
        return Variables(run.params, run.state)
    template = unflatten_paths(flatten_paths(fresh.params) | flatten_paths(fresh.state))
    loaded, _ = load_weights(path, template, Geometry(1, (1, 1)))
    return Variables(loaded, loaded)


def start_from(system: System, fresh: Variables, path: Path) -> Variables:
    """`fresh` with what `path` holds: a pretrained encoder for a system that takes one, else all parameters and state.

    A system that needs more of a run than its encoder's parameters (running statistics, say) takes both with `with_pretrained`.

    Raises UserError with every leaf that does not fit.
    """
    if hasattr(system, "with_pretrained"):
        return placed_like(fresh, system.with_pretrained(fresh, read_variables(path, fresh)))
    if hasattr(system, "with_encoder"):
        # A frozen encoder lies in the state, or that part of it which is frozen.
        parts = (flatten_paths(each.get("encoder", {})) for each in fresh)
        template = {"encoder": unflatten_paths({path: leaf for part in parts for path, leaf in part.items()})}
        pretrained = read(path, system, template)
        if "encoder" not in pretrained.params:
            raise UserError(f"{path} holds no encoder; it holds {', '.join(sorted(pretrained.params))}")
        return placed_like(fresh, system.with_encoder(fresh, pretrained.params["encoder"], pretrained.grid))
    pretrained = read(path, system, fresh.params)
    state = fill(fresh.state, pretrained.state, path) if pretrained.state else fresh.state
    return Variables(fill(fresh.params, pretrained.params, path), state)


def placed_like(fresh: Variables, variables: Variables) -> Variables:
    """`variables` with every array where `fresh` has its own."""
    placed: Variables = jax.tree.map(lambda leaf, own: jax.device_put(leaf, own.sharding), variables, fresh)
    return placed


def begin(system: Any, variables: Variables, stage: Any) -> Variables:
    """What `system.begin` makes of fresh variables, with their shapes and shardings. Raises UserError with every leaf that differs."""
    made = system.begin(variables, stage)
    where = Path("what begin() made")
    return Variables(*(fill(wanted, jax.tree.map(np.asarray, given), where) for wanted, given in zip(variables, made, strict=True)))


def fill(wanted: dict[str, Any], given: dict[str, Any], path: Path) -> dict[str, Any]:
    """The tree `wanted` with the values of `given`, with the dtypes and shardings of `wanted`. Raises UserError for leaves that differ."""
    have, need = flatten_paths(given), flatten_paths(wanted)
    lines = [f"{name}: not in {path}" for name in need if name not in have]
    lines += [f"{name}: only in {path}" for name in have if name not in need]
    lines += [
        f"{name}: {list(have[name].shape)} in {path}, {list(leaf.shape)} in the model"
        for name, leaf in need.items()
        if name in have and tuple(have[name].shape) != tuple(leaf.shape)
    ]
    if lines:
        raise UserError(f"{path} does not fit the model, {len(lines)} leaves differ:" + "".join(f"\n  {line}" for line in lines))
    placed = {name: jax.device_put(np.asarray(have[name], leaf.dtype), leaf.sharding) for name, leaf in need.items()}
    return unflatten_paths(placed)
