"""Compiles a run's real train step for TPUs that are not here: the compiler comes with the `libtpu` package and needs no chip."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental import topologies

from maskae.errors import UserError
from maskae.experiment import Experiment
from maskae.planning import prepare_environment
from maskae.planning.chips import GIB, Topology

REMATERIALISATION = "nvoluntary full rematerialization"


@dataclass
class CompiledStep:
    """What the compiler said.

    Attributes:
        fits: whether the program's memory fits the chip.
        arguments: bytes per chip of the train state and the batch.
        temporaries: bytes per chip of everything else, among them the outputs that do not reuse an argument.
        code: bytes per chip of the program itself.
        text: the program; empty where it does not fit.
        xla_bytes: the compiler's own count of bytes accessed, in which the body of a loop counts once.
        usable: bytes of the chip's memory that the compiler gives to programs, where it said so.
        seconds: of compilation.
        warnings: lines of the compiler about values that it replicates on all chips.
    """

    fits: bool
    arguments: float
    temporaries: float
    code: float = 0.0
    text: str = ""
    xla_bytes: float = 0.0
    usable: float = 0.0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Bytes per chip that the step needs."""
        return self.arguments + self.temporaries + self.code


def tpu_devices(topology: Topology) -> list[Any]:
    """Descriptions of the slice's chips. Raises UserError where the compiler is not installed."""
    prepare_environment()
    options: dict[str, Any] = dict(topology.chip.options)
    shape = "x".join(map(str, topology.shape))
    if topology.size == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        with _standard_error():
            found = topologies.get_topology_desc(f"{topology.chip.jax_name}:{shape}", platform="tpu", **options)
    except (RuntimeError, ImportError) as error:
        raise UserError(
            f"--topology {topology.name}: the TPU compiler does not answer ({str(error).splitlines()[0]}); "
            "it is the package libtpu, in the version that `pip install 'jax[tpu]'` names for this jax"
        ) from error
    return list(found.devices)


def compile_step(experiment: Experiment) -> CompiledStep:
    """Compiles the experiment's train step for the devices of its mesh; running out of their memory is an answer."""
    # All eager work happens before the mesh is set: these devices can be compiled for, not computed on.
    step: Any = experiment.train_step
    state, batch = experiment.abstract_state, experiment.batch_shapes()
    arguments = shard_bytes((state, batch))
    began = time.monotonic()
    with _standard_error() as log, _without_cache(), jax.set_mesh(experiment.mesh):
        try:
            compiled = step.lower(state, batch).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            result = _out_of_memory(str(error), arguments)
        else:
            memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
            temporaries = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            result = CompiledStep(True, memory.argument_size_in_bytes, temporaries, memory.generated_code_size_in_bytes)
            result.text, result.xla_bytes = compiled.as_text(), cost["bytes accessed"]
    result.seconds = time.monotonic() - began
    result.warnings = [line.strip() for line in log if REMATERIALISATION in line]
    return result


@contextmanager
def _without_cache() -> Iterator[None]:
    """Keeps the program out of JAX's persistent cache, which cannot read back what was compiled without a chip."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    try:
        yield
    finally:
        jax.config.update(name, before)


def shard_bytes(tree: Any) -> float:
    """Bytes of one device's part of a tree of sharded shapes."""
    return float(sum(_size(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _out_of_memory(message: str, arguments: float) -> CompiledStep:
    """What the compiler's message says was needed and given.

    Either everything, "Used 28.34G of 15.75G hbm", or the temporaries alone, "required for HLO temporaries (544.63G) exceeds available HBM
    (15.75G)", where they by themselves are too much.
    """
    size = r"([\d.]+)([KMGT]?)"
    whole = re.search(rf"Used {size} of {size}", message)
    alone = re.search(rf"temporaries \({size}\) exceeds available HBM \({size}\)", message)
    found = whole or alone
    if found is None:
        return CompiledStep(False, arguments, float("nan"))
    needed, usable = _bytes(found[1], found[2]), _bytes(found[3], found[4])
    return CompiledStep(False, arguments, max(0.0, needed - arguments) if whole else needed, usable=usable)


def _bytes(number: str, unit: str) -> float:
    return float(number) * {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}[unit]


@contextmanager
def _standard_error() -> Iterator[list[str]]:
    """Collects what C++ code writes to standard error; Python's own `sys.stderr` is not enough for that. Filled on leaving."""
    lines: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
