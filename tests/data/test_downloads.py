"""Published files: fetched whole or not at all, by many at once, unpacked safely, and only where a run needs them."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pytest
from served import Served

from maskae.config import check, default_config, load_config
from maskae.data import downloads
from maskae.data.downloads import Published, checksum_of, provide
from maskae.data.sources import open_source
from maskae.errors import UserError
from maskae.main import main
from maskae.merging import stage_config
from maskae.planning.chips import parse_topology
from maskae.planning.plan import planned_experiment
from maskae.run_sources import open_or_assume, open_sources

ROOT = Path(__file__).parent.parent.parent
CONTENT = bytes(range(256)) * 1024


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def published(served: Served, path: Path, content: bytes = CONTENT, **options: bool) -> Published:
    """`content` as served under the name of `path`."""
    served.files[path.name] = content
    return Published(path, served.url(path.name), sha256(content), **options)


def left(folder: Path) -> list[str]:
    """All files and folders below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def one_line(file: Published, **options: bool) -> str:
    with pytest.raises(UserError) as caught:
        provide(file, "npz:a.npz", **options)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("npz:a.npz: ")
    return str(caught.value)


def test_a_missing_file_is_fetched_once(tmp_path: Path, served: Served) -> None:
    file = published(served, tmp_path / "deep" / "a.bin")
    for _ in range(2):
        provide(file, "npz:a.npz")
    assert file.path.read_bytes() == CONTENT
    assert (left(tmp_path), served.asked) == (["deep", "deep/a.bin"], ["a.bin"])


def test_what_is_there_is_left_alone(tmp_path: Path, served: Served) -> None:
    for place, unpacked in (("a.bin", False), ("folder", True)):
        (tmp_path / place).write_text("mine")
        provide(published(served, tmp_path / place, unpacked=unpacked), "npz:a.npz")
        assert (tmp_path / place).read_text() == "mine"
    assert not served.asked


def test_a_wrong_checksum_names_both_and_leaves_nothing(tmp_path: Path, served: Served) -> None:
    file = published(served, tmp_path / "a.bin")
    served.files["a.bin"] = CONTENT[:-1] + b"x"
    said = one_line(file)
    assert file.url in said and file.checksum in said and sha256(served.files["a.bin"]) in said
    assert not left(tmp_path)


def test_answers_that_end_early_and_missing_servers_name_file_place_and_address(tmp_path: Path, served: Served) -> None:
    file = published(served, tmp_path / "a.bin")
    served.claimed = 100
    said = [one_line(file)]
    assert f"ended after {len(CONTENT)} of {len(CONTENT) + 100} bytes" in said[0]
    served.files.clear()
    said.append(one_line(file))
    assert "404" in said[1]
    nobody = Published(file.path, "http://127.0.0.1:9/a.bin", file.checksum)
    said.append(one_line(nobody))
    for line, each in zip(said, (file, file, nobody), strict=True):
        assert str(each.path) in line and each.url in line
    assert not left(tmp_path)
    (tmp_path / "plain").write_text("no folder")
    assert "cannot be fetched" in one_line(published(served, tmp_path / "plain" / "a.bin"))


def test_checksums_are_sha256_or_gits_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello\n")
    assert checksum_of(tmp_path / "a", "0" * 40) == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert checksum_of(tmp_path / "a", "0" * 64) == sha256(b"hello\n")


