"""Reads the text of a compiled program: which instructions run, how often, and how many bytes they move.

XLA's own cost analysis counts the body of a loop once, so a scanned network looks `depth` times too cheap; here each loop's body counts as
often as the compiler knows that it runs (`known_trip_count`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32,
             "s64": 64, "u64": 64, "f64": 64, "c64": 64}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|async_execution_thread_computation)=%?([\w.\-]+)")


@dataclass(frozen=True)
class Array:
    """One array of an instruction's type.

    Attributes:
        bits: of one element.
        dims: its shape.
        physical: element count with the padding of the chip's tiles.
        on_chip: whether it lies in the chip's scratch memory, not in HBM (space 0) or on the host (5).
    """

    bits: int
    dims: tuple[int, ...]
    physical: int
    on_chip: bool

    @property
    def bytes(self) -> float:
        """Bytes that it takes, padding included."""
        return self.physical * self.bits / 8

    @property
    def payload(self) -> float:
        """Bytes of its values alone."""
        return math.prod(self.dims) * self.bits / 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    arguments: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions whose results it takes."""
        return tuple(re.findall(r"%([\w.\-]+)", self.arguments))

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs."""
        return tuple(_CALLED.findall(self.attributes))

    def attribute(self, name: str) -> str:
        """The computation called by `name=`, or an empty string."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""


@dataclass
class Program:
    """The computations of a program by name."""

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""

    @cached_property
    def by_name(self) -> dict[str, dict[str, Instruction]]:
        """computation -> instruction name -> instruction."""
        return {name: {line.name: line for line in lines} for name, lines in self.computations.items()}

    def trips(self, loop: Instruction) -> int:
        """How often a loop's body runs: what the compiler noted, or the constant that its condition compares the counter with.

        Once where more than one comparison ends it: such are the loops of rejection sampling (Beta's, for mixup), which seldom need
        a second pass. Raises ValueError for a counter without a constant limit, which no loop with a fixed length has.
        """
        noted = _TRIPS.search(loop.attributes)
        if noted:
            return int(noted[1])
        condition = self.by_name[loop.attribute("condition")]
        root = next(line for line in condition.values() if line.is_root)
        if root.opcode != "compare":
            return 1
        limits = [int(condition[name].arguments) for name in root.operands if condition[name].opcode == "constant"]
        if len(limits) != 1 or "direction=LT" not in root.attributes:
            raise ValueError(f"the loop {loop.name} has no constant length")
        return limits[0]

    def executed(self, name: str = "", times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, how often it runs) from the entry down through loops and calls, but not into fusions."""
        name = name or self.entry
        for line in self.computations[name]:
            if line.opcode == "while":
                yield from self.executed(line.attribute("body"), times * self.trips(line))
            elif line.opcode in ("call", "async-start"):
                yield from self.executed(line.called[0], times)
            elif line.opcode == "conditional":
                for branch in re.findall(r"%([\w.\-]+)", line.attributes.partition("branch_computations={")[2].partition("}")[0]):
                    yield from self.executed(branch, times)
            else:
                yield name, line, times

    def loops(self) -> list[int]:
        """The trip counts of all loops."""
        return [self.trips(line) for lines in self.computations.values() for line in lines if line.opcode == "while"]


def parse_program(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    program, lines = Program(), None
    for raw in text.splitlines():
        header = _HEADER.match(raw)
        if header:
            lines = program.computations.setdefault(header[2], [])
            if header[1]:
                program.entry = header[2]
        elif lines is not None and raw.startswith("  "):
            instruction = _parse_instruction(raw)
            if instruction:
                lines.append(instruction)
    return program


def _parse_instruction(raw: str) -> Instruction | None:
    found = _NAME.match(raw)
    if not found:
        return None
    rest = raw[found.end():]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    if opening < 0:
        return None
    close = _closing(rest, opening)
    return Instruction(found[2], rest[:opening], _parse_arrays(kind), rest[opening + 1:close], rest[close + 1:], bool(found[1]))


def _closing(text: str, start: int) -> int:
    depth = 0
    for position in range(start, len(text)):
        if text[position] == "(":
            depth += 1
        elif text[position] == ")":
            depth -= 1
            if not depth:
                return position
    return len(text) - 1


def _parse_arrays(kind: str) -> tuple[Array, ...]:
    arrays = []
    for item, dims_text, layout in _ARRAY.findall(kind):
        if item in ITEM_BITS:
            dims = tuple(int(size) for size in dims_text.split(",") if size)
            arrays.append(Array(ITEM_BITS[item], dims, _padded(dims, layout), bool(re.search(r"S\([^05]\)", layout))))
    return tuple(arrays)


def _padded(dims: tuple[int, ...], layout: str) -> int:
    """Elements after rounding the minor dimensions up to the first tile: `{2,1,0:T(8,128)(2,1)}` rounds dimension 2 to 128, 1 to 8."""
    tile = re.search(r"T\(([\d,]+)\)", layout)
    order = [int(axis) for axis in layout.partition(":")[0].split(",") if axis.strip().isdigit()]
    sizes = [dims[axis] for axis in order] if len(order) == len(dims) else list(reversed(dims))
    if tile:
        for position, step in enumerate(reversed([int(part) for part in tile[1].split(",")])):
            if position < len(sizes):
                sizes[position] = -(-sizes[position] // step) * step
    return math.prod(sizes)
