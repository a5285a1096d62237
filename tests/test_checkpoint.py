"""Checkpoints: exact values, integrity, retention, any mesh of one process; test_checkpoint_processes.py kills and moves them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from maskae import checkpoint
from maskae.checkpoint import Checkpointer, CheckpointMismatch
from maskae.errors import UserError
from maskae.manifest import MANIFEST, find_damage

pytestmark = pytest.mark.filterwarnings("error")


class Moments(NamedTuple):
    """Stands for an optimizer's state."""

    count: jax.Array
    mu: dict
    nothing: tuple
    absent: None


def make_state(step: int = 0) -> dict[str, Any]:
    kernel = jax.random.normal(jax.random.key(step), (16, 8))
    return {
        "step": jnp.int32(step),
        "params": {"encoder": {"kernel": kernel, "bias": kernel[0].astype(jnp.bfloat16)}, "flags": kernel[:, 0] > 0},
        "state": {},
        "opt": (Moments(jnp.int32(step), {"kernel": kernel * 2}, (), None), [jnp.uint8([1, 2]), {}]),
        "ema": {},
        "guard": {"skipped": np.int32(step), "table": np.arange(3, dtype=np.int32)},
    }


def abstract(tree: Any, sharding: Any = None) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def assert_same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_steps(folder: Path, steps: list[int], **retention: Any) -> None:
    with Checkpointer(folder, **{"keep_last": 100, **retention}) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), {"at": step})


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def make_mesh(*sizes: int) -> Mesh:
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, ("data", "fsdp")[: len(sizes)], axis_types=(jax.sharding.AxisType.Auto,) * len(sizes), devices=devices)


def test_round_trip_keeps_values_structure_and_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, metadata = make_state(7), {"config": {"mask_ratio": 0.75}, "list": [1, None, "é"], "empty": {}}
    monkeypatch.chdir(tmp_path)
    with Checkpointer("run/checkpoints", keep_last=1) as checkpointer:
        assert checkpointer.steps() == [] and checkpointer.latest_step() is None
        assert not Path("run").exists(), "opening must not write"
        checkpointer.save(7, state, metadata)
        metadata["config"] = "changed after the call"
    reader = Checkpointer(tmp_path / "run/checkpoints", keep_last=1)
    assert reader.steps() == [7] and reader.latest_step() == 7
    assert reader.metadata(7) == {"config": {"mask_ratio": 0.75}, "list": [1, None, "é"], "empty": {}}
    assert_same(reader.restore(7, abstract(state)), state)


def test_restore_raw_gives_numpy_of_the_wanted_part(tmp_path: Path) -> None:
    save_steps(tmp_path, [3])
    reader, state = Checkpointer(tmp_path, keep_last=1), make_state(3)
    assert_same(reader.restore_raw(3, "params"), state["params"])
    assert_same(reader.restore_raw(3, "params/encoder/bias"), state["params"]["encoder"]["bias"])
    assert reader.restore_raw(3, "ema") == {}
    assert reader.restore_raw(3, "opt/0")["nothing"] == {}
    everything = reader.restore_raw(3)
    assert_same(everything["opt"]["0"]["mu"], state["opt"][0].mu)
    assert everything["state"] == {} and everything["opt"]["1"]["1"] == {}
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(everything))
    with pytest.raises(UserError, match=r"no params/encodr \(did you mean 'encoder'\?\)"):
        reader.restore_raw(3, "params/encodr")
    with pytest.raises(UserError, match="no step/more"):
        reader.restore_raw(3, "step/more")


@pytest.mark.parametrize("sharded", [False, True])
def test_saved_values_are_those_at_the_call_though_the_buffers_are_donated(tmp_path: Path, sharded: bool) -> None:
    state = {"w": jnp.full((1024, 2048), 1.0), "count": jnp.int32(0)}
    if sharded:
        state["w"] = jax.device_put(state["w"], NamedSharding(make_mesh(2, 4), PartitionSpec("fsdp")))
    host = np.zeros(1000, np.float32)
    advance = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    with Checkpointer(tmp_path, keep_last=10) as checkpointer:
        for step in range(4):
            checkpointer.save(step, {**state, "host": host}, {})
            old, state = state, advance(state)
            host += 1
            # The CPU backend does not donate a buffer that somebody still reads; an accelerator would.
            jax.tree.map(lambda leaf: leaf.delete(), old)
            state = advance(state)
    for step in range(4):
        saved = Checkpointer(tmp_path, keep_last=1).restore_raw(step)
        np.testing.assert_array_equal(saved["w"], 1 + 2 * step)
        np.testing.assert_array_equal(saved["host"], step)
        assert saved["count"] == 2 * step