def tar_of(members: dict[str, bytes], links: dict[str, str] | None = None, mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return buffer.getvalue()


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("pack", [zip_of, tar_of, lambda members: tar_of(members, mode="w"), lambda members: tar_of(members, mode="w:xz")])
def test_archives_are_unpacked_into_their_folder(tmp_path: Path, served: Served, pack) -> None:
    members = {"train/a.txt": b"a", "labels.csv": b"file,label", "inner.zip": zip_of({"b": b"b"})}
    file = published(served, tmp_path / "photos", pack(members), unpacked=True)
    provide(file, "folder:photos")
    provide(file, "folder:photos")
    assert {str(path.relative_to(file.path)): path.read_bytes() for path in file.path.rglob("*") if path.is_file()} == members
    assert [path.name for path in tmp_path.iterdir()] == ["photos"] and served.asked == ["photos"]


@pytest.mark.parametrize(
    "content",
    [
        tar_of({"a.txt": b"a", "../evil.txt": b"evil"}),
        tar_of({"a.txt": b"a"}, links={"out": "../.."}),
        zip_of({"a.txt": b"a", "b/../../evil.txt": b"evil"}),
        zip_of({"a.txt": b"a", "/evil.txt": b"evil"}),
        b"neither zip nor tar",
        tar_of({"a.txt": os.urandom(5000)})[:-500],
    ],
)
def test_archives_that_leave_their_folder_or_are_none_are_refused_whole(tmp_path: Path, served: Served, content: bytes) -> None:
    file = published(served, tmp_path / "root" / "photos", content, unpacked=True)
    said = one_line(file)
    assert f"{file.url} cannot be unpacked to {file.path}: " in said
    assert left(tmp_path) == ["root"]


FETCH = """
import sys
from pathlib import Path
from maskae.data.downloads import Published, provide
provide(Published(Path(sys.argv[1]), sys.argv[2], sys.argv[3], unpacked=sys.argv[4] == "True"), "npz:a.npz")
"""


def start(file: Published) -> subprocess.Popen[bytes]:
    """A process that provides `file`."""
    return subprocess.Popen([sys.executable, "-c", FETCH, str(file.path), file.url, file.checksum, str(file.unpacked)], cwd=ROOT)


@pytest.mark.parametrize("unpacked", [False, True])
def test_processes_and_threads_at_once_fetch_once_and_see_no_half_file(tmp_path: Path, served: Served, unpacked: bool) -> None:
    file = published(served, tmp_path / "a", zip_of({"b": CONTENT}) if unpacked else CONTENT, unpacked=unpacked)
    served.gate.clear()
    processes = [start(file) for _ in range(2)]
    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(provide, file, "npz:a.npz") for _ in range(3)]
        assert served.halfway.acquire(timeout=60)
        assert not file.path.exists()
        served.gate.set()
        for result in results:
            result.result(60)
    assert [process.wait(60) for process in processes] == [0, 0]
    assert (file.path / "b" if unpacked else file.path).read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and served.asked == ["a"]


