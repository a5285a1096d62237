"""Shards in a bucket: fetched when needed, checked, shared, bounded; a stand-in for gs:// keeps its files in memory."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from maskae.data import remote
from maskae.data.pipeline import Pipeline
from maskae.data.sources import open_source
from maskae.data.transforms import make_transform
from maskae.errors import UserError
from tools import prepare_data


class Bucket(MemoryFileSystem):
    """gs:// in memory; notes the shards that are opened."""

    protocol = "gs"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    opened: list[str] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("gs://").strip("/")

    def _open(self, path: str, *arguments: Any, **options: Any) -> Any:
        self.opened.append(path.rpartition("/")[2])
        return super()._open(path, *arguments, **options)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits in six shards of at most 300."""
    folder = tmp_path_factory.mktemp("prepared") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "RECORDS_PER_SHARD", 300)
        assert prepare_data.main(["--source=digits", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def bucket(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> type[Bucket]:
    monkeypatch.setitem(_registry, "gs", Bucket)
    Bucket.store.clear()
    system = Bucket(skip_instance_cache=True)
    for path in prepared.iterdir():
        system.pipe_file(f"/photos/digits/{path.name}", path.read_bytes())
    Bucket.opened.clear()
    monkeypatch.setattr(remote, "FETCH_PAUSE_SECONDS", 0.0)
    return Bucket


def opened(folder: Path, split: str = "train", source: str = "arrayrecord:gs://photos/digits", **options: Any) -> Any:
    return open_source(source, split, shard_folder=str(folder), **options)


def test_records_equal_those_on_disk_and_shards_come_when_asked_for(bucket: type[Bucket], prepared: Path, tmp_path: Path) -> None:
    local = open_source(f"arrayrecord:{prepared}", "train")
    source = opened(tmp_path / "shards")
    assert len(source) == len(local) == 1437
    assert source.spec == local.spec.__class__(**{**vars(local.spec), "name": source.spec.name})
    assert bucket.opened == []
    for index in (0, 299, 300, 1436):
        assert source[index] == local[index]
        assert source.name(index).partition(" record")[2] == local.name(index).partition(" record")[2]
    assert bucket.opened == [f"train-{shard:05d}-of-00005.arrayrecord" for shard in (0, 1, 4)]
    with pytest.raises(IndexError):
        source[1437]
    assert pickle.loads(pickle.dumps(source))[700] == local[700]
    again = opened(tmp_path / "shards", source="arrayrecord:digits", root="gs://photos/")
    assert again[301] == local[301]
    assert len(bucket.opened) == 4, "the second source finds the first one's copies"


def test_the_pipeline_reads_a_bucket_in_threads(bucket: type[Bucket], prepared: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"batch_size": 32, "seed": 0}
    wanted = Pipeline(open_source(f"arrayrecord:{prepared}", "train"), make_transform(()), **arguments)
    with Pipeline(opened(tmp_path), make_transform(()), threads=4, **arguments).iterate() as batches:
        for k in range(4):
            np.testing.assert_array_equal(next(batches)["image"], wanted.batch(k)["image"])
    assert sorted(bucket.opened) == sorted(set(bucket.opened)), "a shard is fetched once, whichever thread asks first"
    assert not list(tmp_path.glob("*.partial"))


def test_the_folder_is_bounded_and_the_oldest_go_first(bucket: type[Bucket], prepared: Path, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in prepared.glob("train-*"))
    train = opened(tmp_path, shard_gigabytes=size / 1e9)
    for index in range(0, 1437, 300):
        train[index]
    first = train.shards[0].sha256
    assert {path.stem for path in tmp_path.glob("*.arrayrecord")} == {shard.sha256 for shard in train.shards}
    val = opened(tmp_path, "val", shard_gigabytes=size / 1e9)
    val[0]
    left = {path.stem for path in tmp_path.glob("*.arrayrecord")}
    assert first not in left
    assert {shard.sha256 for shard in val.shards if shard.records == 300} <= left
    assert sum(path.stat().st_size for path in tmp_path.glob("*.arrayrecord")) <= size
    assert train[5]["label"] == pickle.loads(pickle.dumps(train))[5]["label"], "an open copy is read on, a removed one fetched again"
    with pytest.raises(UserError, match=r"the shards of split 'train' take .* GB on the local disk, more than shard_gigabytes="):
        opened(tmp_path, shard_gigabytes=(size - 1) / 1e9)


def test_a_damaged_shard_is_never_read(bucket: type[Bucket], tmp_path: Path) -> None:
    name = "/photos/digits/train-00001-of-00005.arrayrecord"
    data = bytearray(bucket().cat_file(name))
    data[len(data) // 2] ^= 1
    bucket().pipe_file(name, bytes(data))
    source = opened(tmp_path)
    with pytest.raises(
        UserError, match=r"gs://photos/digits/train-00001-of-00005.arrayrecord cannot be fetched: its SHA-256 is not the one"
    ):
        source[300]
    assert not list(tmp_path.glob("*.arrayrecord")) + list(tmp_path.glob("*.partial"))
    pipeline = Pipeline(source, make_transform(()), batch_size=64, seed=0)
    with pipeline.iterate() as batches, pytest.raises(UserError, match="cannot be fetched"):
        next(batches)


def test_a_fault_of_the_network_is_tried_again(bucket: type[Bucket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, faults = bucket._open, [ConnectionResetError("reset by peer\nlong trace"), TimeoutError()]
    own = threading.get_ident()

    def faulty(self: Bucket, *arguments: Any, **options: Any) -> Any:
        # A reader that an earlier test closed may still end its last fetch: the faults are for this test's own.
        if faults and threading.get_ident() == own:
            raise faults.pop()
        return plain(self, *arguments, **options)

    source = opened(tmp_path)
    monkeypatch.setattr(bucket, "_open", faulty)
    assert source[0]["label"] >= 0
    faults.extend(ConnectionResetError("reset by peer\nlong trace") for _ in range(remote.FETCH_ATTEMPTS))
    with pytest.raises(UserError, match="cannot be fetched: ConnectionResetError: reset by peer$"):
        source[300]


def test_a_half_copied_shard_of_a_killed_process_is_made_anew(bucket: type[Bucket], prepared: Path, tmp_path: Path) -> None:
    source = opened(tmp_path)
    target = tmp_path / f"{source.shards[0].sha256}.arrayrecord"
    target.with_suffix(".partial").write_bytes(b"half")
    target.write_bytes(b"cut off")
    assert source[0] == open_source(f"arrayrecord:{prepared}", "train")[0]
    assert not target.with_suffix(".partial").exists()


PROCESS = """
import sys
from maskae.data.sources import open_source
source = open_source("arrayrecord:file://" + sys.argv[1], "train", shard_folder=sys.argv[2])
print([source[i]["label"] for i in (0, 300, 600, 900, 1200)])
"""


def test_processes_share_the_copies(prepared: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(prepared), str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) for _ in range(2)]
    said = {process.communicate(timeout=60)[0] for process in running}
    local = open_source(f"arrayrecord:{prepared}", "train")
    assert said == {f"{[local[i]['label'] for i in (0, 300, 600, 900, 1200)]}\n"}
    assert len(list(tmp_path.glob("*.arrayrecord"))) == 5


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("arrayrecord:gs://photos/digit", {}, "no spec.json in gs://photos/digit: make the folder with tools/prepare_data.py"),
        ("arrayrecord:gs://photos/digits", {"channels": 3}, "prepared with 1 channels, not 3"),
        ("arrayrecord:gs://photos/digits", {"shard_gigabytes": 0}, "shard_gigabytes must be positive"),
        ("arrayrecord:zz://photos/digits", {}, "Protocol not known: zz"),
        ("folder:gs://photos/digits", {}, "only arrayrecord: reads gs://photos/digits; tools/prepare_data.py makes its shards"),
    ],
)
def test_what_is_wrong_is_one_clear_line(bucket: type[Bucket], tmp_path: Path, source: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_source(source, "train", **{"shard_folder": str(tmp_path), **options})
    assert "\n" not in str(caught.value)


def test_a_missing_list_a_missing_split_and_a_locked_bucket_are_clear(
    bucket: type[Bucket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = json.loads(bucket().cat_file("/photos/digits/shards.json"))
    bucket().pipe_file("/photos/digits/shards.json", json.dumps({k: v for k, v in listed.items() if k.startswith("val")}).encode())
    with pytest.raises(UserError, match="no shards of split 'train' in gs://photos/digits, which has train, val"):
        opened(tmp_path)
    bucket().rm_file("/photos/digits/shards.json")
    with pytest.raises(UserError, match=r"no shards.json in gs://photos/digits: make the folder with tools/prepare_data.py"):
        opened(tmp_path)

    def refuse(*_: Any, **__: Any) -> bytes:
        raise PermissionError("401: Anonymous caller does not have storage.objects.get access\nto the bucket")

    monkeypatch.setattr(bucket, "cat_file", refuse)
    with pytest.raises(UserError, match="gs://photos/digits/spec.json cannot be read: PermissionError: 401: Anonymous caller .* access$"):
        opened(tmp_path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"reading gs:// needs the package gcsfs \(pip install 'maskae\[tpu\]'\)"):
        open_source("arrayrecord:gs://photos/digits", "train")
