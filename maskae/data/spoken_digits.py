"""Spoken digits with moving pictures of the same digits: `spoken_digits:FOLDER@SIDE,FRAMES,LENGTH,BINS`.

FOLDER holds recordings as `audio:` reads them, labelled 0 to 9. Each is paired with one of scikit-learn's scanned digits of its label,
which moves in a straight line over a black field and bounces off its borders: `video` uint8 [FRAMES, SIDE, SIDE, 1], `spectrogram` float32
[LENGTH, BINS]. Training draws scan, path, window and gain anew each time; evaluation has a fixed one of each for every recording. Of the
scans, every fourth is kept for validation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import cv2
import numpy as np

from maskae.data.audio import SPECTROGRAM, AudioSource, open_audio, split_numbers
from maskae.data.contract import Record, Source, SourceArguments
from maskae.data.spec import LABEL, VIDEO, DataSpec, Field
from maskae.errors import UserError

NUMBERS = ("SIDE in pixels", "FRAMES", "LENGTH in rows of 10 ms", "mel BINS")
CLASSES = 10
HELD_OUT = 4
# Of the clip's side: a scan's, and its way in a frame. Small or fast digits cannot be told apart by the few patches that a mask leaves.
SCAN = 0.75
FASTEST = 0.05


@functools.lru_cache(maxsize=2)
def scans(split: str) -> tuple[np.ndarray, ...]:
    """The scanned digits of a split, uint8 [n, 8, 8] for each label."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.minimum(images.reshape(-1, 8, 8) * 16, 255).astype(np.uint8)
    held = np.arange(len(labels)) % HELD_OUT == 0
    chosen = held if split == "val" else ~held
    return tuple(images[chosen & (labels == label)] for label in range(CLASSES))


def bounce(start: np.ndarray, speed: np.ndarray, frames: int, room: int) -> np.ndarray:
    """int64 [frames, 2]: places on a straight path that is reflected at 0 and `room`."""
    if not room:
        return np.zeros((frames, 2), np.int64)
    straight = np.mod(start + speed * np.arange(frames)[:, None], 2 * room)
    return np.round(room - np.abs(straight - room)).astype(np.int64)


@dataclass(frozen=True)
class SpokenDigits:
    """`sound`'s recordings, each with a moving scan of `split`."""

    sound: AudioSource
    split: str
    side: int
    frames: int
    spec: DataSpec

    def __len__(self) -> int:
        return len(self.sound)

    def __getitem__(self, index: int) -> Record:
        return self._with_video(self.sound[index], np.random.default_rng(index))

    def sample(self, index: int, generator: np.random.Generator) -> Record:
        """Another scan on another path."""
        return self._with_video(self.sound.sample(index, generator), generator)

    def _with_video(self, record: Record, generator: np.random.Generator) -> Record:
        of_label = scans(self.split)[record[LABEL]]
        size = int(SCAN * self.side)
        scan = cv2.resize(of_label[int(generator.integers(len(of_label)))], (size, size), interpolation=cv2.INTER_LINEAR)
        room = self.side - size
        start, speed = generator.uniform(0, room, 2), generator.uniform(-FASTEST, FASTEST, 2) * self.side
        video = np.zeros((self.frames, self.side, self.side, 1), np.uint8)
        for frame, (row, column) in zip(video, bounce(start, speed, self.frames, room), strict=True):
            frame[row : row + size, column : column + size, 0] = scan
        return {VIDEO: video, SPECTROGRAM: record[SPECTROGRAM], LABEL: record[LABEL]}

    def name(self, index: int) -> str:
        """The recording's file."""
        return self.sound.name(index)


def open_spoken_digits(arguments: SourceArguments) -> Source:
    """A split of the pairs. Raises UserError where the recordings are not there or have other labels than 0 to 9."""
    path, (side, frames, length, bins) = split_numbers(arguments.path, arguments.name, NUMBERS)
    sound = open_audio(replace(arguments, path=f"{path}@{length},{bins}"))
    assert isinstance(sound, AudioSource)
    labels = sound.rows.labels
    if len(labels) and not 0 <= labels.min() <= labels.max() < CLASSES:
        raise UserError(f"{arguments.name}: the recordings must be labelled 0 to 9, not {labels.min()} to {labels.max()}")
    names = tuple(str(digit) for digit in range(CLASSES))
    fields = sound.spec.fields | {VIDEO: Field((frames, side, side, 1), "uint8")}
    spec = replace(sound.spec, num_classes=CLASSES, class_names=names, fields=fields)
    return SpokenDigits(sound, arguments.split, side, frames, spec)
