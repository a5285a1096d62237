"""The order of the data does not depend on hosts, threads, processes or where a run resumes."""

from __future__ import annotations

import numpy as np
import pytest

from maskae.data.contract import Record, Source
from maskae.data.pipeline import Batch, Pipeline, evaluation_batches
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
    images = np.random.default_rng(0).integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int32)
    return ArraySource(images, labels, labels, DataSpec("tiny", (12, 12, 3), 3, (0.5,) * 3, (0.25,) * 3))


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
