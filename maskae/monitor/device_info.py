"""What the machine is and what it could do: peak FLOP/s, model FLOPs utilisation, memory, versions."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from maskae.monitor.clock import Clock

# Peak dense bf16 TFLOP/s per chip (fp16 for the V100, which has no bf16), and how many JAX devices one chip shows as: the two cores of a
# TPU v2, v3 and 7x are a device each. Keys are parts of `device_kind`; the first that occurs counts, so special forms come first.
# Sources: the vendors' data sheets (NVIDIA V100, A100, H100, H200, B200 without sparsity; Google Cloud's page of each TPU version).
PEAK_TFLOPS: dict[str, tuple[float, int]] = {
    "V100": (125, 1),
    "A100": (312, 1),
    "H100 PCIe": (756, 1),
    "H100 NVL": (835, 1),
    "H100": (989, 1),
    "H200": (989, 1),
    "GH200": (989, 1),
    "GB200": (2500, 1),
    "B200": (2250, 1),
    "TPU v2": (46, 2),
    "TPU v3": (123, 2),
    "TPU v4 lite": (138, 1),
    "TPU v4": (275, 1),
    "TPU v5 lite": (197, 1),
    "TPU v5e": (197, 1),
    "TPU v5": (459, 1),
    "TPU v6": (918, 1),
    "TPU7x": (2307, 2),
}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scikit-learn")


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bf16 FLOP/s of one JAX device of this kind; None where it is not known (CPUs)."""
    for part, (teraflops, devices_per_chip) in PEAK_TFLOPS.items():
        if part in device_kind:
            return teraflops * 1e12 / devices_per_chip
    return None


def mfu(flops_per_example_forward: float, examples_per_second: float, devices: Sequence[jax.Device]) -> float | None:
    """Model FLOPs utilisation in 0..1: the share of the devices' peak that the model's own matrix products use.

    Args:
        flops_per_example_forward: of one example's forward pass; a training step counts as three (forward, and twice that backward).
            Recomputation (remat) is work but not the model's, and is not counted.
        examples_per_second: all devices together.
        devices: all devices of the run, of one kind.

    Returns:
        None where the peak is not known; `mfu_text` writes that as "unknown".
    """
    peak = peak_flops(devices[0].device_kind)
    if peak is None:
        return None
    return 3 * flops_per_example_forward * examples_per_second / (len(devices) * peak)


def mfu_text(value: float | None) -> str:
    """`41.3 %`, or the word `unknown`."""
    return "unknown" if value is None else f"{100 * value:.1f} %"


def machine_columns(clock: Clock, flops_per_example_forward: float, devices: Sequence[jax.Device]) -> dict[str, float]:
    """All `machine/...` columns of a logging interval: `Clock.rates`, `machine/mfu` (left out where unknown), memory."""
    columns = clock.rates()
    if "machine/examples_per_second" in columns:
        utilisation = mfu(flops_per_example_forward, columns["machine/examples_per_second"], devices)
        if utilisation is not None:
            columns["machine/mfu"] = utilisation
    return columns | device_memory()


def device_memory(devices: Sequence[jax.Device] | None = None) -> dict[str, float]:
    """Memory columns in bytes, the largest over this host's devices.

    `machine/device_memory_bytes` (in use) and `machine/device_memory_peak_bytes`. A CPU device has no memory of its own: there it is
    `machine/host_memory_bytes`, the resident set of this process (left out on systems that do not tell it).
    """
    stats = [device.memory_stats() for device in (jax.local_devices() if devices is None else devices)]
    known = [entry for entry in stats if entry]
    if known:
        in_use = max(float(entry["bytes_in_use"]) for entry in known)
        peak = max(float(entry.get("peak_bytes_in_use", entry["bytes_in_use"])) for entry in known)
        return {"machine/device_memory_bytes": in_use, "machine/device_memory_peak_bytes": peak}
    resident = _resident_bytes()
    return {} if resident is None else {"machine/host_memory_bytes": float(resident)}


def describe_run() -> dict[str, Any]:
    """Versions, commit, and devices as a JSON object, for checkpoints and the report.

    Keys: maskae, python, platform, commit (None outside of a git checkout; ends in "-dirty" where files were changed), versions, device,
    devices, processes, peak_flops_per_device (None where unknown).
    """
    import maskae

    device = jax.devices()[0]
    return {
        "maskae": maskae.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
        "versions": {name: _version(name) for name in PACKAGES},
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "peak_flops_per_device": peak_flops(device.device_kind),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    repository = Path(__file__).resolve().parents[2]
    # Only our own checkout: an installed package may lie inside someone else's repository.
    if not (repository / ".git").exists():
        return None
    command = ["git", "-C", str(repository), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a file system that hangs
        return None
    return done.stdout.strip() or None


def _resident_bytes() -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return None