def test_save_returns_before_the_step_is_complete_and_the_old_step_stays_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release, write = threading.Event(), checkpoint.write_manifest
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(1, make_state(1), {})
        checkpointer.wait()
        monkeypatch.setattr(checkpoint, "write_manifest", lambda folder: release.wait(20) and write(folder))
        checkpointer.save(2, make_state(2), {})
        while not (tmp_path / "2").exists():
            time.sleep(0.01)
        assert checkpointer.steps() == [1] and checkpointer.latest_step() == 1
        assert lines(caplog) == [], "a save under way is no damage"
        assert_same(checkpointer.restore(1, abstract(make_state())), make_state(1))
        release.set()
        checkpointer.wait()
        assert checkpointer.steps() == [2]
    assert not (tmp_path / "1").exists()


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow beyond 32 KiB: writing fails in the operating system as on a full disk."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("through", ["wait", "save", "close"])
def test_failed_save_raises_at_the_next_call_and_the_folder_stays_usable(tmp_path: Path, through: str) -> None:
    big = {"w": jnp.arange(100_000.0)}
    checkpointer = Checkpointer(tmp_path, keep_last=1)
    checkpointer.save(1, big, {})
    checkpointer.wait()
    with full_disk():
        checkpointer.save(2, big, {})
        with pytest.raises(UserError, match=f"saving step 2 to {tmp_path} failed"):
            checkpointer.save(3, big, {}) if through == "save" else getattr(checkpointer, through)()
    assert checkpointer.latest_step() == 1
    checkpointer.save(2, big, {})
    checkpointer.wait()
    assert checkpointer.steps() == [2]
    with full_disk(), pytest.raises(UserError, match="saving step 3"):
        checkpointer.save(3, big, {})
        checkpointer.wait()
    checkpointer.save(4, big, {})
    checkpointer.close()
    assert os.listdir(tmp_path) == ["4"], "what the failed save left is gone"


def test_error_in_the_block_is_not_hidden_by_a_failed_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ZeroDivisionError), full_disk(), Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(1, {"w": jnp.arange(100_000.0)}, {})
        raise ZeroDivisionError
    assert any("saving step 1 failed too" in line for line in lines(caplog))


def test_retention_keeps_the_last_n_and_every_nth(tmp_path: Path) -> None:
    save_steps(tmp_path, list(range(10, 70, 5)), keep_last=2, keep_every_steps=20)
    assert Checkpointer(tmp_path, keep_last=1).steps() == [20, 40, 60, 65]
    save_steps(tmp_path, [70], keep_last=1)
    assert sorted(os.listdir(tmp_path)) == ["70"]
    for bad in ({"keep_last": 0}, {"keep_last": 1, "keep_every_steps": 0}):
        with pytest.raises(UserError, match="at least 1"):
            Checkpointer(tmp_path, **bad)


def test_retention_does_not_count_a_damaged_step(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 3])
    for step in (2, 3):
        (tmp_path / f"{step}/state/manifest.ocdbt").unlink()
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        assert checkpointer.latest_step() == 1
        checkpointer.restore(1, abstract(make_state()))
        checkpointer.save(2, make_state(2), {})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2, 3] and find_damage(checkpointer._folder / "2") is None
        checkpointer.save(4, make_state(4), {})
    assert checkpointer.steps() == [2, 4] and checkpointer.latest_step() == 4


def test_existing_step_of_another_run_is_never_overwritten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(tmp_path, [5])
    before = snapshot(tmp_path)
    other = Checkpointer(tmp_path, keep_last=1)
    with pytest.raises(UserError, match="already has a step 5"):
        other.save(5, make_state(6), {})
    other.restore(5, abstract(make_state()))
    other.save(5, make_state(5), {"again": True})
    other.wait()
    assert snapshot(tmp_path) == before, "the step that was restored is the same one and is not written again"
    (tmp_path / "5" / MANIFEST).write_bytes(b"{")
    with Checkpointer(tmp_path, keep_last=1) as third:
        third.save(5, make_state(50), {})
    assert any("step 5" in line and "is replaced" in line and MANIFEST in line for line in lines(caplog))
    assert_same(third.restore(5, abstract(make_state())), make_state(50))


