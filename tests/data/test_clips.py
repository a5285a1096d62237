"""Recordings, clips with sound and their spectrograms: windows, lengths, splits and clear refusals."""

from __future__ import annotations

import sys
import wave
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from maskae.data.audio import Store, read_sound, samples_of
from maskae.data.clips import draw_crop
from maskae.data.contract import Source, sample_record
from maskae.data.pipeline import Pipeline, generator
from maskae.data.sources import LimitedSource, open_source
from maskae.data.spec import BadRecord
from maskae.data.spectrogram import FLOOR, fit_length, log_mel, normalise_spectrogram, speech_input
from maskae.data.transforms import make_transform
from maskae.errors import UserError

RATE, FRAME_RATE = 16_000, 10.0
BRIGHTNESS = np.linspace(20, 220, 20)  # of the frames of a clip


def write_sound(path: Path, waveform: np.ndarray, rate: int = RATE) -> None:
    """16-bit WAV of one channel."""
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes((waveform * 32767).astype("<i2").tobytes())


def write_video(path: Path, frames: int) -> None:
    """Grey frames of rising brightness, 24 x 16 pixels."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), FRAME_RATE, (24, 16))
    for brightness in np.linspace(20, 220, frames):
        writer.write(np.full((16, 24, 3), brightness, np.uint8))
    writer.release()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four clips of 20 frames (2 seconds); sound that starts at the first second; the fourth has no sound file."""
    for kind in ("video", "audio"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    tone = np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE) * (np.arange(2 * RATE) >= RATE) * 0.5
    for i in range(4):
        write_video(tmp_path / "set" / "video" / f"c{i}.avi", 20)
        if i < 3:
            write_sound(tmp_path / "set" / "audio" / f"c{i}.wav", tone)
    rows = [f"c{i}.avi,{i % 2},{'train' if i else 'test'}" for i in range(4)]
    (tmp_path / "set" / "labels.csv").write_text("file,label,split\n" + "\n".join(rows) + "\n")
    return tmp_path


def test_lengths_and_silence() -> None:
    assert [len(log_mel(np.zeros(round(RATE * seconds)))) for seconds in (0.02, 2.56, 2.60)] == [0, 254, 258]
    np.testing.assert_allclose(log_mel(np.zeros(RATE)), np.log(FLOOR), rtol=1e-6)
    filled = normalise_spectrogram(fit_length(log_mel(np.zeros(round(2.56 * RATE))), 256))
    assert filled.shape == (256, 128) and filled[254, 0] == pytest.approx(0.467, abs=1e-3)
    assert len(log_mel(np.zeros(samples_of(64)))) == 64


def test_a_tone_is_loudest_in_its_own_bin_and_a_gain_is_a_shift() -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    centres = 700 * np.expm1(np.linspace(1127 * np.log1p(20 / 700), 1127 * np.log1p(8000 / 700), 66)[1:-1] / 1127)
    loudest = log_mel(tone, bins=64).mean(0).argmax()
    assert abs(centres[loudest] - 1000) == np.abs(centres - 1000).min()
    noise = np.random.default_rng(0).normal(size=RATE)
    # Of 128 bins some are too narrow for a point of the transform and stay at the floor.
    shift = speech_input(noise, 98, bins=32, gain=2.0) - speech_input(noise, 98, bins=32)
    np.testing.assert_allclose(shift, 2 * np.log(2) / (2 * 4.5689974), rtol=1e-4)


