"""Shared fixtures: eight simulated devices, the persistent compilation cache, the reference cases."""

from __future__ import annotations

import gc
import os
from importlib.metadata import version
from pathlib import Path

from maskae.host_memory import keep_host_memory

CACHE = Path(__file__).parent.parent / ".jax_cache"
# Most of the suite's time is compilation of programs that run once, so they are compiled quickly. What XLA_FLAGS has comes later and wins:
# XLA_FLAGS="--xla_backend_optimization_level=3 --xla_llvm_disable_expensive_passes=false" runs the tests as users' programs are compiled.
QUICK = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):
    # A third of the whole time; later compilers have no such choice, and end the process at a flag that they do not know.
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Tracing makes many objects that live, and large arrays come and go: without the collector's full rounds and with kept memory, 6 % less.
gc.set_threshold(50_000, 50, 100)
keep_host_memory()

import pytest  # noqa: E402 (the lines above must run before anything imports jax)

SHARED = Path(os.environ.get("MASKAE_SHARED", Path(__file__).parent.parent.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference cases and real data (`MASKAE_SHARED`); tests that need it are skipped where it is absent."""
    if not (SHARED / "goldens").is_dir():
        pytest.skip(f"needs the reference cases: no {SHARED / 'goldens'} (set MASKAE_SHARED)")
    return SHARED
