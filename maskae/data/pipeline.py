"""The order of the data, and batches of it.

Element j of the endless global order is a pure function of (seed, j): the order is one permutation of the records per epoch, one after the
other, and the random numbers of element j's transform come from (seed, j). Batch k is elements k*B .. (k+1)*B - 1, also where B does not
divide the number of records n or is larger than it: nothing is dropped, an epoch is n/B steps (a fraction is fine), and a batch may span
two epochs. Host h of P makes rows h*B/P .. (h+1)*B/P - 1 of it, and reads the records of no others. So batch k is the same on any number
of hosts, threads or worker processes, and a run resumes with nothing but k.

With `views` v > 1 (repeated augmentation: Hoffer et al., "Augment your batch", 2020; Feichtenhofer et al., MAE on video, 2022) each record
is decoded once and gives v consecutive elements, each with its own random numbers: element j is of record j // v of the order, and a batch
holds B/v different records. An epoch stays n elements, so that lengths of runs keep their meaning in computation; it visits n/v records.
"""

from __future__ import annotations

import functools
import logging
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import grain.python as grain
import numpy as np
from absl import flags

from maskae.data.contract import Record, Source, sample_record
from maskae.data.images import Picture
from maskae.data.spec import EXAMPLE, IMAGE, INDEX, LABEL, NO_LABEL, VALID, VIDEO, BadRecord
from maskae.errors import UserError

Batch = dict[str, np.ndarray]
Row = dict[str, Any]  # one example: a numpy array or number per name
Transform = Callable[[Any, np.random.Generator], np.ndarray]  # (uint8 [H, W, C] or bytes, generator) -> uint8 [H', W', C']; clips too

class Order(Protocol):
    """The endless global order: [j] is the record of element j (with views, of elements j * views ...); a pure function of j."""

    def __getitem__(self, j: int, /) -> Any: ...


REPLACEMENT_ATTEMPTS = 20  # for one element: more broken records in a row mean that something else is wrong
MINIMUM_SEEN = 200  # the share of broken records is judged after so many (or all there are)
EXAMPLES_NAMED = 3


class Loaded(NamedTuple):
    """A batch on its way from a thread or a process, with what went wrong on the way (a process cannot log or raise a UserError here)."""

    batch: Batch
    bad: list[tuple[int, str]]  # (record, reason)
    error: str  # empty, or why there is no batch