def test_folder_that_maskae_did_not_write_is_moved_away_not_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ocp.save(tmp_path / "6", {"w": jnp.ones(3)})
    save_steps(tmp_path, [6])
    (moved,) = tmp_path.glob("6.moved-away-*")
    np.testing.assert_array_equal(ocp.load(moved, {"w": np.ndarray})["w"], np.ones(3))
    assert any("step 6" in line and "is replaced" in line for line in lines(caplog))
    assert Checkpointer(tmp_path, keep_last=1).latest_step() == 6


def damage_file(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["missing", "truncated", "flipped"])
def test_damaged_step_is_passed_over_with_a_line_that_names_step_and_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    save_steps(tmp_path, [1, 2])
    reader, step = Checkpointer(tmp_path, keep_last=1), tmp_path / "2"
    assert reader.latest_step() == 2
    for path in sorted(p for p in step.rglob("*") if p.is_file() and p.name != MANIFEST and p.stat().st_size):
        good = path.read_bytes()
        damage_file(path, kind)
        caplog.clear()
        assert reader.latest_step() == 1
        (line,) = lines(caplog)
        assert "step 2" in line and "passed over" in line and path.relative_to(step).as_posix() in line
        with pytest.raises(UserError, match=r"step 2 .*damaged"):
            reader.restore(2, abstract(make_state()))
        path.write_bytes(good)
    assert reader.latest_step() == 2
    (step / MANIFEST).unlink()
    caplog.clear()
    assert reader.latest_step() == 1 and MANIFEST in lines(caplog)[0] and reader.steps() == [1]
    assert_same(reader.restore(1, abstract(make_state())), make_state(1))


@pytest.mark.parametrize(
    "content", [b"", b"\xff\x00", b"[]", b'{"files": []}', b'{"files": {"a": {}}}', b'{"files": {"a": {"size": 1, "sha256": ""}}}']
)
def test_unreadable_manifest_is_damage(tmp_path: Path, content: bytes) -> None:
    save_steps(tmp_path, [1])
    (tmp_path / "1" / MANIFEST).write_bytes(content)
    assert Checkpointer(tmp_path, keep_last=1).latest_step() is None


def test_mismatch_lists_every_differing_leaf_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, [1])
    before, reader, target = snapshot(tmp_path), Checkpointer(tmp_path, keep_last=1), abstract(make_state())
    target["params"]["encoder"]["kernel"] = jax.ShapeDtypeStruct((16, 9), jnp.float32)
    target["params"]["encoder"]["bias"] = jax.ShapeDtypeStruct((8,), jnp.float32)
    target["params"]["head"] = {"bias": jax.ShapeDtypeStruct((3,), jnp.float32)}
    target["opt"] = (target["opt"][0]._replace(mu={}), target["opt"][1])
    monkeypatch.setattr(ocp, "load", lambda *_, **__: pytest.fail("arrays were loaded"))
    with pytest.raises(CheckpointMismatch) as caught:
        reader.restore(1, target)
    assert caught.value.differences == [
        "opt/0/mu/kernel: not in the model, the checkpoint has float32[16, 8]",
        "params/encoder/bias: dtype bfloat16 in the checkpoint, float32 in the model",
        "params/encoder/kernel: shape [16, 8] in the checkpoint, [16, 9] in the model",
        "params/head/bias: not in the checkpoint, the model wants float32[3]",
    ]
    assert isinstance(caught.value, UserError) and all(line in str(caught.value) for line in caught.value.differences)
    assert snapshot(tmp_path) == before


def test_dtype_is_cast_only_when_asked(tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    reader, target = Checkpointer(tmp_path, keep_last=1), abstract(make_state())
    target["params"]["encoder"]["kernel"] = jax.ShapeDtypeStruct((16, 8), jnp.bfloat16)
    with pytest.raises(CheckpointMismatch, match="dtype float32 in the checkpoint, bfloat16 in the model"):
        reader.restore(1, target)
    kernel = reader.restore(1, target, allow_cast=True)["params"]["encoder"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel, make_state(1)["params"]["encoder"]["kernel"].astype(jnp.bfloat16))


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (2, 4), (8, 1)])
def test_restores_onto_another_mesh_of_one_process(tmp_path: Path, sizes: tuple[int, int]) -> None:
    kernel = jax.random.normal(jax.random.key(0), (16, 8))
    for step, mesh in enumerate([make_mesh(1, 8), make_mesh(1, 1)]):
        with Checkpointer(tmp_path, keep_last=9) as checkpointer:
            checkpointer.save(step, {"kernel": jax.device_put(kernel, NamedSharding(mesh, PartitionSpec("fsdp")))}, {})
        wanted = NamedSharding(make_mesh(*sizes), PartitionSpec("data", "fsdp"))
        restored = checkpointer.restore(step, {"kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=wanted)})["kernel"]
        assert restored.sharding == wanted and len(restored.addressable_shards) == np.prod(sizes)
        np.testing.assert_array_equal(restored, kernel)


def test_only_a_save_sweeps_and_only_what_is_ours(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 3])
    (tmp_path / "2" / MANIFEST).unlink()
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "notes.orbax-checkpoint-tmp").mkdir()
    ocp.save(tmp_path / "9", {"w": jnp.ones(3)})
    before = sorted(os.listdir(tmp_path))
    reader = Checkpointer(tmp_path, keep_last=1)
    assert reader.latest_step() == 3 and reader.steps() == [1, 3] and sorted(os.listdir(tmp_path)) == before
    save_steps(tmp_path, [5])
    assert sorted(os.listdir(tmp_path)) == ["1", "3", "5", "9", "notes.orbax-checkpoint-tmp"]


