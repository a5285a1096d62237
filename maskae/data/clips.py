"""Clips with sound: `clips:FOLDER@SIDE,FRAMES,STRIDE,LENGTH,BINS` gives `video` uint8 [FRAMES, SIDE, SIDE, 3], every STRIDE-th frame, and
`spectrogram` float32 [LENGTH, BINS] of the same time.

With a sixth number, SEGMENTS, for fine-tuning, a validation clip is so many records, and every record has `clip` int32, the clip's number
in its split; training windows have their FRAMES spread evenly from the first to the last of FRAMES * STRIDE.

    FOLDER/video.zip or FOLDER/video/   clips that OpenCV reads
    FOLDER/audio.zip or FOLDER/audio/   their sound in files of the same names with other endings (see `maskae.data.audio`); where there
                                        is neither, the clips' own sound
    FOLDER/labels.csv                   as for `audio:`; where sound is in files of its own, the clips without one are left out

Frames are cut to a square around their centre and resized to SIDE. Training reads a random window in time and a random part of the frames,
at the gain of `audio:`; where `data.train_transform` has steps, they see whole frames. Evaluation reads the middle, or the segments: of
every STRIDE-th frame the first FRAMES, the last FRAMES, and between them others at equal distances; in a clip that is too short they are
one and the same. The sound runs one stride past the last frame (HiCMAE, Sun et al. 2024).
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import cv2
import numpy as np

from maskae.data.audio import RATE, SPECTROGRAM, Listed, Store, draw_gain, listed, read_rows, read_sound, refuse_absent, split_numbers
from maskae.data.contract import Record, Source, SourceArguments
from maskae.data.spec import CLIP, LABEL, VIDEO, BadRecord, DataSpec, Field
from maskae.data.spectrogram import speech_input
from maskae.errors import UserError

NUMBERS = ("SIDE in pixels", "FRAMES", "STRIDE between them", "LENGTH in rows of 10 ms", "mel BINS")
SEGMENTS = "SEGMENTS of a validation clip (at least 2, or none)"
KEPT = 256  # decoded clips held in memory by each process
SCALES = (1.0, 0.875, 0.75, 0.66)
WHOLE_WITHIN = 3  # pixels: a crop's side nearer than this to the whole is the whole
# Where a crop may lie, in quarters of the room along (rows, columns): corners, edges, centre and the points between.
OFFSETS = ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2), (1, 1), (1, 3), (3, 1), (3, 3))


@functools.lru_cache(maxsize=KEPT)
def read_frames(store: Store, file: str, side: int) -> tuple[np.ndarray, float]:
    """(all frames uint8 [N, side, side, 3] in RGB, frames per second). Raises BadRecord for what cannot be decoded."""
    frames = []
    # OpenCV reads from a path only.
    with tempfile.NamedTemporaryFile(suffix=PurePosixPath(file).suffix) as copy:
        copy.write(store.read(file))
        copy.flush()
        capture = cv2.VideoCapture(copy.name)
        rate = float(capture.get(cv2.CAP_PROP_FPS))
        while True:
            good, frame = capture.read()
            if not good:
                break
            frames.append(square(frame, side)[..., ::-1])
        capture.release()
    if not frames or rate <= 0:
        raise BadRecord(f"{file}: no frames can be decoded")
    return np.stack(frames), rate


def square(frame: np.ndarray, side: int) -> np.ndarray:
    """The centre of a frame [H, W, C] as [side, side, C]."""
    edge = min(frame.shape[:2])
    top, left = (frame.shape[0] - edge) // 2, (frame.shape[1] - edge) // 2
    cut = frame[top : top + edge, left : left + edge]
    return cv2.resize(cut, (side, side), interpolation=cv2.INTER_AREA if edge > side else cv2.INTER_LINEAR)


def draw_crop(generator: np.random.Generator, side: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a multi-scale crop (Wang et al. 2016) of a square.

    Both sides are one of four shares of the whole, at most one step apart, at one of 13 places.
    """
    sizes = [int(side * scale) for scale in SCALES]
    sizes = [side if side - size < WHOLE_WITHIN else size for size in sizes]
    pairs = [(height, width) for i, height in enumerate(sizes) for j, width in enumerate(sizes) if abs(i - j) <= 1]
    height, width = pairs[int(generator.integers(len(pairs)))]
    row, column = OFFSETS[int(generator.integers(len(OFFSETS)))]
    return row * ((side - height) // 4), column * ((side - width) // 4), height, width


@dataclass(frozen=True)
class ClipSource:
    """Clips of `videos` with their sound in `sounds`, whose files `sound_of` names by those of the clips.

    Record i of a split with `segments` is segment i // n of clip i % n, so that any number of evenly spaced records that `segments` divides
    holds whole clips.
    """

    videos: Store
    sounds: Store
    sound_of: dict[str, str]
    rows: Listed
    side: int
    frames: int
    stride: int
    length: int
    bins: int
    segments: int = 0
    own_crop: bool = True

    @property
    def spec(self) -> DataSpec:
        """What the data set is."""
        return self.rows.spec

    def __len__(self) -> int:
        return len(self.rows.files) * max(1, self.segments)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        segment, clip = divmod(index, len(self.rows.files))
        frames, rate = read_frames(self.videos, self.rows.files[clip], self.side)
        start = self._segment_start(frames, segment) if self.segments else self._room(frames) // 2
        return self._window(clip, frames, rate, start, 1.0)

    def sample(self, index: int, generator: np.random.Generator) -> Record:
        """A random window in time, with `own_crop` cropped alike in all frames, with a random gain."""
        frames, rate = read_frames(self.videos, self.rows.files[index], self.side)
        start = int(generator.integers(0, self._room(frames) + 1))
        # The window is drawn before the crop, and the crop before the gain.
        crop = draw_crop(generator, self.side) if self.own_crop else None
        record = self._window(index, frames, rate, start, draw_gain(generator), spread=CLIP in self.spec.fields)
        if crop is None:
            return record
        top, left, height, width = crop
        cut = record[VIDEO][:, top : top + height, left : left + width]
        resized = [cv2.resize(frame, (self.side, self.side), interpolation=cv2.INTER_LINEAR) for frame in cut]
        return record | {VIDEO: np.stack(resized)}

    def _room(self, frames: np.ndarray) -> int:
        return max(0, len(frames) - self.frames * self.stride)

    def _segment_start(self, frames: np.ndarray, segment: int) -> int:
        room = max(0, -(-len(frames) // self.stride) - self.frames)  # in strides
        return self.stride * (segment * room // (self.segments - 1))

    def _window(self, clip: int, frames: np.ndarray, rate: float, start: int, gain: float, spread: bool = False) -> Record:
        whole = self.frames * self.stride
        places = np.minimum(np.linspace(0, whole, self.frames).astype(int), whole - 1) if spread else np.arange(0, whole, self.stride)
        # A clip that is too short stands still at its end, and is silent.
        chosen = np.minimum(start + places, len(frames) - 1)
        begin, end = (round((start + count) / rate * RATE) for count in (0, whole))
        sound = read_sound(self.sounds, self.sound_of[self.rows.files[clip]])[begin:end]
        spectrogram = speech_input(sound, self.length, rate=RATE, bins=self.bins, gain=gain)
        record = {VIDEO: np.ascontiguousarray(frames[chosen]), SPECTROGRAM: spectrogram, LABEL: int(self.rows.labels[clip])}
        return record | {CLIP: np.int32(clip)} if CLIP in self.spec.fields else record

    def name(self, index: int) -> str:
        """The clip's file."""
        return f"{self.videos.path}:{self.rows.files[index % len(self.rows.files)]}"


def open_clips(arguments: SourceArguments) -> Source:
    """A split of clips. Raises UserError for a missing or unusable table or file, and where no clip has a sound."""
    path, (side, frames, stride, length, bins, *rest) = split_numbers(arguments.path, arguments.name, NUMBERS, optional=SEGMENTS)
    if rest == [1]:
        raise UserError(f"{arguments.name}: 1 segment is the middle, which evaluation reads without a sixth number")
    folder = replace(arguments, path=path).resolve("folder")
    videos = Store.find(folder, "video", arguments.name)
    sounds = Store.at(folder, "audio") or videos
    by_stem = {PurePosixPath(file).stem: file for file in sounds.files(arguments.name)}
    rows = [row for row in read_rows(folder, arguments.name) if PurePosixPath(row["file"]).stem in by_stem]
    if not rows:
        raise UserError(f"{arguments.name}: none of the clips has a sound file of its name in {sounds.path}")
    refuse_absent(arguments.name, [row["file"] for row in rows], videos)
    fields = {VIDEO: Field((frames, side, side, 3), "uint8"), SPECTROGRAM: Field((length, bins), "float32")}
    split, segments = listed(arguments, rows, fields, rate=RATE), 0
    if rest:
        counts = split.spec.counts | {"val": split.spec.counts["val"] * rest[0]}
        split = replace(split, spec=replace(split.spec, fields=fields | {CLIP: Field((), "int32")}, counts=counts))
        segments = rest[0] if arguments.split == "val" else 0
    sound_of = {row["file"]: by_stem[PurePosixPath(row["file"]).stem] for row in rows}
    return ClipSource(videos, sounds, sound_of, split, side, frames, stride, length, bins, segments, arguments.own_crop)
