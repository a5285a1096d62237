"""How near an estimated score is to a density's, and what a denoiser does to held-out records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from maskae.densities import DENSITIES, score, widened
from maskae.errors import UserError, nearest
from maskae.evaluate.evaluators import column
from maskae.evaluate.features import Features


def root_mean_square(values: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Of the lengths of rows [N, ...], by `weights` [N] (which need not sum to 1) where they are given; in double precision."""
    squares = np.square(np.asarray(values, np.float64)).reshape(len(values), -1).sum(1)
    return float(np.sqrt(np.average(squares, weights=None if weights is None else np.asarray(weights, np.float64))))


@dataclass(frozen=True)
class ScoreField:
    """Root mean squares over validation records of the feature `score` [N, d] less a closed form's at `x` [N, d].

    `score_error` is from the gradient of log p, `score_error_of_optimum` what the best possible denoiser has of it, `score_from_optimum`
    the distance to that denoiser's score, the gradient of log p_sigma, and `score_size` the size of the gradient itself.

    Args:
        density: a name of `maskae.densities.DENSITIES`, the one that the records come from.
        sigma: the noise that the denoiser was trained with.
    """

    density: str = "mixture"
    sigma: float = 0.1
    keys: ClassVar[tuple[str, ...]] = ("x", "score")
    needs_labels: ClassVar[bool] = False
    reads_train: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.density not in DENSITIES:
            hint = nearest(self.density, DENSITIES)
            raise UserError(f"score_field.density={self.density}: unknown{hint}; there are {', '.join(DENSITIES)}")
        if self.sigma <= 0:
            raise UserError(f"score_field.sigma={self.sigma}: it must be positive")

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        """Of the validation records. Raises UserError where they have another number of dimensions than the density."""
        x, estimated = (column(val, key, "val") for key in self.keys)
        mixture = DENSITIES[self.density]()
        if x.shape[1] != mixture.means.shape[1]:
            raise UserError(f"score_field: '{self.density}' has {mixture.means.shape[1]} dimensions, the records have {x.shape[1]}")
        points = jnp.asarray(x)
        true, best = np.asarray(score(mixture, points)), np.asarray(score(widened(mixture, self.sigma), points))
        return {
            "score_error": root_mean_square(estimated - true),
            "score_error_of_optimum": root_mean_square(best - true),
            "score_from_optimum": root_mean_square(estimated - best),
            "score_size": root_mean_square(true),
        }


@dataclass(frozen=True)
class Denoising:
    """What denoising does to validation records.

    `error_left` is the squared error after denoising over that of the noise, `density_above_shuffled` the share of records whose estimated
    log density exceeds that of the same values in another order, and `jacobian_asymmetry` the mean |J - J^T| / |J| of the map.

    Args:
        shuffled: whether the second one is wanted; in a few dimensions another order says little.
        asymmetry: whether the last one is wanted; systems have it in few dimensions only.
    """

    shuffled: bool = True
    asymmetry: bool = True
    needs_labels: ClassVar[bool] = False
    reads_train: ClassVar[bool] = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The features that it reads."""
        optional = {"log_density_gain": self.shuffled, "asymmetry": self.asymmetry}
        return ("noisy_error", "denoised_error", *(key for key, wanted in optional.items() if wanted))

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        """Of the validation records. Raises UserError where a feature is missing or not finite."""
        found = {key: column(val, key, "val", 1).astype(np.float64) for key in self.keys}
        metrics = {"error_left": float(found["denoised_error"].sum() / found["noisy_error"].sum())}
        if self.shuffled:
            metrics["density_above_shuffled"] = float((found["log_density_gain"] > 0).mean())
        if self.asymmetry:
            metrics["jacobian_asymmetry"] = float(found["asymmetry"].mean())
        return metrics
