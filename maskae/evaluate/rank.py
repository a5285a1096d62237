"""Does the representation use its dimensions: effective rank and spread, two signs of collapse that a loss curve hides."""

from __future__ import annotations

import numpy as np

from maskae.evaluate.threads import limited_threads


def effective_rank(features: np.ndarray, max_examples: int = 25_600) -> float:
    """exp(entropy of s / sum(s)), s the singular values of the centred features [N, D]; between 1 and min(N - 1, D).

    0.0 where the rows do not differ beyond float32 rounding (a collapsed encoder, one row, zeros): rounding noise has full rank, so
    singular values below that noise count as zero. Independent of scale, shift and rotation. With more rows than `max_examples`, evenly
    spaced ones are used (the estimate has converged by then, RankMe appendix).

    Source: Roy and Vetterli 2007; RankMe (arXiv 2210.02885) eq. 1, here on centred features, so that a common offset is not a dimension.
    """
    rows = features[:: -(-len(features) // max_examples)].astype(np.float64)
    noise = np.finfo(np.float32).eps * np.linalg.norm(rows)
    centred = rows - rows.mean(axis=0)
    with limited_threads(centred.size):
        gram = centred.T @ centred if centred.shape[0] >= centred.shape[1] else centred @ centred.T
        singular = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0.0, None))
    singular = singular[singular > noise]
    if not len(singular):
        return 0.0
    share = singular / singular.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


def feature_std(features: np.ndarray) -> float:
    """Mean over channels of the standard deviation of the L2-normalised features [N, D], times sqrt(D).

    1.0 for isotropic features, 0.0 when all rows point the same way. Zero rows stay zero. Independent of the scale of each row.

    Source: the collapse diagnostic of SimSiam (arXiv 2011.10566), section 4.1.
    """
    rows = features.astype(np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(length > 0, length, 1.0)
    return float(unit.std(axis=0).mean() * np.sqrt(rows.shape[1]))
