"""Memory that is kept between steps: page faults of a process that takes and gives back the same large array."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from maskae import host_memory

ROOT = Path(__file__).parent.parent
MIB = 64
PROGRAM = f"""
import resource, sys
from maskae.host_memory import keep_host_memory
print(keep_host_memory() if sys.argv[1] == "keep" else None)
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array = bytearray({MIB} * 2**20)
    array[::4096] = b"1" * ({MIB} * 256)
    del array
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")


def faults(word: str, **environment: str) -> tuple[str, list[int]]:
    """What keep_host_memory said, and the page faults of each round."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(host_memory.OWN_SETTINGS)}
    plain |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run([sys.executable, "-c", PROGRAM, word], env=plain, capture_output=True, text=True, check=True)
    said, *counts = done.stdout.split()
    return said, [int(count) for count in counts]


@needs_glibc
def test_a_large_array_is_faulted_in_once():
    _, returned = faults("return")
    said, kept = faults("keep")
    # A fault per huge page or per page.
    assert min(returned[1:]) >= MIB // 2, "without it every round has its pages anew"
    assert said == "True" and max(kept[1:]) < 8, kept


@needs_glibc
@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX"])
def test_the_users_own_settings_win(name):
    value = "glibc.malloc.mmap_threshold=65536" if name == "GLIBC_TUNABLES" else "4"
    said, counts = faults("keep", **{name: value})
    assert said == "False" and min(counts[1:]) >= MIB // 2


def test_nothing_is_done_beside_an_accelerator(monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(host_memory, "ACCELERATORS", (str(tmp_path / "nvidia[0-9]*"),))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert host_memory.has_accelerator() and not host_memory.keep_host_memory()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not host_memory.has_accelerator()
