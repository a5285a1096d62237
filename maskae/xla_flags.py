"""Which compiler and runtime settings a run gets on which chip, and why. Needs no jax: they must be set before jax starts.

The tables are short on purpose. The compilers' defaults are good, and both of them refuse to start with a flag that they do not know, so
each entry has to earn its place; a test starts the installed jaxlib and libtpu with all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from maskae.errors import check_choice

TPU_VARIABLE = "LIBTPU_INIT_ARGS"
GPU_VARIABLE = "XLA_FLAGS"

MAXTEXT = "AI-Hypercomputer/maxtext benchmarks/xla_flags_library.py"
AXLEARN = "apple/axlearn common/compiler_options.py"
OPENXLA = "openxla.org/xla/gpu_optimization_levels"
JAX_TOOLBOX = "NVIDIA/JAX-Toolbox docs/GPU_performance.md"


@dataclass(frozen=True)
class Flag:
    """One setting.

    Attributes:
        name: of the flag, or of the environment variable where `variable` is the same.
        value: as text.
        reason: what it does for a run here.
        source: the public code or page that recommends it.
        variable: the environment variable that carries it.
    """

    name: str
    value: str
    reason: str
    source: str
    variable: str

    @property
    def text(self) -> str:
        """`--name=value` for a compiler flag, `NAME=value` for a plain environment variable."""
        return f"{self.name}={self.value}" if self.name == self.variable else f"--{self.name}={self.value}"


def _tpu(name: str, reason: str, source: str, value: str = "true") -> Flag:
    return Flag(name, value, reason, source, TPU_VARIABLE)


def _gpu(name: str, reason: str, source: str, value: str = "true") -> Flag:
    return Flag(name, value, reason, source, GPU_VARIABLE)


_ASYNC_ALL_GATHER = _tpu("xla_enable_async_all_gather", "all-gathers of fsdp parameters start early and run beside the matmuls", MAXTEXT)
_V4 = (
    Flag(_ASYNC_ALL_GATHER.name, "true", _ASYNC_ALL_GATHER.reason + "; on by default only from v5", AXLEARN, TPU_VARIABLE),
    _tpu("xla_enable_async_collective_permute", "neighbour exchanges run beside compute; on by default only from v5", AXLEARN),
)
_COLLECTIVE_FUSION = (
    _ASYNC_ALL_GATHER,
    _tpu("xla_tpu_enable_async_collective_fusion", "a collective under way is fused with the matmul that hides it", MAXTEXT),
    _tpu("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "the same for all-gathers, which fsdp has one of per layer", MAXTEXT),
    _tpu("xla_tpu_enable_async_collective_fusion_multiple_steps", "one collective may be hidden behind several matmuls in a row", MAXTEXT),
    _tpu("xla_tpu_overlap_compute_collective_tc", "lets the tensor core compute while it drives a collective", MAXTEXT),
)
_V6E = (
    _tpu(
        "xla_tpu_scoped_vmem_limit_kib",
        "a kernel may use 96 MiB of the vector memory, far above the default, so that larger tiles stay on the chip",
        AXLEARN,
        value="98304",
    ),
)
_SLICES = (
    _tpu("xla_tpu_enable_data_parallel_all_reduce_opt", "gradients cross between slices while the backward pass runs", AXLEARN),
    _tpu("xla_tpu_data_parallel_opt_different_sized_ops", "the same for layers of different sizes (encoder and decoder)", AXLEARN),
)
_GPU = (
    _gpu("xla_gpu_enable_latency_hiding_scheduler", "orders kernels so that collectives run beside compute; off by default", JAX_TOOLBOX),
    _gpu("xla_gpu_enable_pipelined_all_gather", "in scanned layers, gathers the next layer's fsdp parameters during this one", OPENXLA),
    _gpu("xla_gpu_enable_pipelined_reduce_scatter", "in scanned layers, scatters this layer's gradients during the next one", OPENXLA),
    _gpu("xla_gpu_enable_pipelined_all_reduce", "in scanned layers, the same for data-parallel gradients", OPENXLA),
    Flag(
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "0.9",
        "JAX takes 75 % of the memory by default; the rest is needed only by NCCL and cuDNN",
        JAX_TOOLBOX,
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
    ),
)

FLAGS: dict[str, tuple[Flag, ...]] = {
    "cpu": (),
    "v4": _V4,
    "v5e": _COLLECTIVE_FUSION,
    "v5p": _COLLECTIVE_FUSION,
    "v6e": _COLLECTIVE_FUSION + _V6E,
    "h100": _GPU,
    "h200": _GPU,
    "b200": _GPU,
}
TPU_CHIPS = ("v4", "v5e", "v5p", "v6e")
GPU_CHIPS = ("h100", "h200", "b200")


def flags_for(chip: str, slices: int = 1) -> list[Flag]:
    """The settings for a chip generation, one of `FLAGS`. `slices`: TPU slices that are joined by the data-centre network.

    Raises UserError for an unknown generation.
    """
    check_choice("chip", chip, FLAGS)
    between_slices = _SLICES if slices > 1 and chip in TPU_CHIPS else ()
    return [*FLAGS[chip], *between_slices]


def environment_for(chip: str, slices: int = 1) -> dict[str, str]:
    """The same as environment variables: `LIBTPU_INIT_ARGS` on a TPU, `XLA_FLAGS` and the allocator's on a GPU, nothing on a CPU.

    Raises UserError for an unknown generation.
    """
    environment: dict[str, str] = {}
    for flag in flags_for(chip, slices):
        if flag.name == flag.variable:
            environment[flag.variable] = flag.value
        else:
            environment[flag.variable] = f"{environment[flag.variable]} {flag.text}" if flag.variable in environment else flag.text
    return environment
