"""The order of the data does not depend on hosts, threads, processes or where a run resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from maskae.data import images
from maskae.data.contract import Record, Source
from maskae.data.images import Picture
from maskae.data.pipeline import Batch, Pipeline, evaluation_batches, generator
from maskae.data.sources import ArraySource, open_source
from maskae.data.spec import IMAGE, INDEX, VALID, BadRecord, DataSpec
from maskae.data.transforms import make_transform
from maskae.errors import UserError

STEPS = (("random_resized_crop", {"size": 8}), ("color_jitter", {"brightness": 0.4}))


class FaultySource:
    """Twenty 6x6 images of which the given ones are broken."""

    def __init__(self, broken: tuple[int, ...], count: int = 20):
        self.broken, self.count = broken, count
        self.spec = DataSpec("faulty", (6, 6, 1), 1, (0.5,), (0.25,))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        if index in self.broken:
            raise BadRecord("no end")
        return {"image": np.full((6, 6, 1), index, np.uint8), "label": index}

    def name(self, index: int) -> str:
        return f"faulty/{index}.jpg"


def tiny_source(count: int = 10) -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int32)
    return ArraySource(pixels, labels, labels, DataSpec("tiny", (12, 12, 3), 3, (0.5,) * 3, (0.25,) * 3))


def pipeline(source: Source | None = None, **arguments: int | bool | float) -> Pipeline:
    return Pipeline(source or tiny_source(), make_transform(STEPS), **({"batch_size": 4, "seed": 3} | arguments))  # type: ignore[arg-type]


def assert_equal(got: Batch, want: Batch) -> None:
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])
        assert got[name].dtype == want[name].dtype


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_slices_of_hosts_make_up_the_global_batch(hosts: int) -> None:
    whole = pipeline().batch(5)
    parts = [pipeline(process_index=h, process_count=hosts).batch(5) for h in range(hosts)]
    assert_equal({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)
    assert whole["example"].tolist() == [0, 1, 2, 3]


class WatchedSource:
    """A source that notes which records are read."""

    def __init__(self, parent: Source):
        self.parent, self.spec, self.read = parent, parent.spec, list[int]()

    def __len__(self) -> int:
        return len(self.parent)

    def __getitem__(self, index: int) -> Record:
        self.read.append(index)
        return self.parent[index]

    def name(self, index: int) -> str:
        return self.parent.name(index)


@pytest.mark.parametrize("views", [1, 2])
def test_a_host_reads_its_own_records_only_and_each_once(views: int) -> None:
    watched = [WatchedSource(tiny_source(40)) for _ in range(4)]
    for host, source in enumerate(watched):
        pipe = pipeline(source, batch_size=16, process_index=host, process_count=4, views=views)
        for k in range(2):
            batch = pipe.batch(k)
            assert source.read[-4 // views :] == batch[INDEX][::views].tolist()
        assert len(source.read) == 2 * 4 // views
    assert len({index for source in watched for index in source.read}) == 2 * 16 // views


def test_a_host_evaluates_its_own_records_only() -> None:
    for host in range(2):
        source = WatchedSource(tiny_source(11))
        list(evaluation_batches(source, make_transform(()), 4, process_index=host, process_count=2, threads=0))
        assert source.read == [i for i in range(11) if i % 4 // 2 == host]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_views_share_a_record_and_differ_in_their_draws(hosts: int) -> None:
    whole = pipeline(batch_size=12, views=3).batch(1)
    parts = [pipeline(batch_size=12, views=3, process_index=h, process_count=hosts).batch(1) for h in range(hosts)]
    assert_equal({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)
    groups = whole[INDEX].reshape(4, 3)
    assert (groups == groups[:, :1]).all()
    assert len(set(groups[:, 0].tolist())) == 4
    assert whole["example"].tolist() == list(range(12))
    assert len({image.tobytes() for image in whole[IMAGE]}) == 12
    order = np.concatenate([pipeline(batch_size=12, views=3).batch(k)[INDEX][::3] for k in range(5)])
    assert sorted(order[:10].tolist()) == sorted(order[10:].tolist()) == list(range(10)), "every record is visited before one returns"


def test_a_file_is_decoded_once_for_all_of_its_views(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(f"folder:{photos}", "train")
    decoded: list[bytes] = []
    for name in ("decode_jpeg", "_decode_with_pil"):
        plain = getattr(images, name)
        monkeypatch.setattr(images, name, lambda *given, plain=plain: decoded.append(given[0]) or plain(*given))
    made = {views: Pipeline(source, make_transform(STEPS[:1]), batch_size=12, seed=0, views=views).batch(0) for views in (1, 4)}
    assert len(decoded) == 12 + 3
    assert len(set(decoded[12:])) == 3
    first = Picture(source[int(made[4][INDEX][0])][IMAGE], 3).read()
    for row in range(4):
        np.testing.assert_array_equal(made[4][IMAGE][row], make_transform(STEPS[:1])(first, generator(0, row, "transform")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 12, "views": 2, "process_count": 4}, "batch_size 12 cannot be divided between 4 hosts in groups of 2 views"),
        ({"views": 0}, "views must be at least 1, not 0"),
    ],
)
def test_views_that_do_not_fit_are_one_clear_line(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(**arguments)


def test_a_broken_record_takes_all_of_its_views_with_it() -> None:
    pipe = Pipeline(FaultySource((3, 11)), make_transform(()), batch_size=40, seed=0, max_bad_percent=50, views=2)
    batch = pipe.batch(0)
    assert not {3, 11} & set(batch[INDEX].tolist())
    assert (batch[INDEX][::2] == batch[INDEX][1::2]).all()
    assert (pipe.bad.count, pipe.bad.seen) == (2, 40)


@pytest.mark.parametrize(("threads", "workers"), [(0, 0), (3, 0), (0, 2)])
def test_prefetched_batches_equal_batches_made_alone_also_after_a_resume(threads: int, workers: int) -> None:
    with pipeline(threads=threads, workers=workers).iterate(3) as batches:
        for k in range(3, 8):
            assert_equal(next(batches), pipeline().batch(k))


def test_every_epoch_is_another_permutation_also_across_batches() -> None:
    order = np.concatenate([pipeline().batch(k)[INDEX] for k in range(10)]).reshape(4, 10)
    for epoch in order:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in order}) == 4


def test_a_batch_larger_than_the_data_holds_every_record() -> None:
    batch = pipeline(batch_size=24).batch(0)
    assert np.bincount(batch[INDEX]).min() == 2
    same = np.flatnonzero(batch[INDEX] == batch[INDEX][0])
    assert not np.array_equal(batch[IMAGE][same[0]], batch[IMAGE][same[1]]), "each visit of a record must be augmented anew"


def test_neighbouring_seeds_share_no_epoch() -> None:
    first, second = ({tuple(pipeline(seed=seed, batch_size=10).batch(k)[INDEX]) for k in range(6)} for seed in (3, 4))
    assert not first & second


@pytest.mark.parametrize("purpose", ["transform", "sample", "episode"])
def test_neighbouring_seeds_elements_and_purposes_share_no_draws(purpose: str) -> None:
    keys = [(seed, element, purpose) for seed in (0, 1, 2, 2**31) for element in (0, 1, 2**40)] + [(0, 0, "replacement")]
    assert len({int(generator(*key).integers(2**62)) for key in keys}) == len(keys)


def test_without_shuffle_records_come_in_their_order() -> None:
    assert pipeline(shuffle=False).batch(2)[INDEX].tolist() == [8, 9, 0, 1]


def test_broken_records_are_replaced_alike_everywhere_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    source = FaultySource((3, 11))
    whole = Pipeline(source, make_transform(()), batch_size=20, seed=0, max_bad_percent=50)
    batch = whole.batch(0)
    assert not {3, 11} & set(batch[INDEX].tolist())
    np.testing.assert_array_equal(batch[IMAGE][:, 0, 0, 0], batch[INDEX])
    np.testing.assert_array_equal(batch["label"], batch[INDEX])
    whole.batch(1)
    assert (whole.bad.count, whole.bad.seen, sorted(whole.bad.names)) == (4, 40, ["faulty/11.jpg", "faulty/3.jpg"])
    assert len([r for r in caplog.records if "faulty/3.jpg: no end" in r.getMessage()]) == 1
    halves = [
        Pipeline(source, make_transform(()), batch_size=20, seed=0, process_index=h, process_count=2, max_bad_percent=50).batch(0)
        for h in (0, 1)
    ]
    assert_equal({name: np.concatenate([half[name] for half in halves]) for name in batch}, batch)


def test_broken_records_are_counted_across_processes() -> None:
    pipe = Pipeline(FaultySource((3,)), make_transform(()), batch_size=20, seed=0, workers=1, threads=0, max_bad_percent=50)
    with pipe.iterate() as batches:
        next(batches)
    assert pipe.bad.names == ["faulty/3.jpg"]


def test_too_many_broken_records_stop_the_run_and_are_named() -> None:
    pipe = Pipeline(FaultySource((3, 4, 5)), make_transform(()), batch_size=5, seed=0, max_bad_percent=5)
    with pytest.raises(UserError, match=r"faulty: \d+\.\d % .*, more than max_bad_percent=5.*faulty/\d.jpg \(no end\)"):
        for k in range(4):
            pipe.batch(k)


def test_only_broken_records_stop_the_run_at_once() -> None:
    pipe = Pipeline(FaultySource(tuple(range(20))), make_transform(()), batch_size=5, seed=0, max_bad_percent=100)
    with pytest.raises(UserError, match="broken records in a row"):
        next(pipe.iterate())


def test_images_of_different_shapes_are_a_clear_error() -> None:
    source = tiny_source()

    def ragged(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return image[: generator.integers(4, 12)]

    with pytest.raises(UserError, match="differ in shape"):
        Pipeline(source, ragged, batch_size=8, seed=0).batch(0)


def test_a_batch_that_hosts_cannot_share_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="batch_size 6 cannot be divided between 4 hosts"):
        pipeline(batch_size=6, process_count=4)


def test_evaluation_sees_every_record_once_and_pads() -> None:
    source = FaultySource((3,), count=10)
    batches = list(evaluation_batches(source, make_transform(()), 4))
    assert [len(batch[INDEX]) for batch in batches] == [4, 4, 4]
    valid = np.concatenate([batch[VALID] for batch in batches])
    indices = np.concatenate([batch[INDEX] for batch in batches])
    assert sorted(indices[valid].tolist()) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert set(indices[~valid].tolist()) == {-1}
    halves = [list(evaluation_batches(source, make_transform(()), 4, process_index=h, process_count=2, threads=h)) for h in (0, 1)]
    for first, second, whole in zip(*halves, batches, strict=True):
        assert_equal({name: np.concatenate([first[name], second[name]]) for name in whole}, whole)


def test_evaluation_without_one_readable_record_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="not one record can be read"):
        next(evaluation_batches(FaultySource(tuple(range(4)), count=4), make_transform(()), 4))


def test_digits_have_the_documented_split_and_statistics() -> None:
    train, val = open_source("digits", "train"), open_source("digits", "val")
    assert (len(train), len(val)) == (1437, 360)
    images = np.stack([train[i]["image"] for i in range(len(train))]).astype(np.float64) / train.spec.max_value
    assert images.shape[1:] == (8, 8, 1)
    assert images.max() == 1.0
    np.testing.assert_allclose([images.mean(), images.std()], [train.spec.mean[0], train.spec.std[0]], rtol=1e-12)
    assert train.spec == val.spec
