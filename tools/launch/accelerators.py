"""The accelerators that can be asked for by name: Cloud TPU types with their topologies, GPU machines, zones."""

from __future__ import annotations

import re
from dataclasses import dataclass

from maskae.errors import UserError, nearest

# Topology -> chips. v5e and v6e slices are flat; v4 and v5p types count TensorCores, two to a chip, and have these default topologies.
FLAT = {"1x1": 1, "2x2": 4, "2x4": 8, "4x4": 16, "4x8": 32, "8x8": 64, "8x16": 128, "16x16": 256}
CUBES = {
    "2x2x1": 4, "2x2x2": 8, "2x2x4": 16, "2x4x4": 32, "4x4x4": 64, "4x4x8": 128, "4x8x8": 256, "8x8x8": 512,
    "8x8x16": 1024, "8x16x16": 2048,
}  # fmt: skip

TPU_ZONES = (
    "us-central1-a", "us-central1-b", "us-central1-c", "us-central2-b", "us-east1-c", "us-east1-d", "us-east5-a", "us-east5-b",
    "us-east5-c", "us-south1-a", "us-west1-c", "us-west4-a", "us-west4-b", "europe-west4-a", "europe-west4-b", "asia-northeast1-b",
    "asia-southeast1-b", "southamerica-west1-a", "southamerica-east1-c",
)  # fmt: skip


@dataclass(frozen=True)
class Accelerator:
    """One thing to ask for: `name` as gcloud and xpk take it, the chip generation of `maskae.xla_flags`, chips in a slice or a machine."""

    name: str
    chip: str
    chips: int
    topology: str = ""

    @property
    def shown(self) -> str:
        """In words."""
        return f"{self.name}: {self.chips} {self.chip} chips" + (f", {self.topology}" if self.topology else "")


# Chip -> (prefix of the type's name, units of the name per chip, topologies, software image of the VM).
TPU_FAMILIES = {
    "v4": ("v4", 2, CUBES, "tpu-ubuntu2204-base"),
    "v5e": ("v5litepod", 1, FLAT, "v2-alpha-tpuv5-lite"),
    "v5p": ("v5p", 2, CUBES, "v2-alpha-tpuv5"),
    "v6e": ("v6e", 1, FLAT, "v2-alpha-tpuv6e"),
}
TPU_TYPES = {
    f"{prefix}-{chips * units}": Accelerator(f"{prefix}-{chips * units}", chip, chips, topology)
    for chip, (prefix, units, topologies, _) in TPU_FAMILIES.items()
    for topology, chips in topologies.items()
}
GPU_TYPES = {
    name: Accelerator(name, chip, count)
    for name, chip, count in (
        ("h100-80gb-8", "h100", 8),
        ("h100-mega-80gb-8", "h100", 8),
        ("h200-141gb-8", "h200", 8),
        ("b200-8", "b200", 8),
    )
}


def tpu_type(text: str) -> Accelerator:
    """`v6e-64`, or the same by topology as tools/plan.py takes it, `v6e:8x8`. Raises UserError with the nearest type or topology."""
    family, colon, topology = text.partition(":")
    if not colon:
        if text in TPU_TYPES:
            return TPU_TYPES[text]
        renamed = re.sub(r"^v5e-", "v5litepod-", text)
        near = f" (did you mean '{renamed}'?)" if renamed in TPU_TYPES else _near_size(text) or nearest(text, TPU_TYPES)
        raise UserError(f"--accelerator={text}: no such Cloud TPU type{near}")
    if family not in TPU_FAMILIES:
        raise UserError(f"--accelerator={text}: no chip '{family}'{nearest(family, TPU_FAMILIES)}; there are {', '.join(TPU_FAMILIES)}")
    topologies = TPU_FAMILIES[family][2]
    if topology not in topologies:
        near = nearest(topology, topologies)
        raise UserError(f"--accelerator={text}: {family} has no topology '{topology}'{near}; it has {', '.join(topologies)}")
    return next(kind for kind in TPU_TYPES.values() if kind.chip == family and kind.topology == topology)


def _near_size(text: str) -> str:
    """For `v6e-100`: the type of the same family whose size is nearest; nothing for other words."""
    family, _, size = text.rpartition("-")
    sizes = [int(name.rpartition("-")[2]) for name in TPU_TYPES if name.rpartition("-")[0] == family]
    if not sizes or not size.isdigit():
        return ""
    return f" (did you mean '{family}-{min(sizes, key=lambda known: abs(known - int(size)))}'?)"


def gke_type(text: str) -> Accelerator:
    """A Cloud TPU type or a GPU machine by xpk's name. Raises UserError with the nearest one."""
    if text in GPU_TYPES:
        return GPU_TYPES[text]
    if re.match(r"v\d", text):
        return tpu_type(text)
    raise UserError(f"--accelerator={text}: unknown{nearest(text, [*GPU_TYPES, *TPU_TYPES])}; GPU machines are {', '.join(GPU_TYPES)}")


def runtime_version(kind: Accelerator) -> str:
    """The software image of a TPU VM."""
    return TPU_FAMILIES[kind.chip][3]


def check_zone(zone: str) -> str:
    """A zone such as us-east5-b; new ones are let through, a wrong form is not. Raises UserError with the nearest one."""
    if re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", zone):
        return zone
    near = next((known for known in TPU_ZONES if known.startswith(f"{zone}-")), "")
    hint = f" (did you mean '{near}'?)" if near else nearest(zone, TPU_ZONES)
    raise UserError(f"--zone={zone}: a zone is a region and a letter, such as us-east5-b{hint}")
