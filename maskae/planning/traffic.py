"""Bytes that a compiled program moves between HBM and the chip, from its text.

A fusion reads its operands and writes its results once; of an operand that it only slices, the slices count, and of one that it updates in
place, the update. Arrays in the chip's scratch memory are free. The padding of tiles counts, since it is moved too. Collectives do not
count here: what they move is what they send and receive (`maskae.planning.collectives`).
"""

from __future__ import annotations

import re
from collections import defaultdict

from maskae.planning.collectives import KINDS
from maskae.planning.program import Instruction, Program

# Name, rearrange or end what another instruction moves.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "opt-barrier",
        "add-dependency", "domain"}
FREE_CALLS = ("ConcatBitcast", "AllocateBuffer", "Sharding")
SLICES = ("dynamic-slice", "slice")


def hbm_bytes(program: Program) -> float:
    """Bytes to and from HBM in one run of the program, the bodies of loops as often as they run."""
    return sum(times * instruction_bytes(program, computation, line) for computation, line, times in program.executed())


def instruction_bytes(program: Program, computation: str, line: Instruction) -> float:
    """Bytes to and from HBM of one instruction of `computation`."""
    if line.opcode in FREE or line.opcode.endswith(("-done", "-update")) or line.opcode.removesuffix("-start") in KINDS:
        return 0.0
    if line.opcode == "custom-call" and any(f'custom_call_target="{name}"' in line.attributes for name in FREE_CALLS):
        return 0.0
    if line.opcode == "slice-start":
        source, target = line.arrays[:2]
        return (0.0 if source.on_chip else target.bytes) + (0.0 if target.on_chip else target.bytes)
    if line.opcode.endswith("-start"):  # its type holds source and target
        return _all(line)
    scope = program.by_name[computation]
    operands = [scope[name] for name in line.operands if name in scope]
    if line.opcode == "fusion":
        return _fusion_bytes(program, line, operands)
    if line.opcode in SLICES:
        return 2 * _all(line)
    if line.opcode == "dynamic-update-slice":
        return _all(operands[1]) + (_all(operands[1]) if _all(line) else 0.0)
    return _all(line) + sum(_all(operand) for operand in operands)


def _all(line: Instruction) -> float:
    return sum(array.bytes for array in line.arrays if not array.on_chip)


def _fusion_bytes(program: Program, line: Instruction, operands: list[Instruction]) -> float:
    name = line.attribute("calls")
    total, in_place, updates = 0.0, 0.0, 0.0
    for index, operand in enumerate(operands):
        whole = _all(operand)
        read, updated = _touched(program, name, index)
        if updated:
            in_place, updates = in_place + whole, updates + updated
        total += min(whole, read)
    written = _all(line) if not name.startswith("async_collective_fusion") else _not_passed_on(line)
    return total + (written - min(in_place, written) + min(updates, in_place) if in_place else written)


def _not_passed_on(line: Instruction) -> float:
    """Bytes of the results that a fusion does not merely hand on from its operands."""
    passed = {int(index) for index in re.findall(r"\{(\d+)\}: \(", line.attributes.partition("output_to_operand_aliasing=")[2])}
    return sum(array.bytes for index, array in enumerate(line.arrays) if index not in passed and not array.on_chip)


def _touched(program: Program, computation: str, index: int) -> tuple[float, float]:
    """Bytes that a fused computation reads of its parameter `index`, and those that it writes into it in place."""
    body = program.computations[computation]
    users: dict[str, list[tuple[Instruction, int]]] = defaultdict(list)
    for line in body:
        for position, operand in enumerate(line.operands):
            users[operand].append((line, position))
    parameter = next(line for line in body if line.opcode == "parameter" and line.arguments.strip() == str(index))
    return _uses(program, program.by_name[computation], users, parameter, sum(array.bytes for array in parameter.arrays))


def _uses(
    program: Program, scope: dict[str, Instruction], users: dict[str, list[tuple[Instruction, int]]], line: Instruction, whole: float
) -> tuple[float, float]:
    read, updated = 0.0, 0.0
    for user, position in users[line.name]:
        if user.opcode in SLICES and position == 0:
            read += sum(array.bytes for array in user.arrays)
        elif user.opcode == "dynamic-update-slice" and position == 0:
            updated += sum(array.bytes for array in scope[user.operands[1]].arrays)
        elif user.opcode == "bitcast":
            more = _uses(program, scope, users, user, whole)
            read, updated = read + more[0], updated + more[1]
        elif user.opcode == "fusion":
            more = _touched(program, user.attribute("calls"), position)
            read, updated = read + more[0], updated + more[1]
        elif user.opcode == "tuple" or user.opcode.removesuffix("-start") in KINDS:
            continue
        else:
            read += whole
    return read, updated
