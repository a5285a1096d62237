"""Checkpoints between processes: another number of devices, and SIGKILL at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maskae.checkpoint import Checkpointer

pytestmark = pytest.mark.filterwarnings("error")
REPOSITORY = Path(__file__).parent.parent


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def start_child(code: str, *arguments: object, devices: int = 1) -> subprocess.Popen:
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


ON_TWO_DEVICES = """
import sys, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from maskae.checkpoint import Checkpointer
assert jax.device_count() == 2
mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
wanted = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
with Checkpointer(sys.argv[1], keep_last=2) as checkpointer:
    state = checkpointer.restore(1, {"kernel": wanted})
    assert len(state["kernel"].addressable_shards) == 2
    checkpointer.save(2, jax.tree.map(lambda leaf: leaf + 1, state), {"devices": 2})
"""


def test_moves_between_processes_with_eight_and_two_devices(tmp_path: Path) -> None:
    kernel = jax.random.normal(jax.random.key(0), (16, 8))
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    eight = NamedSharding(mesh, PartitionSpec("fsdp", "data"))
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        checkpointer.save(1, {"kernel": jax.device_put(kernel, eight)}, {})
    child = start_child(ON_TWO_DEVICES, tmp_path, devices=2)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    assert checkpointer.metadata(2) == {"devices": 2}
    restored = checkpointer.restore(2, {"kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=eight)})["kernel"]
    assert restored.sharding == eight
    np.testing.assert_array_equal(restored, kernel + 1)


SAVES_FOR_EVER = """
import sys, jax, jax.numpy as jnp, numpy as np
from maskae.checkpoint import Checkpointer
folder, size = sys.argv[1], int(sys.argv[2])
def make_state(step):
    return {"step": jnp.int32(step), "params": {"w": jnp.arange(size, dtype=jnp.float32) * 0.5 + step}, "ema": {}}
with Checkpointer(folder, keep_last=2, keep_every_steps=10) as checkpointer:
    step = checkpointer.latest_step()
    if step is None:
        step = 0
    else:
        restored = checkpointer.restore(step, jax.eval_shape(lambda: make_state(0)))
        jax.tree.map(np.testing.assert_array_equal, restored, make_state(step))
    while True:
        step += 1
        print("save", step, flush=True)
        checkpointer.save(step, make_state(step), {"at": step})
"""


def kill_while_saving(folder: Path, size: int, saves: int, delay: float | None) -> int:
    """Lets a child announce `saves` saves, kills it (after `delay` seconds, or where None as soon as a temporary folder is seen).

    Returns the last step that it announced.
    """
    child = start_child(SAVES_FOR_EVER, folder, size)
    assert child.stdout is not None and child.stderr is not None
    announced = [child.stdout.readline() for _ in range(saves)]
    if not announced[-1]:
        pytest.fail(child.stderr.read())
    if delay is not None:
        time.sleep(delay)
    else:
        deadline = time.monotonic() + 20
        while not list(folder.glob("*tmp*")) and time.monotonic() < deadline:
            time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    announced += child.stdout.readlines()
    errors = child.stderr.read()
    child.stdout.close()
    child.stderr.close()
    assert child.wait(timeout=20) == -signal.SIGKILL, errors
    return max(int(line.removeprefix("save ")) for line in announced if line.endswith("\n"))


@pytest.mark.parametrize("size", [100, 4_000_000])
def test_sigkill_at_any_moment_leaves_a_usable_folder(tmp_path: Path, size: int) -> None:
    """Each child restores what the last one left, checks it, and goes on; size is in float32 values."""
    draw, reached = random.Random(size), 0
    for saves, delay in [(1, None), (3, draw.uniform(0, 0.3)), (4, None)]:
        last = kill_while_saving(tmp_path, size, saves, delay)
        before, reader = files_of(tmp_path), Checkpointer(tmp_path, keep_last=2)
        latest = reader.latest_step() or 0
        # When save(n) is announced, save(n - 2) had been waited for.
        assert max(reached, last - 2) <= latest <= last
        for step in reader.steps():
            raw = reader.restore_raw(step)
            np.testing.assert_array_equal(raw["params"]["w"], np.arange(size, dtype=np.float32) * 0.5 + step)
            assert raw["step"] == step and raw["ema"] == {} and reader.metadata(step) == {"at": step}
        assert files_of(tmp_path) == before
        reached = latest
    assert reached > 0
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(10_000, {"step": np.int32(0)}, {})
    assert [name for name in os.listdir(tmp_path) if not name.endswith("0")] == [], "leftovers of killed saves are swept"
