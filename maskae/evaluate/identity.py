"""Whether generated images are of whom they should be, look like them, and vary as they should (Vec2Face, arXiv 2409.02979)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from maskae.evaluate.evaluators import column, labelled
from maskae.evaluate.features import Features
from maskae.evaluate.knn import unit_rows


def signal_to_noise(images: np.ndarray, others: np.ndarray) -> float:
    """PSNR in dB of values in 0..1, [N, ...] twice: of the mean squared error over all records."""
    return float(-10 * np.log10(max(float(np.square(images - others).mean()), 1e-12)))


@dataclass(frozen=True)
class Identity:
    """Validation records with an image generated from each one's vector; the features are those of `maskae.systems.vec2face`.

    `identity_similarity`: mean cosine of the generated image's vector to the original's; `identity_similarity_of_strangers`: to those of
    records of other labels. `identity_accuracy`: the label whose training records' mean vector is nearest to the generated image's;
    `identity_accuracy_of_originals` of the real one's. `reconstruction_psnr` beside `mean_image_psnr`, in dB. `variation_<i>`: 1 minus the
    mean cosine between the images of a vector and of its i-th variation.
    """

    needs_labels: ClassVar[bool] = True
    keys: ClassVar[tuple[str, ...]] = ("pooled", "generated", "pixels", "generated_pixels", "kept")

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        """The means come from the training records. Raises UserError where a feature is missing."""
        of_train, of_val = labelled(train, val)
        known, own = unit_rows(column(train, "pooled", "train")), unit_rows(column(val, "pooled", "val"))
        made = unit_rows(column(val, "generated", "val"))
        labels = np.unique(of_train)
        means = unit_rows(np.stack([known[of_train == label].mean(0) for label in labels]))  # [K, D]
        cosines = made @ own.T  # [N, N]
        strangers = of_val[:, None] != of_val[None]
        pixels, painted = column(val, "pixels", "val"), column(val, "generated_pixels", "val")
        found = {
            "identity_similarity": float(np.diagonal(cosines).mean()),
            "identity_similarity_of_strangers": float(cosines[strangers].mean()) if strangers.any() else 0.0,
            "identity_accuracy": float((labels[(made @ means.T).argmax(1)] == of_val).mean()),
            "identity_accuracy_of_originals": float((labels[(own @ means.T).argmax(1)] == of_val).mean()),
            "reconstruction_psnr": signal_to_noise(pixels, painted),
            "mean_image_psnr": signal_to_noise(pixels, column(train, "pixels", "train").mean(0)),
        }
        kept = column(val, "kept", "val").mean(0)
        return found | {f"variation_{i + 1}": float(1 - value) for i, value in enumerate(kept)}
