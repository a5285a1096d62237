"""Recordings as log-mel spectrograms: `audio:FOLDER@LENGTH,BINS` gives `spectrogram` float32 [LENGTH, BINS], 10 ms a row.

    FOLDER/audio.zip or FOLDER/audio/   sound files: 16-bit WAV without further libraries, FLAC, Vorbis and MP3 through soundfile, the
                                        sound of MP4, WebM, Matroska, QuickTime and AAC through PyAV (the extra `video`)
    FOLDER/labels.csv                   the column file, and where there are such: label or digit (from 0 on), class or emotion, split

Records whose split is `train` train, those of any other split validate; without the column val_percent of each label are held out.
Training reads a random window of recordings that are longer, and multiplies the waveform by Beta(10, 10) + 0.5 (HiCMAE, Sun et al. 2024,
which with this option off in evaluation departs from its released code); evaluation reads the beginning.
"""

from __future__ import annotations

import csv
import functools
import io
import math
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from maskae.data.archive import members, read_member
from maskae.data.contract import SPLITS, Record, Source, SourceArguments, stratified_split
from maskae.data.spec import LABEL, NO_LABEL, BadRecord, DataSpec, Field, split_hash
from maskae.data.spectrogram import SHIFT_SECONDS, WINDOW_SECONDS, speech_input
from maskae.errors import UserError, nearest

RATE = 16_000
SPECTROGRAM, TABLE = "spectrogram", "labels.csv"
LABEL_COLUMNS, CLASS_COLUMNS = ("label", "digit"), ("class", "emotion")
CONTAINERS = (".mp4", ".m4a", ".aac", ".mov", ".mkv", ".webm", ".avi")
GAIN_BETA = 10.0
KEPT = 2048  # decoded recordings held in memory by each process


@dataclass(frozen=True)
class Store:
    """Files in a zip file or in a folder at `path`."""

    path: Path

    @classmethod
    def at(cls, folder: Path, kind: str) -> Store | None:
        """`<kind>.zip` or `<kind>/` of a folder, or None where there is neither."""
        found = next((path for path in (folder / f"{kind}.zip", folder / kind) if path.exists()), None)
        return None if found is None else cls(found)

    @classmethod
    def find(cls, folder: Path, kind: str, name: str) -> Store:
        """As `at`. Raises UserError where there is neither."""
        found = cls.at(folder, kind)
        if found is None:
            raise UserError(f"{name}: there is neither {kind}.zip nor a folder {kind} in {folder}")
        return found

    def files(self, name: str) -> set[str]:
        """All file names. Raises UserError for a damaged zip file."""
        return members(self.path, name) if self.path.is_file() else {each.name for each in self.path.iterdir()}

    def read(self, file: str) -> bytes:
        """A file's bytes. Raises BadRecord where it cannot be read."""
        if self.path.is_file():
            return read_member(self.path, file)
        try:
            return (self.path / file).read_bytes()
        except OSError as error:
            raise BadRecord(f"{file}: {error}") from error


def decode_sound(data: bytes, file: str) -> tuple[np.ndarray, int]:
    """(float32 [N] in -1..1, the mean of all channels; samples per second). Raises BadRecord for what cannot be decoded."""
    if file.lower().endswith(".wav"):
        try:
            with wave.open(io.BytesIO(data)) as sound:
                if sound.getsampwidth() != 2:
                    raise BadRecord(f"{file}: WAV files are read with 16 bits a sample, not {8 * sound.getsampwidth()}")
                channels, rate = sound.getnchannels(), sound.getframerate()
                samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2")
        except (wave.Error, EOFError) as error:
            raise BadRecord(f"{file}: {error}") from error
        return (samples.reshape(-1, channels).astype(np.float32) / 32768).mean(1), rate
    if file.lower().endswith(CONTAINERS):
        return sound_of_container(data, file)
    try:
        import soundfile
    except ImportError as error:
        raise UserError(f"{file}: install soundfile to read sound that is not 16-bit WAV (pip install soundfile)") from error
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except RuntimeError as error:
        raise BadRecord(f"{file}: {error}") from error
    return samples.mean(1), int(rate)