@dataclass
class BadReport:
    """Broken records met so far by this host.

    Attributes:
      seen: elements handed out.
      count: broken records met, each time that they were met.
      reasons: record index -> (name, reason), each record once.
    """

    seen: int = 0
    count: int = 0
    reasons: dict[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of the broken records, in the order they were met."""
        return [name for name, _ in self.reasons.values()]


def generator(seed: int, element: int, purpose: str) -> np.random.Generator:
    """Random numbers that depend on (seed, element, purpose) alone: a counter-based generator, cheap to make for every record."""
    # As uint64: of plain numbers above 2**63 numpy makes a float64, which loses the seed's bits.
    key = np.array([(seed ^ (zlib.crc32(purpose.encode()) << 32)) % 2**64, element], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def make_order(count: int, seed: int, shuffle: bool) -> Order:
    """The endless global order: [j] is a record of 0..count-1. Needs no memory, whatever the count."""
    order = grain.MapDataset.range(count)
    if shuffle:
        # Grain adds the epoch to the seed: neighbouring seeds would share all but one of their epochs if the seed were not scattered first.
        order = order.shuffle(seed=int(np.random.SeedSequence([seed, zlib.crc32(b"order")]).generate_state(1)[0]))
    return order.repeat()


@dataclass(frozen=True)
class BatchLoader:
    """Makes this host's rows of global batch k; a pure function of k, run in threads or processes."""

    source: Source
    transform: Transform
    order: Order
    seed: int
    batch_size: int
    first_row: int
    rows: int
    views: int = 1

    def __call__(self, k: int) -> Loaded:
        bad: list[tuple[int, str]] = []
        rows: list[Row] = []
        try:
            for row in range(self.first_row, self.first_row + self.rows, self.views):
                rows += self._views(k * self.batch_size + row, bad)
            return Loaded(collate(rows, self.first_row), bad, "")
        except UserError as error:
            return Loaded({}, bad, str(error))

    def _views(self, first: int, bad: list[tuple[int, str]]) -> list[Row]:
        """Rows of the elements `first`.. that share a record; a broken one is replaced by a draw from (seed, first)."""
        index = int(self.order[first // self.views])
        replacements = None
        for _ in range(REPLACEMENT_ATTEMPTS):
            try:
                record = sample_record(self.source, index, generator(self.seed, first, "sample"))
                if self.views > 1 and IMAGE in record:
                    # Decoded here, whole, and only cropped by the views.
                    record = {**record, IMAGE: Picture(record[IMAGE], self.source.spec.channels).read()}
                draws = [generator(self.seed, element, "transform") for element in range(first, first + self.views)]
                return [make_row(record, index, self.transform, draw) for draw in draws]
            except BadRecord as error:
                bad.append((index, str(error)))
                replacements = replacements or generator(self.seed, first, "replacement")
                index = int(replacements.integers(len(self.source)))
        names = ", ".join(self.source.name(i) for i, _ in bad[-EXAMPLES_NAMED:])
        raise UserError(f"{self.source.spec.name}: {REPLACEMENT_ATTEMPTS} broken records in a row, for example {names}")


def make_row(record: Record, index: int, transform: Transform, draw: np.random.Generator) -> Row:
    """One row of a batch: the record's arrays, its image or clip transformed, its label (-1 where it has none) and its number.

    Raises UserError where the transform changes the shape of a clip, which the source's spec has promised.
    """
    row: Row = {**record, LABEL: np.int32(record.get(LABEL, NO_LABEL)), INDEX: np.int32(index)}
    if IMAGE in row:
        row[IMAGE] = transform(row[IMAGE], draw)
    if VIDEO in row:
        row[VIDEO] = transform(record[VIDEO], draw)
        if row[VIDEO].shape != record[VIDEO].shape:
            shapes = f"{row[VIDEO].shape} of clips {record[VIDEO].shape}"
            raise UserError(f"the transform makes {shapes}: leave out its size, which is the clips' own then")
    return row


def collate(rows: list[Row], first_row: int) -> Batch:
    """Rows `first_row`.. of a batch: every array stacked. Raises UserError where the rows' arrays differ in name or shape."""
    batch: Batch = {}
    for name in rows[0]:
        try:
            shapes = sorted({np.shape(row[name]) for row in rows})
        except KeyError:
            raise UserError(f"records of one batch differ: some hold no '{name}'") from None
        if len(shapes) > 1:
            advice = "add a crop or a resize to the transform" if name == IMAGE else "a source gives them one shape"
            raise UserError(f"{name}s of one batch differ in shape, {shapes[0]} and {shapes[-1]}: {advice}")
        batch[name] = np.stack([row[name] for row in rows])  # [rows, ...]
    return {**batch, EXAMPLE: np.arange(first_row, first_row + len(rows), dtype=np.int32)}


class Pipeline:
    """Training batches of one host; see the module's text for their order."""

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 2,
        workers: int = 0,
        prefetch: int = 4,
        shuffle: bool = True,
        max_bad_percent: float = 1.0,
        views: int = 1,
        order: Order | None = None,
    ):
        """Args:
          source: the records.
          transform: (image, generator) -> uint8 [H, W, C], of one shape for all records; of a clip [T, H, W, C] the same shape.
          batch_size: of the GLOBAL batch; process_count * views must divide it.
          seed: of the order and of the transforms.
          process_index, process_count: which of how many hosts this is.
          threads: batches made at the same time in this process (in each worker process where there are some); 0 makes them when asked.
          workers: processes; 0 uses threads only.
          prefetch: batches made ahead, at least one per thread; they are held in memory.
          shuffle: a new permutation for every epoch; False takes the records in their order.
          max_bad_percent: more broken records than this stop the run.
          views: augmented elements per decoded record, see the module's text.
          order: the endless order of records where it is not that of `make_order`: `order[j]` is a record. Picklable.

        Raises UserError where batch_size does not divide as said, or there are no records.
        """
        if views < 1:
            raise UserError(f"views must be at least 1, not {views}")
        if batch_size < 1 or batch_size % (process_count * views):
            groups = f" in groups of {views} views" if views > 1 else ""
            raise UserError(f"batch_size {batch_size} cannot be divided between {process_count} hosts{groups}")
        if len(source) == 0:
            raise UserError(f"{source.spec.name}: no records")
        if seed < 0:
            raise UserError(f"seed must not be negative, not {seed}")
        self.source = source
        self.batch_size = batch_size
        self.bad = BadReport()
        self._threads, self._workers, self._prefetch = threads, workers, prefetch
        self._max_bad_percent = max_bad_percent
        rows = batch_size // process_count
        order = make_order(len(source), seed, shuffle) if order is None else order
        loader = BatchLoader(source, transform, order, seed, batch_size, process_index * rows, rows, views)
        self._batches = grain.MapDataset.range(sys.maxsize // batch_size).map(loader)

    @property
    def steps_per_epoch(self) -> float:
        """n / B: how many batches use as many elements as there are records."""
        return len(self.source) / self.batch_size

    def batch(self, k: int) -> Batch:
        """This host's rows of global batch k, made now. Raises UserError where too many records are broken."""
        return self._accept(self._batches[k])

    def iterate(self, start: int = 0) -> BatchIterator:
        """Batches start, start + 1, ... without end, made ahead in the background. Close it, or use it in a `with`."""
        batches = self._batches[start:].to_iter_dataset(read_options(self._threads, self._prefetch))
        if self._workers:
            # Grain reads an absl flag here, which raises where a program has not parsed its flags (a notebook, a test).
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            ahead = max(1, self._prefetch // self._workers)
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=ahead))
        return BatchIterator(iter(batches), self._accept)

    def _accept(self, loaded: Loaded) -> Batch:
        """Counts and names broken records when their batch is handed out, so that a run stops at the same step however it is prefetched."""
        for index, reason in loaded.bad:
            self.bad.count += 1
            if index not in self.bad.reasons:
                name = self.source.name(index)
                self.bad.reasons[index] = (name, reason)
                logging.warning("broken record replaced: %s: %s", name, reason)
        if loaded.error:
            raise UserError(loaded.error)
        self.bad.seen += len(loaded.batch[INDEX])
        share = 100 * self.bad.count / (self.bad.seen + self.bad.count)
        if self.bad.seen >= min(MINIMUM_SEEN, len(self.source)) and share > self._max_bad_percent:
            examples = ", ".join(f"{name} ({reason})" for name, reason in list(self.bad.reasons.values())[:EXAMPLES_NAMED])
            limit = f"more than max_bad_percent={self._max_bad_percent}"
            raise UserError(f"{self.source.spec.name}: {share:.1f} % of the records are broken, {limit}: {examples}")
        return loaded.batch


class BatchIterator(Iterator[Batch]):
    """Batches made ahead in the background; `close` (or leaving a `with`) ends its threads and processes."""

    def __init__(self, loaded: Any, accept: Callable[[Loaded], Batch]):
        """`loaded` is Grain's iterator over Loaded, `accept` turns one into a batch or raises."""
        self._loaded = loaded
        self._accept = accept

    def __next__(self) -> Batch:
        return self._accept(next(self._loaded))

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and processes; further batches cannot be asked for."""
        self._loaded.close()


def read_options(threads: int, prefetch: int) -> grain.ReadOptions:
    """Grain's options: a buffer smaller than the number of threads would leave some of them idle."""
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads) if threads else 0)


