"""The answer of a plan: what one step needs per chip, and what limits it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from maskae.planning.chips import GIB
from maskae.planning.collectives import Collective


@dataclass(frozen=True)
class Memory:
    """Bytes per chip.

    Attributes:
        arguments: train state and batch.
        temporaries: activations, gradients, buffers; nan where the compiler did not say.
        code: the program.
        capacity: the chip's memory.
        usable: what programs get of it.
    """

    arguments: float
    temporaries: float
    code: float
    capacity: float
    usable: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.arguments + self.temporaries + self.code


@dataclass(frozen=True)
class Flops:
    """Matrix-product FLOPs per example by formula, of a `forward` pass and of `training` (three of them, unless a part is frozen);
    `recomputed` per example, what rematerialisation adds; `per_chip` per step, with recomputation."""

    forward: float
    training: float
    recomputed: float
    per_chip: float


@dataclass(frozen=True)
class Seconds:
    """What one step would take if only one thing limited it: the matrix unit, the memory, the links."""

    compute: float
    memory: float
    interconnect: float

    @property
    def binds(self) -> str:
        """The slowest of the three."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]

    @property
    def step(self) -> float:
        """A step cannot be faster than this, even where all three overlap fully."""
        return max(self.compute, self.memory, self.interconnect)


@dataclass(frozen=True)
class Report:
    """One plan.

    Attributes:
        method: "compiled" or "formula".
        fits: whether `memory.total` fits; the fields below are None where a program that does not fit was never made.
        bytes_method: how `hbm_bytes` was found.
        hbm_bytes: per step and chip.
        peak_flops: of the chip, for the utilisation.
        compile_seconds, warnings, versions: of the compilation.
    """

    config: str
    topology: str
    chips: int
    mesh: dict[str, int]
    batch_size: int
    accumulate: int
    scan: bool | None
    remat: str | None
    parameters: int
    method: str
    fits: bool
    memory: Memory
    flops: Flops
    peak_flops: float
    hbm_bytes: float | None = None
    bytes_method: str = ""
    xla_bytes: float | None = None
    collectives: list[Collective] = field(default_factory=list)
    seconds: Seconds | None = None
    compile_seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs utilisation (recomputation does not count) of a step that takes exactly its bound; None where nothing fits."""
        if self.seconds is None:
            return None
        return self.flops.training * self.batch_size / self.chips / self.peak_flops / self.seconds.step

    @property
    def examples_per_second(self) -> float | None:
        """Of all chips, at that bound."""
        return None if self.seconds is None else self.batch_size / self.seconds.step

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the derived ones. Numbers are bytes, FLOPs, seconds."""
        plain = dataclasses.asdict(self)
        plain["memory"]["total"] = self.memory.total
        plain["seconds"] = None if self.seconds is None else {**plain["seconds"], "step": self.seconds.step, "binds": self.seconds.binds}
        return plain | {"batch_per_chip": self.batch_size / self.chips, "utilisation": self.utilisation,
                        "examples_per_second": self.examples_per_second}


def report_from_json(plain: dict[str, Any]) -> Report:
    """The report of which `plain` is the `to_json`."""
    values = {each.name: plain[each.name] for each in dataclasses.fields(Report)}
    values["memory"] = Memory(**{each.name: plain["memory"][each.name] for each in dataclasses.fields(Memory)})
    values["flops"] = Flops(**plain["flops"])
    values["collectives"] = [Collective(**each) for each in plain["collectives"]]
    if plain["seconds"]:
        values["seconds"] = Seconds(*(plain["seconds"][each.name] for each in dataclasses.fields(Seconds)))
    return Report(**values)


def report_lines(report: Report) -> list[str]:
    """The report as text."""
    memory, flops = report.memory, report.flops
    mesh = " x ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1) or "one chip"
    how = "compiled by XLA for this chip" if report.method == "compiled" else "by formula, an estimate: nothing was compiled"
    parts = f" in {report.accumulate} microbatches" if report.accumulate > 1 else ""
    scan = {True: "scanned", False: "unrolled", None: "as they are"}[report.scan]
    lines = [
        f"{report.config} on {report.topology}: {report.chips} chip(s), mesh {mesh}, {report.parameters / 1e6:,.1f} M parameters; {how}",
        f"batch         {report.batch_size:,} = {report.chips} x {report.batch_size / report.chips:g}{parts};"
        f" blocks {scan}, rematerialisation {report.remat or 'as it is'}",
        "per chip",
        f"  arguments   {_gib(memory.arguments)}  train state and batch",
        f"  temporaries {_gib(memory.temporaries)}",
        f"  program     {_gib(memory.code)}",
        f"  total       {_gib(memory.total)}  of {_gib(memory.usable).strip()} usable ({_gib(memory.capacity).strip()} memory): "
        + _verdict(report.fits, memory),
        f"  matmul FLOP {_scaled(flops.per_chip)} per step: {_scaled(flops.training)} per example by formula"
        f" ({flops.training / flops.forward:.3g} x forward) + {_scaled(flops.recomputed).strip()} recomputed",
    ]
    if report.seconds is None:
        return [*lines, "  nothing further: the compiler makes no program that does not fit"]
    assert report.hbm_bytes is not None
    lines.append(f"  memory      {_scaled(report.hbm_bytes)}B moved per step, {report.bytes_method}")
    for each in report.collectives:
        lines.append(f"  {each.kind:19s} {each.count:5d} x over {each.group} chips: {_scaled(each.payload)}B per step,"
                     f" {_scaled(each.wire)}B sent, {each.seconds * 1e3:.3f} ms")
    if not report.collectives:
        lines.append("  no collectives")
    return [*lines, *_bound_lines(report, report.seconds)]


def _bound_lines(report: Report, seconds: Seconds) -> list[str]:
    bounds = {"compute": seconds.compute, "memory": seconds.memory, "interconnect": seconds.interconnect}
    shown = ", ".join(f"{name} {value * 1e3:.4g} ms" for name, value in bounds.items())
    utilisation, rate = (report.utilisation or 0) * 100, report.examples_per_second or 0
    lines = [
        f"a step needs  {shown}: {seconds.binds} binds",
        f"at best       {utilisation:.1f} % MFU, {rate:,.0f} examples/s on {report.chips} chip(s)",
    ]
    if report.method == "compiled":
        lines.append(f"compiled in   {report.compile_seconds:.0f} s with " + ", ".join(f"{k} {v}" for k, v in report.versions.items()))
    return lines + [f"warning       {line}" for line in report.warnings]


def _verdict(fits: bool, memory: Memory) -> str:
    free = memory.usable - memory.total
    if not fits:
        return f"DOES NOT FIT, {_gib(-free).strip()} too much"
    # The compiler refuses a program without room, and counts closer than the sum of what it reports.
    return f"fits, {_gib(free).strip()} free" if free >= 0 else "fits, says the compiler, though the parts add up to more"


def _gib(size: float) -> str:
    return f"{size / GIB:9.3f} GiB"


def _scaled(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.4g} "
