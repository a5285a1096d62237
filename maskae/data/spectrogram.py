"""Log-mel spectrograms of waveforms in the manner of Kaldi's filter bank (numpy, double precision inside)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from maskae.errors import UserError

WINDOW_SECONDS, SHIFT_SECONDS = 0.025, 0.010
PREEMPHASIS = 0.97
# The smallest step of float32 at 1: the floor under the logarithm.
FLOOR = float(np.finfo(np.float32).eps)
LOWEST_HERTZ = 20.0
# Mean and standard deviation of AudioSet's log-mel numbers, as AudioMAE's and HiCMAE's released code have them.
AUDIOSET_MEAN, AUDIOSET_DEVIATION = -4.2677393, 4.5689974


def _mel(hertz: np.ndarray | float) -> np.ndarray:
    return 1127.0 * np.log1p(np.asarray(hertz, np.float64) / 700.0)


@lru_cache(maxsize=8)
def mel_filters(bins: int, points: int, rate: int) -> np.ndarray:
    """float64 [points/2 + 1, bins]: triangles that are even in mel, from 20 Hz to half the sample rate, for a transform of `points`."""
    edges = np.linspace(_mel(LOWEST_HERTZ), _mel(rate / 2), bins + 2)  # [bins + 2]
    frequency = _mel(np.arange(points // 2) * rate / points)[:, None]  # [points/2, 1]
    rising = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0.0, np.minimum(rising, falling))  # [points/2, bins]
    # Half the sample rate itself belongs to no filter.
    return np.concatenate([filters, np.zeros((1, bins))])


def log_mel(waveform: np.ndarray, rate: int = 16_000, bins: int = 128) -> np.ndarray:
    """Waveform [N] -> float32 [frames, bins]: 25 ms frames every 10 ms that lie wholly inside, 1 + (N - 400) // 160 at 16 kHz.

    Each frame: less its mean, pre-emphasis 0.97, symmetric Hann window, power spectrum of the next power of two, mel sums, natural
    logarithm with a floor of 1.19e-7 (Kaldi without dither and energy). Raises UserError for anything but one channel.
    """
    if waveform.ndim != 1:
        raise UserError(f"a spectrogram is of one channel, not of an array of shape {waveform.shape}")
    window, shift = round(rate * WINDOW_SECONDS), round(rate * SHIFT_SECONDS)
    if len(waveform) < window:
        return np.zeros((0, bins), np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(np.asarray(waveform, np.float64), window)[::shift]  # [frames, window]
    frames = frames - frames.mean(1, keepdims=True)
    # The first sample is its own predecessor.
    frames = frames - PREEMPHASIS * np.concatenate([frames[:, :1], frames[:, :-1]], 1)
    points = 1 << (window - 1).bit_length()
    power = np.abs(np.fft.rfft(frames * np.hanning(window), points)) ** 2  # [frames, points/2 + 1]
    return np.log(np.maximum(power @ mel_filters(bins, points, rate), FLOOR)).astype(np.float32)


def fit_length(spectrogram: np.ndarray, frames: int) -> np.ndarray:
    """[T, bins] cut, or filled up with zeros, to [frames, bins]."""
    missing = max(0, frames - len(spectrogram))
    return np.pad(spectrogram[:frames], ((0, missing), (0, 0)))


def normalise_spectrogram(spectrogram: np.ndarray) -> np.ndarray:
    """(x - mean) / (2 deviation) of AudioSet. Filling comes before it, so filled frames hold 0.467."""
    return ((spectrogram - AUDIOSET_MEAN) / (2 * AUDIOSET_DEVIATION)).astype(np.float32)


def speech_input(waveform: np.ndarray, frames: int, *, rate: int = 16_000, bins: int = 128, gain: float = 1.0) -> np.ndarray:
    """HiCMAE's audio input: mean removed, times `gain`, log-mel, fitted to `frames`, normalised; [N] -> float32 [frames, bins]."""
    waveform = np.asarray(waveform, np.float64)
    centred = (waveform - waveform.mean()) if len(waveform) else waveform
    return normalise_spectrogram(fit_length(log_mel(centred * gain, rate, bins), frames))
