"""Measures the input pipeline: images/s per core and per host from a folder and from ArrayRecord shards, beside PyTorch's usual loader.

    python tools/bench_data.py --source folder:photos --size 224
    python tools/bench_data.py --source photographs --size 224 [--views 4] [--json figures.json]
    python tools/bench_data.py --config configs/mae.py:base [--config.data.source=arrayrecord:imagenet_256]

`photographs` makes JPEG files of 500x375 pixels at quality 90, of ImageNet's typical kind, from the two photographs that come with
scikit-learn. --record also measures the source as ArrayRecord shards, which tools/prepare_data.py writes to a temporary folder; for
`photographs` that is the default.

`torch` is torchvision's recipe in PIL, which is what its documentation and the papers' code use: open, convert to RGB, random-resized-crop
with antialiased bicubic, flip, uint8 tensor, in a DataLoader. It is measured where torch is installed. A core's figure is measured in one
thread pinned to one core, by processor time; a host's in as many threads (torch: worker processes) as there are cores, by the clock. All
loaders take turns in short rounds, so that a busy machine slows all of them alike; the ratio is of neighbouring rounds. Exit status: 0, or
2 for bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# So that it also works in a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from maskae.data.contract import Source
from maskae.data.folder import FolderSource
from maskae.data.pipeline import Pipeline
from maskae.data.sources import open_source
from maskae.data.transforms import Transform, make_transform
from maskae.errors import UserError
from tools import prepare_data, torch_loader

PHOTOGRAPHS = "photographs"
PHOTOGRAPH_SIZE = (375, 500)
MAE_SCALE = (0.2, 1.0)
TORCH = "torch DataLoader, PIL"

PACKAGES = ("numpy", "pillow", "simplejpeg", "cykooz_resizer", "grain", "torch")
MOST_AHEAD = 4  # batches per core that a loader may hold ready; so many are thrown away before a host's rate is taken


@dataclass(frozen=True)
class Loader:
    """`start(parallel)` gives endless batches made by so many threads or processes; 0 makes them when asked, in the calling thread."""

    name: str
    start: Callable[[int], Iterator[Any]]


@dataclass(frozen=True)
class Rate:
    """Images per second, one figure per round."""

    name: str
    per_core: list[float]
    per_host: list[float]


@dataclass(frozen=True)
class Reading:
    """What is read and done to it: `source` and `root` as in a config, the host transform, and the shape of a batch."""

    source: str
    root: str | None
    transform: Transform
    size: int
    batch_size: int
    views: int
    workers: int  # processes that share a host's cores; 0: threads of this one


def write_photographs(folder: Path, count: int, seed: int = 0) -> None:
    """`count` JPEG files, 500x375, quality 90, colours at half resolution: parts of scikit-learn's two photographs, enlarged a little."""
    from sklearn.datasets import load_sample_images

    folder.mkdir(parents=True)
    height, width = PHOTOGRAPH_SIZE
    photographs = load_sample_images().images
    generator = np.random.default_rng(seed)
    for number in range(count):
        whole = Image.fromarray(photographs[number % len(photographs)])
        tall = int(generator.integers(280, whole.height + 1))
        wide = tall * width // height
        left, top = int(generator.integers(whole.width - wide + 1)), int(generator.integers(whole.height - tall + 1))
        part = whole.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + wide, top + tall))
        part.save(folder / f"{number:05d}.jpg", quality=90)


