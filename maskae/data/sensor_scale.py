"""How the values of sensors become uint8: that of SatMAE, SeCo and CROMA, from mean - 2 std to mean + 2 std of a channel, clipped.

Values that are not finite numbers are missing: they are left out of mean and std, and become 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskae.errors import UserError

DEVIATIONS = 2.0
# Of a mean: far below any contrast worth having, and far above what float32, in which values are scaled, can tell apart.
LEAST_DEVIATION = 1e-5


@dataclass(frozen=True)
class ClippedScale:
    """What each channel's 0 and 255 stand for: `low` and `high`, as many values as channels."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def measured(cls, images: Iterable[np.ndarray]) -> ClippedScale:
        """From mean - 2 std to mean + 2 std over all pixels of images [..., c]. Raises UserError for a channel without any value."""
        count, total, squares = np.zeros(()), np.zeros(()), np.zeros(())
        for image in images:
            values = image.reshape(-1, image.shape[-1]).astype(np.float64)
            known = np.isfinite(values)
            values[~known] = 0
            count, total, squares = count + known.sum(0), total + values.sum(0), squares + np.square(values).sum(0)
        if not count.all():
            raise UserError("no record with values in every channel can be read to measure the sensors' range")
        mean = total / count
        reach = DEVIATIONS * np.sqrt(np.maximum(squares / count - mean**2, 1e-12 + (LEAST_DEVIATION * mean) ** 2))
        return cls(tuple((mean - reach).tolist()), tuple((mean + reach).tolist()))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """[..., c] of any number type -> uint8 [..., c], clipped; 0 where a value is missing."""
        low, high = np.asarray(self.low, np.float32), np.asarray(self.high, np.float32)
        values = image.astype(np.float32)
        values = np.where(np.isfinite(values), values, low)
        return np.round(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def sensor_details(scales: dict[str, ClippedScale], colours: tuple[int, int, int]) -> dict[str, Any]:
    """What a system may want to know: which optical channels are red, green and blue, and what 0 and 255 stand for."""
    ranges = {name: {"low": list(scale.low), "high": list(scale.high)} for name, scale in scales.items()}
    return {"optical_colours": list(colours), "ranges": ranges}