def test_hosts_that_share_a_disk_do_not_write_into_each_others_files(
    tmp_path: Path, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = published(served, tmp_path / "a")
    monkeypatch.setattr(downloads.platform, "node", lambda: threading.current_thread().name)
    served.gate.clear()
    with ThreadPoolExecutor(2, thread_name_prefix="host") as pool:
        results = [pool.submit(provide, file, "npz:a.npz") for _ in range(2)]
        assert all(served.halfway.acquire(timeout=60) for _ in range(2)) and not file.path.exists()
        assert len(list(tmp_path.iterdir())) == 2
        served.gate.set()
        for result in results:
            result.result(60)
    assert file.path.read_bytes() == CONTENT and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_after_a_killed_process_nothing_looks_whole_and_the_next_one_starts_anew(tmp_path: Path, served: Served) -> None:
    file = published(served, tmp_path / "a", zip_of({"b": CONTENT}), unpacked=True)
    served.gate.clear()
    process = start(file)
    assert served.halfway.acquire(timeout=60)
    process.kill()
    process.wait(60)
    assert not file.path.exists() and len(list(tmp_path.iterdir())) == 1
    (tmp_path / next(tmp_path.iterdir()).name.replace(".partial", ".unpacked")).mkdir()  # as of a process killed while it unpacked
    served.gate.set()
    provide(file, "folder:a")
    assert left(tmp_path) == ["a", "a/b"] and (file.path / "b").read_bytes() == CONTENT


def test_sources_open_from_what_a_config_says_and_dry_runs_and_plans_fetch_nothing(
    tmp_path: Path, photos: Path, served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    served.files["photos.zip"] = zip_of({str(path.relative_to(photos)): path.read_bytes() for path in photos.rglob("*.*")})
    entry = ("sets/pets/", served.url("photos.zip"), sha256(served.files["photos.zip"]))
    keys = [f"data.root={tmp_path / 'data'}", "data.source=folder:sets/pets", f"data.downloads={(entry,)}"]
    assert main(["--config", str(ROOT / "configs/mae.py:small"), "--dry_run", *(f"--config.{key}" for key in keys)]) == 2
    assert f"sets/pets is not there; a run fetches it from {entry[1]}" in capsys.readouterr().err
    config = load_config(str(ROOT / "configs/mae.py:small"), [*keys, "data.examples=27"])
    assert len(open_or_assume(config)[0]) == 27
    with config.unlocked():
        config.data.examples = 0
    with pytest.raises(UserError, match="a run fetches it"):
        planned_experiment(config, parse_topology("h100:8"))
    assert not served.asked and not (tmp_path / "data").exists()
    train, val = open_sources(config)
    assert (len(train), len(val), train.spec.class_names) == (27, 3, ("cat", "dog")) and served.asked == ["photos.zip"]
    assert len(open_or_assume(config)[0]) == 27


def test_the_recipe_on_a_published_volume_fetches_the_volume_and_its_mask(tmp_path: Path, served: Served) -> None:
    config = load_config(str(ROOT / "configs/spark_medical.py:published"), [f"data.root={tmp_path}"])
    assert len(open_or_assume(config)[0]) == 1242 and not left(tmp_path)
    mask = np.zeros((20, 20, 40), np.uint8)
    mask[5:15, 5:15] = 3
    volume = np.random.default_rng(0).integers(-1000, 1000, mask.shape).astype(np.int16)
    for (place, url, _), values in zip(config.data.downloads, (volume, mask), strict=True):
        assert url.startswith("https://raw.githubusercontent.com/wasserth/TotalSegmentator/")
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / Path(place).name)
        served.files[place] = (tmp_path / Path(place).name).read_bytes()
    with config.unlocked():
        config.data.downloads = tuple((place, served.url(place), sha256(content)) for place, content in served.files.items())
    train = open_sources(config)[0]
    assert (len(train), train.spec.class_names) == (30, ("organ 3",))


def test_places_start_at_the_root_or_the_environment_or_here(tmp_path: Path, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, images=np.random.default_rng(0).integers(0, 255, (20, 4, 4, 3), np.uint8), labels=np.arange(20) % 2)
    served.files["a.npz"] = buffer.getvalue()
    entries = [("sets/a.npz", served.url("a.npz"), sha256(buffer.getvalue()))]
    for folder in ("root", "environment", "here"):
        (tmp_path / folder).mkdir()
    monkeypatch.delenv("MASKAE_DATA", raising=False)
    monkeypatch.chdir(tmp_path / "here")
    open_source("npz:sets/a.npz", "train", downloads=entries)
    monkeypatch.setenv("MASKAE_DATA", str(tmp_path / "environment"))
    open_source("npz:sets/a.npz", "train", downloads=entries)
    open_source("npz:sets/a.npz", "train", root=str(tmp_path / "root"), downloads=entries)
    assert all((tmp_path / folder / "sets/a.npz").is_file() for folder in ("root", "environment", "here")) and len(served.asked) == 3
    with pytest.raises(UserError, match="data.downloads are put into folders on disk, not into gs://bucket/a"):
        open_source("arrayrecord:a", "train", root="gs://bucket", downloads=entries)


ENTRY = ("a.npz", "https://example.org/a.npz", "0" * 64)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("a.npz", r"'a.npz' is not \(place, URL, SHA-256\)"),
        (ENTRY[:2], r"\(.*\) is not \(place, URL, SHA-256\)"),
        (("../a.npz", *ENTRY[1:]), "'../a.npz' must be a place below the data root"),
        (("/a.npz", *ENTRY[1:]), "'/a.npz' must be a place below the data root"),
        (("~/a.npz", *ENTRY[1:]), "'~/a.npz' must be a place below the data root"),
        (("", *ENTRY[1:]), "'' must be a place below the data root"),
        ((ENTRY[0], "file:///a.npz", ENTRY[2]), "a.npz: 'file:///a.npz' must begin with https:// or http://"),
        ((*ENTRY[:2], "0" * 40), "a.npz: '0{40}' is no SHA-256"),
    ],
)
def test_wrong_entries_are_named_before_anything_else(entry: object, said: str) -> None:
    config = default_config()
    config.data.downloads = (entry,)
    with pytest.raises(UserError, match=f"data.downloads: {said}"):
        check(config)


def test_another_source_clears_what_a_recipe_fetches(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from maskae.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        f"    config.data.source, config.data.downloads = 'npz:a.npz', ({ENTRY},)\n"
        "    config.stages = ('first', 'second', 'third')\n"
        f"    third = {{'source': 'npz:c.npz', 'downloads': ({ENTRY}, {ENTRY})}}\n"
        "    config.stage = {'first': {}, 'second': {'data': {'source': 'npz:b.npz'}}, 'third': {'data': third}}\n"
        "    return config\n"
    )

    def counts(*overrides: str) -> list[int]:
        config = load_config(str(recipe), overrides)
        return [len(config.data.downloads), *(len(stage_config(config, stage).data.downloads) for stage in config.stages)]

    assert counts("data.root=elsewhere") == [1, 1, 0, 2]
    assert counts("data.source=folder:mine") == [0, 0, 0, 2]
    assert counts("data.source=folder:mine", f"data.downloads={(ENTRY,) * 3}") == [3, 3, 0, 2]
    assert counts("stage.third.data.source=folder:mine") == [1, 1, 0, 0]
    assert counts("stage.first.data.source=folder:mine", f"stage.second.data.downloads={(ENTRY,)}") == [1, 0, 1, 2]