def pipeline_loader(name: str, source: Source, reading: Reading, views: int = 1) -> Loader:
    """maskae's pipeline."""

    def start(parallel: int) -> Iterator[Any]:
        pipeline = Pipeline(
            source,
            reading.transform,
            batch_size=reading.batch_size,
            seed=0,
            threads=-(-parallel // max(reading.workers, 1)),
            workers=reading.workers if parallel else 0,
            max_bad_percent=100.0,
            views=views,
        )
        return pipeline.iterate()

    return Loader(name, start)


def record_source(reading: Reading, folder: Path) -> Source:
    """The same files as ArrayRecord shards, written below `folder`. Raises UserError where tools/prepare_data.py fails."""
    arguments = ["--source", reading.source, "--out", str(folder / "records"), "--val_percent=0"]
    with redirect_stdout(sys.stderr):
        status = prepare_data.main(arguments + (["--root", reading.root] if reading.root else []))
    if status == 2:
        raise UserError(f"{reading.source}: cannot be written as ArrayRecord shards (see above)")
    return open_source(f"arrayrecord:{folder}/records", "train", statistics="measured")


def make_loaders(reading: Reading, record: bool, folder: Path) -> list[Loader]:
    """maskae's loaders of the source, with and without shards and views, and torch's where it is installed and there are files."""
    source = open_source(reading.source, "train", root=reading.root, val_percent=0.0, channels=reading.transform.channels)
    sources = {f"maskae {reading.source.partition(':')[0]}": source}
    if record:
        sources["maskae arrayrecord"] = record_source(reading, folder)
    loaders = [pipeline_loader(name, opened, reading) for name, opened in sources.items()]
    if reading.views > 1:
        loaders += [pipeline_loader(f"{name}, {reading.views} views", opened, reading, reading.views) for name, opened in sources.items()]
    if not torch_loader.is_installed():
        print("torch is not installed: no comparison", file=sys.stderr)
    elif isinstance(source, FolderSource):
        files = [Path(source.name(i)) for i in range(len(source))]
        scale = next((step.scale for step in reading.transform.steps if hasattr(step, "scale")), MAE_SCALE)
        loaders.append(Loader(TORCH, lambda workers: torch_loader.start(files, reading.size, scale, reading.batch_size, workers)))
    return loaders


def images_per_second(batches: Iterator[Any], batch_size: int, count: int, clock: Callable[[], float]) -> float:
    """Of the next `count` batches."""
    begin = clock()
    for _ in range(count):
        next(batches)
    return batch_size * count / (clock() - begin)


def measure(loaders: Sequence[Loader], batch_size: int, rounds: int, batches: int) -> list[Rate]:
    """Rates of all loaders in turns: `rounds` of `batches` batches per core. Linux only: it pins itself to one core."""
    rates = [Rate(loader.name, [], []) for loader in loaders]
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        alone = [loader.start(0) for loader in loaders]
        for batch in alone:
            next(batch)
        for _ in range(rounds):
            for rate, iterator in zip(rates, alone, strict=True):
                rate.per_core.append(images_per_second(iterator, batch_size, batches, time.process_time))
    finally:
        os.sched_setaffinity(0, cores)
    together = [loader.start(len(cores)) for loader in loaders]
    for _ in range(rounds):
        for rate, iterator in zip(rates, together, strict=True):
            # What was made while others were measured is not counted; from then on every batch is waited for.
            for _ in range(MOST_AHEAD * len(cores)):
                next(iterator)
            rate.per_host.append(images_per_second(iterator, batch_size, batches * len(cores), time.perf_counter))
    return rates


def spread(values: Sequence[float], form: str = ".0f") -> str:
    """`median (least-greatest)`."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def ratios(rate: Rate, baseline: Rate) -> list[float]:
    """Per core, of neighbouring rounds."""
    return [a / b for a, b in zip(rate.per_core, baseline.per_core, strict=True)]


def table(rates: Sequence[Rate]) -> str:
    """A Markdown table: median (least-greatest) over the rounds."""
    baseline = next((rate for rate in rates if rate.name == TORCH), None)
    lines = ["| loader | images/s per core | images/s per host | per core, against torch |", "|---|---|---|---|"]
    for rate in rates:
        ratio = "" if baseline is None else spread(ratios(rate, baseline), ".2f")
        lines.append(f"| {rate.name} | {spread(rate.per_core)} | {spread(rate.per_host)} | {ratio} |")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of Python and of what does the work; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def reading_of(flags: argparse.Namespace, overrides: Sequence[str]) -> Reading:
    """What the flags or the config ask for. Raises UserError."""
    if flags.config:
        from maskae.config import load_config

        config = load_config(flags.config, overrides)
        data = config.data
        transform = make_transform(data.train_transform, data.channels, data.image_size)
        return Reading(
            flags.source or data.source, data.root or None, transform, data.image_size, flags.batch_size, flags.views, flags.workers
        )
    if overrides:
        raise UserError(f"--config.{overrides[0]} without --config")
    if not flags.source:
        raise UserError("give --source (such as folder:photos, or photographs) or --config")
    transform = make_transform((("random_resized_crop", {"size": flags.size, "scale": MAE_SCALE}),), 3)
    return Reading(flags.source, None, transform, flags.size, flags.batch_size, flags.views, flags.workers)


def run(flags: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Measures and prints. Raises UserError."""
    for name in ("size", "batch_size", "views", "rounds", "batches", "count"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(flags, name)}")
    if flags.workers < 0:
        raise UserError(f"--workers must not be negative, not {flags.workers}")
    reading = reading_of(flags, overrides)
    record = flags.record or reading.source == PHOTOGRAPHS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if reading.source == PHOTOGRAPHS:
            write_photographs(folder / PHOTOGRAPHS, flags.count)
            reading = dataclasses.replace(reading, source=f"folder:{folder / PHOTOGRAPHS}", root=None)
        rates = measure(make_loaders(reading, record, folder), reading.batch_size, flags.rounds, flags.batches)
    cores = len(os.sched_getaffinity(0))
    print(table(rates))
    known = ", ".join(f"{package} {version}" for package, version in versions().items())
    print(f"\n{reading.size} pixels, batches of {reading.batch_size}, {flags.rounds} rounds, {cores} cores; {known}")
    if flags.json:
        figures = {"cores": cores, "versions": versions(), "size": reading.size, "rates": [dataclasses.asdict(rate) for rate in rates]}
        flags.json.write_text(json.dumps(figures, indent=1) + "\n")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    from maskae.config import split_arguments

    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="folder:PATH, arrayrecord:PATH, ... or photographs")
    parser.add_argument("--config", metavar="FILE[:VARIANT]", help="take source and transform from a config; --config.key=value overrides")
    parser.add_argument("--size", type=int, default=224, help="of the crops without --config; default: 224")
    parser.add_argument("--batch_size", type=int, default=64, help="default: 64")
    parser.add_argument("--views", type=int, default=1, help="also measure so many augmented views per decoded image; default: 1")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes of maskae's loaders for the host's figure; default: 0, threads only"
    )
    parser.add_argument("--record", action="store_true", help="also measure the source as ArrayRecord shards, made for that")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each loader; default: 7")
    parser.add_argument("--batches", type=int, default=4, help="per turn and core; default: 4")
    parser.add_argument("--count", type=int, default=2000, help="of photographs; default: 2000")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every round's figures")
    try:
        plain, overrides = split_arguments(sys.argv[1:] if arguments is None else arguments)
        run(parser.parse_args(plain), overrides)
        return 0
    except UserError as error:
        print(f"bench_data: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
