"""Accelerators by name: memory, peak rates, links; and slices of them as `v5e:16x16` or `h100:8`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from maskae.errors import UserError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator chip.

    Attributes:
        memory: bytes of HBM.
        reserved: bytes of HBM that programs do not get: what the TPU compiler's out-of-memory message keeps back, the CUDA context.
        flops: peak dense bfloat16 FLOP/s.
        bandwidth: HBM bytes/s.
        link: bytes/s of one link in one direction; of a GPU, all of its NVLinks together.
        dimensions: of the torus that joins the chips; 0 for GPUs, which hang on a switch.
        full_ring: the length from which on a torus dimension closes into a ring; below it is a line.
        network: bytes/s per chip and direction between slices or GPU nodes.
        jax_name: the chip in `jax.experimental.topologies`; empty for GPUs.
        options: further arguments there.
    """

    memory: float
    reserved: float
    flops: float
    bandwidth: float
    link: float
    dimensions: int
    full_ring: int
    network: float
    jax_name: str = ""
    options: tuple[tuple[str, str], ...] = ()


# TPU figures: the "system architecture" pages of the Cloud TPU documentation for v4, v5e, v5p and v6e (peak bf16, HBM capacity and
# bandwidth, inter-chip bandwidth per chip: 1600 Gbit/s over 4 links of v5e, 4800 over 6 of v5p, 3200 over 4 of v6e; v4 has half of v5p's).
# Data-centre network: 6.4 Tbit/s per v5e pod and 25.6 per v6e pod of 256 chips, 50 Gbit/s per v5p and v4 chip. v4 and v5p have two cores
# per chip that programs see as one device ("megacore").
# GPU figures: NVIDIA's data sheets of the SXM boards, dense (without structured sparsity), NVLink per direction (half of the advertised
# sum), and one 400 Gbit/s network port per GPU, as in DGX systems.
CHIPS: dict[str, Chip] = {
    "v4": Chip(32 * GIB, 0.25 * GIB, 275e12, 1.2e12, 50e9, 3, 4, 6.25e9, "v4", (("chip_config_name", "megacore"),)),
    "v5e": Chip(16 * GIB, 0.25 * GIB, 197e12, 819e9, 50e9, 2, 16, 3.125e9, "v5e"),
    "v5p": Chip(95.74 * GIB, 0.0, 459e12, 2.765e12, 100e9, 3, 4, 6.25e9, "v5p"),
    "v6e": Chip(32 * GIB, 0.75 * GIB, 918e12, 1.64e12, 100e9, 2, 16, 12.5e9, "v6e"),
    "h100": Chip(80e9, 1.5 * GIB, 989e12, 3.35e12, 450e9, 0, 0, 50e9),
    "h200": Chip(141e9, 1.5 * GIB, 989e12, 4.8e12, 450e9, 0, 0, 50e9),
    "b200": Chip(180e9, 1.5 * GIB, 2250e12, 8.0e12, 900e9, 0, 0, 50e9),
}
GPUS_PER_NODE = 8
FLAT_SHAPES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SMALL_CUBOIDS = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
LARGEST_CUBOID = 24


@dataclass(frozen=True)
class Topology:
    """Chips of one kind that are joined: `shape` along each dimension of the torus, or (number,) of GPUs."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """The kind's figures."""
        return CHIPS[self.kind]

    @property
    def size(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def is_gpu(self) -> bool:
        """Whether there is no compiler here for it."""
        return not self.chip.jax_name

    def usable_links(self, coordinates: Sequence[Sequence[int]]) -> float:
        """Links that a ring over the chips at `coordinates` keeps busy per chip and direction; at least the one that all groups share.

        A dimension that is spanned whole and closes into a ring gives two (both ways round), another one that is spanned at all gives one.
        Chips that lie s apart leave room for s such groups between them, which share the links.
        """
        links = 0.0
        for axis, whole in enumerate(self.shape):
            places = sorted({chip[axis] for chip in coordinates})
            if len(places) > 1:
                spacing = (places[-1] - places[0]) / (len(places) - 1)
                closed = len(places) * spacing == whole and whole % self.chip.full_ring == 0
                links += (2 if closed else 1) / spacing
        return links or 1.0


def shapes_of(kind: str) -> list[tuple[int, ...]]:
    """The slice shapes that can be had, small ones first."""
    if CHIPS[kind].dimensions == 2:
        return list(FLAT_SHAPES)
    sides = range(4, LARGEST_CUBOID + 1, 4)
    cuboids = [(a, b, c) for a in sides for b in sides for c in sides if a <= b <= c]
    return sorted([*SMALL_CUBOIDS, *cuboids], key=math.prod)


def parse_topology(text: str) -> Topology:
    """`v5e:16x16`, `v5p:4x4x4`, `h100:8`. Raises UserError for an unknown chip or a slice that does not exist, with the nearest one."""
    known = ", ".join(CHIPS)
    kind, colon, shape_text = text.partition(":")
    if kind not in CHIPS:
        hint = " (did you mean 'v5e'?)" if kind.startswith("v5lite") else nearest(kind, CHIPS)
        raise UserError(f"--topology {text}: unknown chip '{kind}'{hint}; there are {known}")
    example = f"{kind}:8" if not CHIPS[kind].jax_name else f"{kind}:{written(shapes_of(kind)[3])}"
    if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape_text):
        raise UserError(f"--topology {text}: expected a chip and a shape, such as {example}")
    shape = tuple(int(part) for part in shape_text.split("x"))
    if not CHIPS[kind].jax_name:
        number = math.prod(shape)
        if number > GPUS_PER_NODE and number % GPUS_PER_NODE:
            near = max(GPUS_PER_NODE, round(number / GPUS_PER_NODE) * GPUS_PER_NODE)
            raise UserError(f"--topology {text}: more than one node of {GPUS_PER_NODE} GPUs comes in whole nodes (nearest: {kind}:{near})")
        return Topology(text, kind, (number,))
    shapes = shapes_of(kind)
    if shape not in shapes:
        closest = min(shapes, key=lambda other: abs(math.log(math.prod(other) / math.prod(shape))))
        raise UserError(f"--topology {text}: there is no such slice (nearest: {kind}:{written(closest)})")
    return Topology(text, kind, shape)


def written(shape: tuple[int, ...]) -> str:
    """(4, 4, 8) -> 4x4x8."""
    return "x".join(map(str, shape))