def delete_interrupted(folder: epath.Path, operations: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Deletes a step, interrupted before its operation number `operations`; returns the names of what went, in order."""
    done: list[str] = []

    def counted(operation: Callable[..., None]) -> Callable[..., None]:
        def run(path: epath.Path, *args: Any, **kwargs: Any) -> None:
            if len(done) == operations:
                raise KeyboardInterrupt
            done.append(path.name)
            operation(path, *args, **kwargs)

        return run

    for name in ("unlink", "rmtree"):
        patch.setattr(type(folder), name, counted(getattr(type(folder), name)))
    with contextlib.suppress(KeyboardInterrupt):
        checkpoint._delete(folder)
    return done


def test_interrupted_deletion_leaves_a_step_known_as_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, [1])
    for operations in range(1, 6):
        copy = epath.Path(shutil.copytree(tmp_path / "1", tmp_path / f"copy{operations}"))
        with monkeypatch.context() as patch:
            done = delete_interrupted(copy, operations, patch)
        assert done[0] == MANIFEST
        assert not copy.exists() or checkpoint._read_record(copy) is not None
    assert not copy.exists(), "the last round was not interrupted"


@contextlib.contextmanager
def without_rights(folder: Path) -> Iterator[None]:
    """The folder cannot be written; root is not held back by modes, so it acts as nobody."""
    folder.chmod(0o500)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o700)


def test_unusable_folders_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^the checkpoint folder .*file is a file$"):
        Checkpointer(tmp_path / "file", keep_last=1)
    with pytest.raises(UserError, match=r"^cannot write the checkpoint folder"):
        Checkpointer(tmp_path / "file/inside", keep_last=1).save(1, make_state(), {})
    (tmp_path / "kept").mkdir()
    with without_rights(tmp_path / "kept"), pytest.raises(UserError, match=r"^cannot (read|write) the checkpoint folder .*denied"):
        Checkpointer(tmp_path / "kept", keep_last=1).save(1, make_state(), {})
    reader = Checkpointer(tmp_path / "nowhere", keep_last=1)
    assert reader.steps() == [] and reader.latest_step() is None
    for call in (reader.metadata, reader.restore_raw, lambda step: reader.restore(step, {})):
        with pytest.raises(UserError, match=r"no complete checkpoint of step 3 .* steps there: none"):
            call(3)


def test_leaves_that_cannot_be_stored_are_named(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep_last=1)
    for leaf in (1.0, "text", jax.random.key(0), jnp.zeros((0, 3))):
        with pytest.raises(TypeError, match="checkpoint leaf params/x "):
            checkpointer.save(1, {"params": {"x": leaf}}, {})
    with pytest.raises(ValueError, match="same path name"):
        checkpointer.save(1, {"a.b": jnp.ones(1), "a": {"b": jnp.zeros(1)}}, {})
    with pytest.raises(TypeError, match="JSON"):
        checkpointer.save(1, make_state(), {"path": tmp_path})
    assert os.listdir(tmp_path) == []


def test_orbax_does_not_fill_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.INFO)
    try:
        save_steps(tmp_path, [1])
        Checkpointer(tmp_path, keep_last=1).restore(1, abstract(make_state()))
        absl.logging.info("of somebody else")
    finally:
        absl.logging.set_verbosity(verbosity)
    assert lines(caplog, logging.INFO) == ["of somebody else"]


def test_manifest_covers_every_file(tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    files = {p.relative_to(tmp_path / "1").as_posix() for p in (tmp_path / "1").rglob("*") if p.is_file()}
    assert set(json.loads((tmp_path / "1" / MANIFEST).read_text())["files"]) == files - {MANIFEST}
