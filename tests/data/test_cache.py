"""`cache=ram`: each record is read once and no more than the limit is kept, also by threads and worker processes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskae.data.contract import Record
from maskae.data.pipeline import Pipeline
from maskae.data.sources import CachedSource, open_source
from maskae.data.spec import DataSpec
from maskae.data.transforms import make_transform
from maskae.errors import UserError


class CountedSource:
    """Twenty records of 100 bytes; notes what is read of it."""

    def __init__(self) -> None:
        self.spec = DataSpec("counted", (10, 10, 1), 1, (0.5,), (0.25,))
        self.read: list[int] = []

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Record:
        self.read.append(index)
        return {"image": np.full((10, 10, 1), index, np.uint8), "label": index}

    def name(self, index: int) -> str:
        return f"counted/{index}"


def read_batches(source: Any, count: int = 5, **arguments: int) -> list[list[int]]:
    with Pipeline(source, make_transform(()), batch_size=20, seed=0, **arguments).iterate() as batches:
        return [next(batches)["image"][:, 0, 0, 0].tolist() for _ in range(count)]


def test_every_record_is_read_once_and_batches_stay_the_same() -> None:
    parent = CountedSource()
    assert read_batches(CachedSource(parent, 2000), threads=0) == read_batches(CountedSource(), threads=0)
    assert sorted(parent.read) == list(range(20))


def test_the_limit_holds_when_threads_read_at_once() -> None:
    parent = CountedSource()
    cached = CachedSource(parent, 750)
    assert read_batches(cached, 20, threads=8) == read_batches(CountedSource(), 20, threads=0)
    assert len(cached.kept) == 7
    assert sum(record["image"].nbytes for record in cached.kept.values()) == cached.used[0] == 700
    parent.read.clear()
    read_batches(cached, 1, threads=0)
    assert sorted(parent.read) == sorted(set(range(20)) - set(cached.kept)), "what does not fit is read again"


def test_workers_have_caches_of_their_own_that_start_empty(photos: Path) -> None:
    source = open_source(f"folder:{photos}", "train", cache="ram")
    plain = open_source(f"folder:{photos}", "train")
    transform = make_transform((("resize", {"size": 8}),))
    arguments: dict[str, Any] = {"batch_size": 9, "seed": 0}
    source[0]
    assert isinstance(source, CachedSource)
    assert pickle.loads(pickle.dumps(source)).kept == {}
    with Pipeline(source, transform, workers=1, threads=0, **arguments).iterate() as batches:
        for k in range(4):
            np.testing.assert_array_equal(next(batches)["image"], Pipeline(plain, transform, **arguments).batch(k)["image"])
    assert list(source.kept) == [0], "a worker's cache is not this process's"


def test_a_caller_cannot_change_what_is_kept() -> None:
    cached = CachedSource(CountedSource(), 1e6)
    cached[3]["label"] = 99
    assert cached[3]["label"] == 3


def test_a_cache_without_room_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="cache_gigabytes must be positive, not 0"):
        open_source("digits", "train", cache="ram", cache_gigabytes=0)
