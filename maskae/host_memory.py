"""Memory of the host that a run on CPUs uses again in every step, instead of giving it back to the system. Needs no jax."""

from __future__ import annotations

import ctypes
import glob
import os
import platform

# Of glibc's malloc.h and Linux' mman.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
MADV_HUGEPAGE = 14
HUGE_PAGE = 2**21
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")
OWN_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_")


def keep_host_memory() -> bool:
    """Lets malloc keep what is freed, in huge pages where there are; before jax starts, whose threads would have arenas of their own.

    On CPUs XLA allocates the temporaries of a step as one array and frees it when the step ends. glibc gives so large an array back to the
    system, which hands out and zeroes its pages again in the next step, one by one: with ViT-S at batch 8 that is 276,000 page faults and a
    fifth of the processor time, and in a virtual machine as much as the step itself once another process has used memory in between. Kept
    memory is one heap that grows and never shrinks: the process holds about what it has once needed. Its threads share it, which small
    steps pay for. Seconds of a step on two cores without and with it: ViT-S 1.74 and 1.48, GraphMAE on Cora 0.167 and 0.122, CROMA
    `:tiny` 0.078 and 0.065, SparK `:tiny` 0.077 and 0.067, TIP `:tiny` 0.054 and 0.046; but MAE `:tiny` 0.0146 and 0.0165.

    Returns:
        Whether it was done: not beside an accelerator (whose host has other work than XLA's arrays), not without glibc, and not where the
        environment has settings of malloc (GLIBC_TUNABLES, MALLOC_...), which win.
    """
    own_settings = any(name.startswith(OWN_SETTINGS) for name in os.environ)
    if own_settings or platform.libc_ver()[0] != "glibc" or has_accelerator():
        return False
    library = ctypes.CDLL(None)
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
        library.mallopt(option, value)
    advise_huge_pages(library, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return True


def has_accelerator() -> bool:
    """Whether jax may find another device than CPUs: one is there, and JAX_PLATFORMS does not forbid it."""
    return os.environ.get("JAX_PLATFORMS") != "cpu" and any(glob.glob(pattern) for pattern in ACCELERATORS)


def advise_huge_pages(library: ctypes.CDLL, size: int) -> None:
    """Asks for huge pages in the heap's next `size` bytes, which stay untouched. Where they are refused, nothing happens."""
    library.malloc.restype = ctypes.c_void_p
    library.malloc.argtypes = [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    address = library.malloc(size)
    if not address:
        return
    first = -(-address // HUGE_PAGE) * HUGE_PAGE
    last = (address + size) // HUGE_PAGE * HUGE_PAGE
    library.madvise(first, last - first, MADV_HUGEPAGE)
    library.free(address)
