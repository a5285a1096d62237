"""How the clusters that a system itself assigns to the nodes of a graph meet their classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from maskae.errors import UserError, nearest
from maskae.evaluate.clustering import clustering_metrics, fill_empty_clusters
from maskae.evaluate.features import Features


@dataclass(frozen=True)
class NodeClusters:
    """`cluster_accuracy`, `cluster_macro_f1`, `cluster_nmi`, `cluster_ari` of the most probable clusters; needs no seed.

    Args:
        feature: soft or hard one-hot assignments [graphs, N, C].
        fill_empty: as the released code of SCGC, see `fill_empty_clusters`; it changes predictions, and never should be on but for that.
    """

    feature: str = "assignment"
    fill_empty: bool = False
    needs_labels: ClassVar[bool] = False  # a graph's nodes have labels, the graph has none
    reads_train: ClassVar[bool] = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The features that it reads."""
        return (self.feature, "node_label")

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        for name in self.keys:
            if name not in val:
                raise UserError(f"node_clusters needs '{name}'{nearest(name, val)}; there are {', '.join(sorted(val))}")
        scores, labels = val[self.feature], val["node_label"].astype(np.int32)
        if scores.ndim != 3 or scores.shape[:2] != labels.shape:
            raise UserError(f"node_clusters: '{self.feature}' {scores.shape} and node labels {labels.shape} do not fit")
        if not np.isfinite(scores).all():
            raise UserError(f"feature '{self.feature}' is not finite: the system has diverged")
        labels = labels.reshape(-1)
        assigned = scores.reshape(-1, scores.shape[-1]).argmax(1)
        if self.fill_empty:
            assigned = fill_empty_clusters(assigned, len(np.unique(labels)))
        return clustering_metrics(assigned, labels)