def test_clips_are_pairs_of_one_window(folder: Path) -> None:
    source = open_source("clips:set@8,5,2,96,16", "train", root=str(folder), channels=0)
    assert source.spec.counts == {"train": 2, "val": 1} and len(source) == 2  # the clip without sound is left out
    record = source[0]
    assert record["video"].shape == (5, 8, 8, 3) and record["spectrogram"].shape == (96, 16)
    # The middle window: frames 5, 7, ... of 20, so sound from 0.5 to 1.5 seconds, whose second half is the tone.
    np.testing.assert_allclose(record["video"][:, 4, 4, 1], np.linspace(20, 220, 20)[5:15:2], atol=4)
    loudness = record["spectrogram"].mean(1)
    assert loudness[60:].min() > loudness[:40].max()
    drawn = [source.sample(0, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(drawn[0]["video"], drawn[1]["video"])
    assert not np.array_equal(drawn[0]["spectrogram"], drawn[2]["spectrogram"])


def test_training_draws_a_window_then_a_crop_then_a_gain(folder: Path) -> None:
    """The order in which recorded curves were drawn; without the crop of its own a clip stays whole."""
    cropping, whole = (open_source("clips:set@8,5,2,96,16", "train", root=str(folder), channels=0, own_crop=own) for own in (True, False))
    for seed in range(5):
        twin = np.random.default_rng(seed)
        start = int(twin.integers(0, 11))
        plain = whole.sample(0, np.random.default_rng(seed))  # type: ignore[attr-defined]
        np.testing.assert_allclose(plain["video"].mean((1, 2, 3)), BRIGHTNESS[start : start + 10 : 2], atol=4)
        top, left, height, width = draw_crop(twin, 8)
        cut = plain["video"][:, top : top + height, left : left + width]
        drawn = cropping.sample(0, np.random.default_rng(seed))  # type: ignore[attr-defined]
        np.testing.assert_array_equal(drawn["video"], [cv2.resize(frame, (8, 8), interpolation=cv2.INTER_LINEAR) for frame in cut])
        assert not np.array_equal(drawn["spectrogram"], plain["spectrogram"])  # another draw is the gain


def segmented(folder: Path, numbers: str, split: str = "val") -> Source:
    """Two validation clips of 20 frames, one to train."""
    rows = "c0.avi,0,test\nc1.avi,1,test\nc2.avi,0,train\n"
    (folder / "set" / "labels.csv").write_text(f"file,label,split\n{rows}")
    return open_source(f"clips:set@{numbers}", split, root=str(folder), channels=0)


def test_segments_are_the_first_and_the_last_frames_with_their_own_sound(folder: Path) -> None:
    source = segmented(folder, "8,3,3,96,16,2")
    assert len(source) == 4 and source.spec.counts == {"train": 1, "val": 4} and source.spec.fields["clip"].shape == ()
    records = [source[i] for i in range(4)]
    assert [(int(each["clip"]), each["label"], source.name(i)[-6:]) for i, each in enumerate(records)] == [
        (0, 0, "c0.avi"),
        (1, 1, "c1.avi"),
        (0, 0, "c0.avi"),
        (1, 1, "c1.avi"),
    ]
    # Of frames 0, 3, ..., 18 the last three start at 12, though a window of nine frames could start at 11.
    for record, start in zip(records, (0, 0, 12, 12), strict=True):
        np.testing.assert_allclose(record["video"][:, 4, 4, 1], BRIGHTNESS[start : start + 9 : 3], atol=4)
    # The tone begins after one second; 0.9 seconds are 88 rows, the last 0.8 seconds 78.
    silent, heard = (record["spectrogram"].mean(1) for record in records[::2])
    assert np.ptp(silent[:88]) < 0.1 and heard[:78].min() > silent[:88].max() + 0.2
    with pytest.raises(IndexError):
        source[4]


def test_three_segments_short_clips_and_the_training_split(folder: Path) -> None:
    middle = segmented(folder, "8,3,3,96,16,3")[2]
    np.testing.assert_allclose(middle["video"][:, 4, 4, 1], BRIGHTNESS[6:15:3], atol=4)
    short = segmented(folder, "8,9,3,96,16,2")
    np.testing.assert_array_equal(short[0]["video"], short[2]["video"])
    np.testing.assert_array_equal(short[0]["spectrogram"], short[2]["spectrogram"])
    train = segmented(folder, "8,3,3,96,16,2", "train")
    assert len(train) == 1 and train[0]["clip"] == 0
    np.testing.assert_allclose(train[0]["video"][:, 4, 4, 1], BRIGHTNESS[5:14:3], atol=4)
    # Spread over all nine frames of the window, to the last: 0, 4 and 8 from its start.
    drawn, start = sample_record(train, 0, np.random.default_rng(5)), int(np.random.default_rng(5).integers(0, 12))
    assert start > 0
    np.testing.assert_allclose(drawn["video"][:, 4, 4, 1], BRIGHTNESS[[start, start + 4, start + 8]], atol=4)
    with pytest.raises(UserError, match="1 segment is the middle"):
        segmented(folder, "8,3,3,96,16,1")


def test_an_even_choice_of_records_keeps_whole_clips(folder: Path) -> None:
    source = LimitedSource(segmented(folder, "8,3,3,96,16,2"), 2)
    assert [int(source[i]["clip"]) for i in range(2)] == [0, 0]
    assert not np.array_equal(source[0]["video"], source[1]["video"])


def test_the_configs_transform_draws_once_for_all_frames(folder: Path) -> None:
    """A clip's frames are transformed as its first frame alone is by the element's own generator, whichever loader makes the batch."""
    source = open_source("clips:set@16,5,2,96,16", "train", root=str(folder), channels=0, own_crop=False)
    steps = make_transform((("rand_augment", {"operations": 4}), ("random_resized_crop", {"scale": (0.08, 0.5)}), ("flip", {})), 0, 16)
    pipeline, other = (Pipeline(source, steps, batch_size=2, seed=4, threads=threads) for threads in (0, 2))
    plain = Pipeline(source, make_transform(()), batch_size=2, seed=4).batch(3)
    with other.iterate(3) as batches:
        later = next(batches)
    batch = pipeline.batch(3)
    np.testing.assert_array_equal(batch["video"], later["video"])
    np.testing.assert_array_equal(batch["spectrogram"], plain["spectrogram"])
    for row in range(2):
        draws = [generator(4, 6 + row, "transform") for _ in range(5)]
        np.testing.assert_array_equal(batch["video"][row], [steps(f, draw) for f, draw in zip(plain["video"][row], draws, strict=True)])
    with pytest.raises(UserError, match=r"makes \(5, 12, 12, 3\) of clips \(5, 16, 16, 3\)"):
        Pipeline(source, make_transform((("resize", {"size": 12}),)), batch_size=2, seed=4).batch(0)


def write_clip(path: Path, waveform: np.ndarray) -> None:
    """An MP4 of 20 grey frames and, where there are samples at 8 kHz, two channels of sound, the second half as loud."""
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("mpeg4", rate=int(FRAME_RATE))
        pictures.width, pictures.height = 24, 16
        track = container.add_stream("aac", rate=8000, layout="stereo") if len(waveform) else None
        for _ in range(20):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(np.full((16, 24, 3), 90, np.uint8))))
        container.mux(pictures.encode())
        if track is None:
            return
        for begin in range(0, len(waveform), 1024):
            both = np.stack([waveform[begin : begin + 1024], waveform[begin : begin + 1024] / 2]).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(both, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = 8000, begin
            container.mux(track.encode(frame))
        container.mux(track.encode())


def test_clips_without_sound_files_bring_their_own_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = tmp_path / "set" / "video"
    videos.mkdir(parents=True)
    time = np.arange(16_000) / 8000
    write_clip(videos / "a.mp4", np.sin(2 * np.pi * 440 * time) * (time >= 1) * 0.5)
    write_clip(videos / "mute.mp4", np.zeros(0))
    (tmp_path / "set" / "labels.csv").write_text("file,words\na.mp4,one\nmute.mp4,two\n")
    heard = read_sound(Store(videos), "a.mp4")
    assert len(heard) == pytest.approx(32_000, abs=2400)  # at 16 kHz, up to a packet at each end
    np.testing.assert_allclose(heard[20_000:30_000].std(), 0.75 * 0.5 / np.sqrt(2), rtol=0.02)
    assert np.abs(heard[2000:14_000]).max() < 0.02
    source = open_source("clips:set@8,5,2,96,16", "train", root=str(tmp_path), channels=0, val_percent=0.0)
    record = source[0]
    assert len(source) == 2 and record["label"] == -1
    loudness = record["spectrogram"].mean(1)
    assert loudness[60:].min() > loudness[:40].max()
    with pytest.raises(BadRecord, match="mute.mp4 has no sound"):
        source[1]
    (videos / "broken.mp4").write_bytes(b"nothing of the kind")
    with pytest.raises(BadRecord, match="broken.mp4"):
        read_sound(Store(videos), "broken.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="install PyAV"):
        read_sound(Store(videos), "mute.mp4")


def test_recordings_alone_at_another_rate(folder: Path) -> None:
    write_sound(folder / "set" / "audio" / "low.wav", np.full(8000, 0.25), rate=8000)
    (folder / "set" / "labels.csv").write_text("file,emotion,label\nc0.wav,calm,0\nlow.wav,sad,1\nc1.wav,sad,1\nc2.wav,calm,0\n")
    source = open_source("audio:set@98,16", "train", root=str(folder), channels=0, val_percent=0.0)
    assert source.spec.class_names == ("calm", "sad") and len(source) == 4
    assert source[1]["spectrogram"].shape == (98, 16) and source[1]["label"] == 1


def test_crops_lie_inside_and_are_of_the_known_sizes() -> None:
    crops = [draw_crop(np.random.default_rng(i), 160) for i in range(200)]
    assert {size for crop in crops for size in crop[2:]} == {160, 140, 120, 105}
    assert all(top + height <= 160 and left + width <= 160 and min(top, left) >= 0 for top, left, height, width in crops)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("clips:set@8,5", "5 positive numbers: .* and maybe SEGMENTS"),
        ("clips:set@8,5,2,96,16,2,2", "5 positive numbers"),
        ("audio:sat@98,16", "did you mean 'set'"),
        ("audio:set/video@98,16", "no file"),
        ("audio:set@98,16", "not in .*audio, for example c0.avi"),
    ],
)
def test_mistakes_name_what_is_wrong(folder: Path, source: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_source(source, "train", root=str(folder), channels=0)


def test_spoken_digits_pair_recordings_with_moving_scans(folder: Path) -> None:
    (folder / "set" / "labels.csv").write_text("file,digit,split\nc0.wav,3,train\nc1.wav,7,test\n")
    source = open_source("spoken_digits:set@16,4,98,16", "train", root=str(folder), channels=0)
    record, drawn = source[0], source.sample(0, np.random.default_rng(0))
    assert record["video"].shape == (4, 16, 16, 1) and record["label"] == 3
    np.testing.assert_array_equal(record["video"], source[0]["video"])
    assert not np.array_equal(record["video"], drawn["video"])
    assert (record["video"] > 0).any((1, 2, 3)).all()
