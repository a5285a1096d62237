"""Collectives of a compiled program by kind: how much they carry, over which links, and how long those links need."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maskae.planning.chips import GPUS_PER_NODE, Topology
from maskae.planning.program import Instruction, Program

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all", "collective-broadcast")


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind over groups of one size.

    Attributes:
        kind: one of `KINDS`.
        group: chips that take part in each.
        count: per step and chip.
        payload: bytes per step and chip: of the whole array that is summed, gathered, scattered or exchanged.
        wire: bytes per step that each chip sends with a bandwidth-optimal ring.
        seconds: what the links need for that, all of them busy.
    """

    kind: str
    group: int
    count: int
    payload: float
    wire: float
    seconds: float


def wire_bytes(kind: str, group: int, payload: float) -> float:
    """Bytes that each of `group` chips sends in one collective over an array of `payload` bytes, by a bandwidth-optimal ring."""
    share = (group - 1) / group
    if kind == "all-reduce":
        return 2 * share * payload
    return payload if kind in ("collective-permute", "collective-broadcast") else share * payload


def program_collectives(program: Program, topology: Topology, coordinates: Sequence[Sequence[int]]) -> list[Collective]:
    """The collectives of `program`, those in loops as often as the loops run. `coordinates`: of the chips in the order of the mesh."""
    found: dict[tuple[str, int], list[float]] = {}
    for kind, line, operands, times in _instructions(program):
        group = first_group(line.attributes, len(coordinates))
        if len(group) < 2:
            continue
        payload = max(operands, _payload(line) - (operands if line.opcode.endswith("-start") else 0.0))
        wire = wire_bytes(kind, len(group), payload)
        links = topology.usable_links([coordinates[index] for index in group]) if kind != "collective-permute" else 1.0
        entry = found.setdefault((kind, len(group)), [0, 0.0, 0.0, 0.0])
        for index, amount in enumerate((1, payload, wire, wire / (links * topology.chip.link))):
            entry[index] += times * amount
    return [Collective(kind, group, int(entry[0]), *entry[1:]) for (kind, group), entry in sorted(found.items())]


def _instructions(program: Program) -> list[tuple[str, Instruction, float, int]]:
    """(kind, collective, bytes of its operands, how often it runs), also those that the TPU compiler has put into fusions.

    To overlap a collective with products it is cut into the links of a chain, one in each of several fusions; all have one channel and
    together are one collective. A fusion called all-reduce-scatter holds an all-reduce of which each chip keeps its part.
    """
    lines, chains = [], set()
    for computation, line, times in program.executed():
        inside, scattered = [(computation, line)], False
        if line.opcode == "fusion":
            fused = line.attribute("calls")
            inside, scattered = [(fused, inner) for inner in program.computations[fused]], fused.startswith("all-reduce-scatter")
        for where, inner in inside:
            kind = inner.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            chain = (computation, *re.findall(r"channel_id=\d+", inner.attributes))
            if "chain_id=" in inner.attributes:
                if chain in chains:
                    continue
                chains.add(chain)
            scope = program.by_name[where]
            operands = sum(_payload(scope[name]) for name in inner.operands if name in scope)
            lines.append(("reduce-scatter" if scattered else kind, inner, operands, times))
    return lines


def _payload(line: Instruction) -> float:
    return sum(array.payload for array in line.arrays)


def first_group(attributes: str, devices: int) -> list[int]:
    """The first of the groups of devices that a collective runs over, as positions in the mesh; all devices where none is named."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return [int(pairs[1]), int(pairs[2])]
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? *\{([^}]*)\}", attributes)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        order = _iota(mesh[2], mesh[3]) if mesh[2] else np.arange(math.prod(sizes.values()))
        chosen = re.findall(r"'(\w+)'", mesh[4])
        grid = order.reshape(list(sizes.values()))
        return [int(i) for i in grid[tuple(slice(None) if name in chosen else 0 for name in sizes)].ravel()]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        return [int(i) for i in _iota(iota[2], iota[3]).reshape([int(size) for size in iota[1].split(",")])[0]]
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return [int(i) for i in listed[1].split(",")] if listed else list(range(devices))


def _iota(dims: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... as an array of `dims`, its axes in `order`: how XLA abbreviates a list of devices."""
    sizes = [int(size) for size in dims.split(",")]
    grid = np.arange(math.prod(sizes)).reshape(sizes)
    return grid.transpose([int(axis) for axis in order.split(",")]) if order else grid


def gpu_seconds(topology: Topology, kind: str, group: int, stride: int, payload: float) -> float:
    """Seconds of one collective over `group` GPUs that lie `stride` apart: within nodes over NVLink, then between nodes over the network.

    The part between nodes carries only what is left after the sum within the node (hierarchical rings, as NCCL does it).
    """
    local = max(1, min(group, GPUS_PER_NODE // stride)) if stride < GPUS_PER_NODE else 1
    nodes = max(1, group // local)
    within = wire_bytes(kind, local, payload) / topology.chip.link if local > 1 else 0.0
    between = wire_bytes(kind, nodes, payload / local) / topology.chip.network if nodes > 1 else 0.0
    return within + between