def sound_of_container(data: bytes, file: str) -> tuple[np.ndarray, int]:
    """As `decode_sound`, of the first sound track of a file that may hold pictures too."""
    try:
        import av
    except ImportError as error:
        raise UserError(f"{file}: install PyAV to read sound out of such files (pip install -e '.[video]')") from error
    try:
        with av.open(io.BytesIO(data), "r") as container:
            if not container.streams.audio:
                raise BadRecord(f"{file} has no sound")
            plain = av.AudioResampler(format="fltp")
            frames = [part for frame in container.decode(audio=0) for part in plain.resample(frame)]
    except (av.FFmpegError, ValueError) as error:
        raise BadRecord(f"{file}: {error}") from error
    if not frames:
        raise BadRecord(f"{file}: no sound can be decoded")
    return np.concatenate([frame.to_ndarray() for frame in frames], axis=1).mean(0), frames[0].sample_rate


def resample(waveform: np.ndarray, rate: int) -> np.ndarray:
    """To 16 kHz by a polyphase filter; float32 [N] -> [N * 16000 / rate]."""
    if rate == RATE:
        return waveform
    from scipy.signal import resample_poly

    common = math.gcd(rate, RATE)
    return resample_poly(waveform, RATE // common, rate // common).astype(np.float32)


@functools.lru_cache(maxsize=KEPT)
def read_sound(store: Store, file: str) -> np.ndarray:
    """A recording at 16 kHz, float32 [N]. Raises BadRecord."""
    return resample(*decode_sound(store.read(file), file))


def draw_gain(generator: np.random.Generator) -> float:
    """HiCMAE's loudness augmentation, 0.5 to 1.5."""
    return float(generator.beta(GAIN_BETA, GAIN_BETA)) + 0.5


def samples_of(length: int) -> int:
    """Samples that `length` spectrogram rows are made of."""
    return round(RATE * ((length - 1) * SHIFT_SECONDS + WINDOW_SECONDS))


def split_numbers(path: str, name: str, names: Sequence[str], optional: str = "") -> tuple[str, list[int]]:
    """`PATH@1,2,3` as its parts. Raises UserError unless there is one positive whole number for each of `names`.

    One more may stand at the end where `optional` says what it is.
    """
    stem, _, text = path.rpartition("@")
    numbers = text.split(",")
    counts = (len(names), len(names) + 1) if optional else (len(names),)
    if not stem or len(numbers) not in counts or not all(each.isdigit() and int(each) > 0 for each in numbers):
        last = f", and maybe {optional}" if optional else ""
        raise UserError(f"{name}: write the path, an @ and {len(names)} positive numbers: {', '.join(names)}{last}")
    return stem, [int(each) for each in numbers]


def read_rows(folder: Path, name: str) -> list[dict[str, str]]:
    """The rows of `labels.csv`, each with a `label`, "-1" where there is none.

    Raises UserError where the table is missing, has no column `file`, or has labels that are no numbers.
    """
    path = folder / TABLE
    if not path.is_file():
        raise UserError(f"{name}: no file {path}")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        rows = list(reader)
    if "file" not in columns:
        raise UserError(f"{name}: {path} has no column 'file'{nearest('file', columns)}; it has {', '.join(columns)}")
    column = next((each for each in LABEL_COLUMNS if each in columns), None)
    for row in rows:
        label = row[column] if column else str(NO_LABEL)
        if column and not label.isdigit():
            raise UserError(f"{name}: {path}: the {column} of {row['file']} is '{label}', not a whole number from 0 on")
        row["label"] = label
    return rows


@dataclass(frozen=True)
class Listed:
    """The rows of a split and the description of the whole set: file names, labels int32 [N], `spec`."""

    files: tuple[str, ...]
    labels: np.ndarray
    spec: DataSpec


def listed(arguments: SourceArguments, rows: list[dict[str, str]], fields: dict[str, Field], **details: Any) -> Listed:
    """The wanted split of the rows of a table, by its column `split` or by label."""
    labels = np.asarray([int(row["label"]) for row in rows], np.int32)
    if rows and "split" in rows[0]:
        trains = np.asarray([row["split"] == "train" for row in rows], bool)
        parts = dict(zip(SPLITS, (np.flatnonzero(trains), np.flatnonzero(~trains)), strict=True))
    else:
        parts = dict(zip(SPLITS, stratified_split(labels, arguments.val_percent, arguments.split_seed), strict=True))
    files = [row["file"] for row in rows]
    column = next((each for each in CLASS_COLUMNS if rows and each in rows[0]), "")
    names = {int(row["label"]): row[column] for row in rows if column}
    classes = int(np.max(labels, initial=NO_LABEL)) + 1
    spec = DataSpec(
        name=arguments.name,
        image_shape=None,
        channels=0,
        mean=(),
        std=(),
        num_classes=classes or None,
        class_names=tuple(names.get(number, str(number)) for number in range(classes)) if names else (),
        counts={split: len(part) for split, part in parts.items()},
        split_hash=split_hash(*([(files[i], int(labels[i])) for i in parts[split]] for split in SPLITS)),
        fields=fields,
        details=details,
    )
    chosen = parts[arguments.split]
    return Listed(tuple(files[i] for i in chosen), labels[chosen], spec)


def refuse_absent(name: str, wanted: Sequence[str], store: Store) -> None:
    """Raises UserError where the table names files that are not there."""
    known = store.files(name)
    if absent := [file for file in wanted if file not in known]:
        raise UserError(f"{name}: {len(absent)} files of {TABLE} are not in {store.path}, for example {absent[0]}")


@dataclass(frozen=True)
class AudioSource:
    """Recordings of `store`; records have `length` rows of `bins` mel bins."""

    store: Store
    rows: Listed
    length: int
    bins: int

    @property
    def spec(self) -> DataSpec:
        """What the data set is."""
        return self.rows.spec

    def __len__(self) -> int:
        return len(self.rows.files)

    def __getitem__(self, index: int) -> Record:
        return self._record(index, lambda room: 0, 1.0)

    def sample(self, index: int, generator: np.random.Generator) -> Record:
        """A random window with a random gain."""
        gain = draw_gain(generator)
        return self._record(index, lambda room: int(generator.integers(0, room + 1)), gain)

    def _record(self, index: int, start_of: Callable[[int], int], gain: float) -> Record:
        waveform, count = read_sound(self.store, self.rows.files[index]), samples_of(self.length)
        start = start_of(max(0, len(waveform) - count))
        spectrogram = speech_input(waveform[start : start + count], self.length, rate=RATE, bins=self.bins, gain=gain)
        return {SPECTROGRAM: spectrogram, LABEL: int(self.rows.labels[index])}

    def name(self, index: int) -> str:
        """The recording's file."""
        return f"{self.store.path}:{self.rows.files[index]}"


def open_audio(arguments: SourceArguments) -> Source:
    """A split of recordings. Raises UserError for a missing or unusable table, zip file or recording."""
    path, (length, bins) = split_numbers(arguments.path, arguments.name, ("LENGTH in rows of 10 ms", "mel BINS"))
    folder = replace(arguments, path=path).resolve("folder")
    rows, store = read_rows(folder, arguments.name), Store.find(folder, "audio", arguments.name)
    refuse_absent(arguments.name, [row["file"] for row in rows], store)
    fields = {SPECTROGRAM: Field((length, bins), "float32")}
    return AudioSource(store, listed(arguments, rows, fields, rate=RATE), length, bins)