def evaluation_batches(
    source: Source, transform: Transform, batch_size: int, *, process_index: int = 0, process_count: int = 1, threads: int = 2
) -> Iterator[Batch]:
    """Every record once, in order, made ahead in threads; the last batch is padded with black images.

    Rows of broken records and of padding have `valid` False, `label` -1 and `index` -1. Every host gets the same number of batches, each
    with batch_size / process_count rows. Raises UserError where process_count does not divide batch_size, or no record can be read.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size {batch_size} cannot be divided between {process_count} hosts")
    rows = batch_size // process_count
    loader = EvaluationLoader(source, transform, batch_size, process_index * rows, rows)
    batches = iter(grain.MapDataset.range(-(-len(source) // batch_size)).map(loader).to_iter_dataset(read_options(threads, 0)))
    try:
        yield from batches
    finally:
        batches.close()


@dataclass(frozen=True)
class EvaluationLoader:
    """Makes this host's rows of evaluation batch k, with invalid rows where a record is broken or past the end."""

    source: Source
    transform: Transform
    batch_size: int
    first_row: int
    rows: int

    def __call__(self, k: int) -> Batch:
        first = k * self.batch_size + self.first_row
        rows = [self._read(index) for index in range(first, first + self.rows)]
        filler = _blank(self.source, self.transform, rows)
        batch = collate([filler if row is None else row for row in rows], self.first_row)
        return {**batch, VALID: np.asarray([row is not None for row in rows])}

    def _read(self, index: int) -> Row | None:
        """The row of a record; None where it is broken or past the end."""
        if index >= len(self.source):
            return None
        try:
            return make_row(self.source[index], index, self.transform, generator(0, index, "evaluation"))
        except BadRecord as error:
            _name_left_out(self.source.name(index), str(error))
            return None


@functools.cache
def _name_left_out(name: str, reason: str) -> None:
    """Names a record once, however often a run evaluates."""
    logging.warning("broken record left out of the evaluation: %s: %s", name, reason)


def _blank(source: Source, transform: Transform, rows: list[Row | None]) -> Row:
    """A row of zeros in the right shapes; a host whose rows are all padding has to read one record to know them."""
    known = next((row for row in rows if row is not None), None)
    index = 0
    while known is None:
        if index == len(source):
            raise UserError(f"{source.spec.name}: not one record can be read")
        try:
            known = make_row(source[index], index, transform, generator(0, index, "evaluation"))
        except BadRecord:
            index += 1
    return {**{name: np.zeros_like(array) for name, array in known.items()}, LABEL: np.int32(NO_LABEL), INDEX: np.int32(-1)}
