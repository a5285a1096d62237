"""Writes a data set as ArrayRecord shards with a spec.json, for fast random access: `arrayrecord:DIR` then reads it.

    python tools/prepare_data.py --source folder:photos --out photos_256 --short_side 256
    python tools/prepare_data.py --source tfds:imagenet2012 --out imagenet_256 --short_side 256 --quality 90

Every image is decoded once: broken ones are left out and listed in broken.txt, and mean and standard deviation are measured on all training
images. Without --short_side, image files are stored as they are; with it, larger ones are shrunk (never enlarged) and encoded again.
The folder appears under its name only when it is complete. prepare.json says how it was made, shards.json what each shard must be, so
that a copy of the folder in a bucket can be read: --config.data.source=arrayrecord:gs://bucket/photos_256

Exit status: 0, 1 where images were broken and left out, 2 for bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

# So that it also works in a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image
from tqdm import tqdm

from maskae.data.contract import SPLITS, Source
from maskae.data.images import Picture
from maskae.data.records import SHARDS_FILE, SPEC_FILE, RecordWriter, list_shards
from maskae.data.resizing import resize
from maskae.data.sources import open_source
from maskae.data.spec import IMAGE, LABEL, BadRecord, DataSpec, split_hash
from maskae.errors import UserError

RECORDS_PER_SHARD = 4096
BLOCK = 256


@dataclass(frozen=True)
class Encoding:
    """How images are stored: the short side in pixels (None: as they are), the JPEG quality, and the format of what is encoded."""

    short_side: int | None
    quality: int
    form: str


@dataclass(frozen=True)
class Prepared:
    """One record ready to be written, or the reason why it cannot be; sums are over its pixels, in units where 1 is max_value."""

    name: str
    label: int
    image: bytes
    pixels: int
    total: np.ndarray
    squares: np.ndarray
    reason: str


@dataclass
class Written:
    """What one split holds: (name, label) of its records, "name<tab>reason" of those left out, and sums over its pixels."""

    members: list[tuple[str, int]]
    broken: list[str]
    pixels: int
    total: np.ndarray
    squares: np.ndarray


def encode(image: np.ndarray, encoding: Encoding) -> bytes:
    """The bytes of an image file. image: uint8 [H, W, 1 or 3]."""
    target = io.BytesIO()
    arguments = {"quality": encoding.quality} if encoding.form == "jpeg" else {}
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(target, encoding.form, **arguments)
    return target.getvalue()


def prepare(source: Source, index: int, encoding: Encoding) -> Prepared:
    """Reads, shrinks, encodes and measures one record."""
    spec = source.spec
    nothing = np.zeros(spec.channels)
    try:
        record = source[index]
        image = Picture(record[IMAGE], spec.channels).read()
    except BadRecord as error:
        return Prepared(source.name(index), -1, b"", 0, nothing, nothing, str(error))
    data = record[IMAGE]
    short = min(image.shape[:2])
    if encoding.short_side is not None and short > encoding.short_side:
        height, width = (max(1, round(side * encoding.short_side / short)) for side in image.shape[:2])
        image, data = resize(image, height, width), None
    if not isinstance(data, bytes):
        data = encode(image, encoding)
    values = image.reshape(-1, spec.channels) / spec.max_value
    return Prepared(source.name(index), record[LABEL], data, len(values), values.sum(0), np.square(values).sum(0), "")


def prepare_all(source: Source, encoding: Encoding, threads: int, title: str) -> Iterator[Prepared]:
    """Every record of a source, in order, made in threads, with a progress bar; few are held in memory at a time."""
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(source), desc=title, unit="img") as progress:
        for start in range(0, len(source), BLOCK):
            for prepared in pool.map(lambda i: prepare(source, i, encoding), range(start, min(start + BLOCK, len(source)))):
                progress.update()
                yield prepared


def write_split(source: Source, folder: Path, split: str, encoding: Encoding, threads: int) -> Written:
    """Writes the shards of one split. Raises UserError where not one image can be read."""
    writer = RecordWriter(folder, split, len(source), -(-len(source) // RECORDS_PER_SHARD))
    written = Written([], [], 0, np.zeros(source.spec.channels), np.zeros(source.spec.channels))
    for prepared in prepare_all(source, encoding, threads, split):
        if prepared.reason:
            written.broken.append(f"{prepared.name}\t{prepared.reason}")
            continue
        writer.write(prepared.image, prepared.label, prepared.name)
        written.members.append((prepared.name, prepared.label))
        written.pixels += prepared.pixels
        written.total += prepared.total
        written.squares += prepared.squares
    writer.close()
    if not written.members:
        raise UserError(f"{source.spec.name}: not one image of split '{split}' can be read, for example {written.broken[0]}")
    return written


def make_spec(spec: DataSpec, splits: dict[str, Written]) -> DataSpec:
    """The spec of what was written: counts, statistics of all training images, and the hash of the split."""
    train = splits["train"]
    mean = train.total / train.pixels
    std = np.sqrt(np.maximum(train.squares / train.pixels - mean**2, 0))
    members = {split: splits[split].members if split in splits else [] for split in SPLITS}
    return dataclasses.replace(
        spec,
        image_shape=None,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        counts={split: len(members[split]) for split in SPLITS},
        split_hash=split_hash(members["train"], members["val"]),
    )


def run(flags: argparse.Namespace) -> int:
    """Prepares the data set of the flags; returns how many broken images were left out. Raises UserError."""
    out: Path = flags.out
    partial = out.with_name(out.name + ".partial")
    for path in (out, partial):
        if path.exists():
            raise UserError(f"--out: {path} exists already; delete it or choose another folder")
    if flags.short_side is not None and flags.short_side < 1:
        raise UserError(f"--short_side must be at least 1, not {flags.short_side}")
    if not 1 <= flags.quality <= 100:
        raise UserError(f"--quality must be within 1..100, not {flags.quality}")
    # Arrays hold exact values, which JPEG would change.
    form = flags.format or ("png" if flags.source.partition(":")[0] in ("digits", "npz") else "jpeg")
    encoding = Encoding(flags.short_side, flags.quality, form)
    options = {"root": flags.root, "val_percent": flags.val_percent, "split_seed": flags.split_seed, "channels": flags.channels}
    sources = {split: open_source(flags.source, split, **options) for split in (SPLITS if flags.val_percent else SPLITS[:1])}
    partial.mkdir(parents=True)
    splits = {split: write_split(source, partial, split, encoding, flags.threads) for split, source in sources.items()}
    spec = make_spec(sources["train"].spec, splits)
    broken = [line for written in splits.values() for line in written.broken]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(flags).items()}
    (partial / "prepare.json").write_text(json.dumps(settings | {"format": form, "broken": len(broken)}, indent=2, sort_keys=True) + "\n")
    (partial / "broken.txt").write_text("".join(line + "\n" for line in broken))
    (partial / SHARDS_FILE).write_text(list_shards(partial))
    (partial / SPEC_FILE).write_text(spec.to_json())
    partial.rename(out)
    print(f"{out}: {spec.counts['train']} training and {spec.counts['val']} validation images, {len(broken)} broken ones left out")
    for line in broken:
        print(f"broken: {line}", file=sys.stderr)
    return len(broken)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder:PATH, tfds:NAME, npz:PATH or digits")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to make")
    parser.add_argument("--root", help="what relative paths of --source start from; default: MASKAE_DATA, else here")
    parser.add_argument("--short_side", type=int, help="shrink larger images to so many pixels along the short side")
    parser.add_argument("--quality", type=int, default=90, help="of JPEG; default: 90")
    parser.add_argument("--format", choices=("jpeg", "png"), help="of images that are encoded; default: jpeg, for arrays png")
    parser.add_argument("--channels", type=int, help="1 or 3; default: 3 for image files")
    parser.add_argument("--val_percent", type=float, default=10.0, help="held out where the data has no validation split; 0: no such split")
    parser.add_argument("--split_seed", type=int, default=0, help="chooses which; default: 0")
    parser.add_argument("--threads", type=int, default=4, help="images made at the same time; default: 4")
    try:
        return 1 if run(parser.parse_args(arguments)) else 0
    except UserError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
