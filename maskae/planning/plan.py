"""From a config and a topology to a report: by compiling the step where there is a compiler for the chip, else by formula."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from maskae.experiment import Experiment, build, parameter_count
from maskae.mesh import make_mesh
from maskae.planning.chips import GPUS_PER_NODE, Topology
from maskae.planning.collectives import Collective, gpu_seconds, program_collectives, wire_bytes
from maskae.planning.compile import CompiledStep, compile_step, shard_bytes, tpu_devices
from maskae.planning.program import parse_program
from maskae.planning.report import Flops, Memory, Report, Seconds
from maskae.planning.tracing import TracedStep, trace_step
from maskae.planning.traffic import hbm_bytes
from maskae.run_sources import assumed_sources, open_sources

# Values as large as the largest one of the loss that are alive at once in the backward pass of a block: the scores of attention, their
# softmax, and the gradients of both.
LIVE_VALUES = 4
# AdamW reads parameter, gradient and two moments and writes three of them, float32.
OPTIMIZER_BYTES_PER_PARAMETER = 28


@dataclass(frozen=True)
class StandIn:
    """A GPU that is not here, for the mesh."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "planned"


def planned_experiment(config: ConfigDict, topology: Topology, devices: list[Any] | None = None) -> Experiment:
    """The experiment on the topology's mesh. Data that is not here is assumed. Raises UserError where mesh or batch do not divide."""
    config = copy.deepcopy(config)
    config.evaluate.batch_size = config.train.batch_size  # only the train step is planned
    if devices is None:
        devices = [StandIn(index, index // GPUS_PER_NODE) for index in range(topology.size)]
    mesh: Any = make_mesh(config.mesh.to_dict(), devices)
    sources = assumed_sources(config) if config.data.examples else open_sources(config, fetch=False)
    return build(config, sources, mesh)


def plan(name: str, config: ConfigDict, topology: Topology, *, formula: bool = False) -> Report:
    """The report of `config`, called `name` in it, on `topology`.

    `formula` asks for the estimate also where there is a compiler. Raises UserError for a mesh or batch that does not divide.
    """
    if topology.is_gpu or formula:
        return _by_formula(name, planned_experiment(config, topology), topology)
    experiment = planned_experiment(config, topology, tpu_devices(topology))
    return _report_compiled(name, experiment, topology, compile_step(experiment))


def _report_compiled(name: str, experiment: Experiment, topology: Topology, step: CompiledStep) -> Report:
    chip, flops = topology.chip, flops_of(experiment, trace_step(experiment), topology)
    usable = step.usable or chip.memory - chip.reserved
    memory = Memory(step.arguments, step.temporaries, step.code, chip.memory, usable)
    facts: dict[str, Any] = {
        "method": "compiled", "fits": step.fits, "memory": memory, "flops": flops, "compile_seconds": step.seconds,
        "warnings": step.warnings, "versions": {package: metadata.version(package) for package in ("jax", "libtpu")},
    }
    if step.fits:
        program = parse_program(step.text)
        coordinates = [tuple(device.coords) for device in experiment.mesh.devices.flat]
        facts["collectives"] = program_collectives(program, topology, coordinates)
        # A collective reads what it sends and writes what it receives.
        facts["hbm_bytes"] = hbm_bytes(program) + 2 * sum(each.wire for each in facts["collectives"])
        facts["xla_bytes"] = step.xla_bytes
        facts["bytes_method"] = "from the compiled program, loops counted as often as they run"
        facts["seconds"] = bounds(topology, flops, facts["hbm_bytes"], facts["collectives"])
    return _report(name, experiment, topology, facts)


def _by_formula(name: str, experiment: Experiment, topology: Topology) -> Report:
    chip, traced = topology.chip, trace_step(experiment)
    flops = flops_of(experiment, traced, topology)
    rows = experiment.config.train.batch_size / topology.size
    microbatch = rows / experiment.config.train.accumulate
    state = experiment.abstract_state
    gradients = shard_bytes(state["params"])
    arguments = shard_bytes((state, experiment.batch_shapes()))
    temporaries = gradients * (2 if experiment.config.train.accumulate > 1 else 1) + _compute_copy(experiment)
    temporaries += microbatch * (traced.kept + LIVE_VALUES * traced.largest)
    usable = chip.memory - chip.reserved
    memory = Memory(arguments, temporaries, 0.0, chip.memory, usable)
    moved = 2 * rows * traced.products.bytes + OPTIMIZER_BYTES_PER_PARAMETER * gradients / 4
    collectives = formula_collectives(experiment, topology)
    facts: dict[str, Any] = {
        "method": "formula", "fits": memory.total <= usable, "memory": memory, "flops": flops, "hbm_bytes": moved,
        "bytes_method": "twice what the matrix products read and write, and the optimizer's share",
        "collectives": collectives, "seconds": bounds(topology, flops, moved, collectives),
    }
    return _report(name, experiment, topology, facts)


def _report(name: str, experiment: Experiment, topology: Topology, facts: dict[str, Any]) -> Report:
    config = experiment.config
    model = config.model.to_dict()
    return Report(
        config=name, topology=topology.name, chips=topology.size, mesh={axis: int(size) for axis, size in experiment.mesh.shape.items()},
        batch_size=config.train.batch_size, accumulate=config.train.accumulate, scan=model.get("scan"), remat=rematerialisation(config),
        parameters=parameter_count(experiment.abstract_state["params"]), peak_flops=topology.chip.flops, **facts,
    )


def rematerialisation(config: ConfigDict) -> str | None:
    """The policy of `model.remat`; True and False, where a system knows no other, are "full" and "none". None where it has no choice."""
    given = config.model.to_dict().get("remat")
    return ("none", "full")[given] if isinstance(given, bool) else given


def set_rematerialisation(config: ConfigDict, policy: str) -> None:
    """Writes the policy as the system says it."""
    config.model.remat = policy == "full" if isinstance(config.model.remat, bool) else policy


def flops_of(experiment: Experiment, traced: TracedStep, topology: Topology) -> Flops:
    """Training FLOPs by the system's formula, and apart from them what this rematerialisation policy computes again."""
    training, recomputed = experiment.train_flops, 0.0
    if rematerialisation(experiment.config) not in (None, "none"):
        config = copy.deepcopy(experiment.config)
        set_rematerialisation(config, "none")
        plain = trace_step(build(config, (experiment.train_source, experiment.val_source), experiment.mesh))
        recomputed = max(0.0, traced.products.flops - plain.products.flops)
    rows = experiment.config.train.batch_size / topology.size
    return Flops(experiment.forward_flops, training, recomputed, rows * (training + recomputed))


def bounds(topology: Topology, flops: Flops, moved: float, collectives: list[Collective]) -> Seconds:
    """What each resource alone would need for a step."""
    chip = topology.chip
    return Seconds(flops.per_chip / chip.flops, moved / chip.bandwidth, sum(each.seconds for each in collectives))


def _compute_copy(experiment: Experiment) -> float:
    """Bytes per chip of the parameters in the compute dtype. Scanned blocks are gathered over fsdp one after the other, so that the copy
    stays split; blocks in sequence are all gathered."""
    sizes = experiment.mesh.shape
    split = sizes["tensor"] * (sizes["fsdp"] if experiment.config.model.to_dict().get("scan", False) else 1)
    return parameter_count(experiment.abstract_state["params"]) * _compute_size(experiment) / split


def _compute_size(experiment: Experiment) -> int:
    return int(np.dtype(jax.numpy.dtype(experiment.config.model.to_dict().get("dtype", "float32"))).itemsize)


def formula_collectives(experiment: Experiment, topology: Topology) -> list[Collective]:
    """Collectives of data parallelism, parameter sharding and tensor parallelism by formula, in the compute dtype.

    Pure data parallelism sums gradients over all chips. With `fsdp` parameters are gathered for the forward and again for the backward
    pass, gradients scattered, and the shards summed over `data`; `tensor` sums activations twice per block and pass.
    """
    sizes = {axis: int(size) for axis, size in experiment.mesh.shape.items()}
    fsdp, tensor = sizes["fsdp"], sizes["tensor"]
    data = topology.size // (fsdp * tensor)
    parameters = parameter_count(experiment.abstract_state["params"]) * _compute_size(experiment) / tensor
    parts: list[tuple[str, int, int, int, float]] = []  # kind, count, group, distance of neighbours, bytes
    if fsdp > 1:
        parts += [("all-gather", 2, fsdp, tensor, parameters), ("reduce-scatter", 1, fsdp, tensor, parameters)]
    if data > 1:
        parts.append(("all-reduce", 1, data, fsdp * tensor, parameters / fsdp))
    if tensor > 1:
        parts.append(_tensor_part(experiment, topology, tensor))
    return [_collective(topology, *part) for part in parts]


def _tensor_part(experiment: Experiment, topology: Topology, tensor: int) -> tuple[str, int, int, int, float]:
    blocks = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(experiment.abstract_state["params"])
              if "fc2" in str(path) and leaf.ndim == 2]
    rows = experiment.config.train.batch_size * tensor / topology.size
    grid = getattr(experiment.system, "grid", (1, 1))
    activation = rows * (1 + grid[0] * grid[1]) * max(leaf.shape[-1] for leaf in blocks) * _compute_size(experiment)
    return "all-reduce", 4 * len(blocks), tensor, 1, activation


def _collective(topology: Topology, kind: str, count: int, group: int, stride: int, payload: float) -> Collective:
    wire = count * wire_bytes(kind, group, payload)
    if topology.is_gpu:
        seconds = count * gpu_seconds(topology, kind, group, stride, payload)
    else:
        box = list(np.ndindex(*topology.shape))[: group * stride : stride]
        seconds = wire / (topology.usable_links(box) * topology.chip.link)
    return Collective(kind, group, count, count * payload, wire, seconds)


