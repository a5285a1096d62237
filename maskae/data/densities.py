"""`density:NAME` or `density:NAME@20000`: points drawn from a density whose closed form is known (`maskae.densities.DENSITIES`).

Records hold `x` float32 [d]; the label is the component of a mixture of a few, else there is none. Training draws a fresh point for every
record that it reads; the listed records, 10,000 of both splits together unless said after the @, are for evaluation.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from maskae.data.contract import SPLITS, Record, Source, SourceArguments
from maskae.data.spec import LABEL, NO_LABEL, DataSpec, Field, split_hash
from maskae.densities import DENSITIES, Mixture
from maskae.errors import UserError, nearest

DEFAULT_COUNT = 10_000
MOST_CLASSES = 12
POINT = "x"


@dataclass(frozen=True)
class DensitySource:
    """Points of one split.

    Attributes:
      mixture: where they come from.
      factors: Cholesky factors of its covariances, float64 [K, d, d].
      points: float32 [N, d].
      labels: int32 [N], -1 where there is none.
      spec: of the whole data set.
    """

    mixture: Mixture
    factors: np.ndarray
    points: np.ndarray
    labels: np.ndarray
    spec: DataSpec

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Record:
        return {POINT: self.points[index], LABEL: int(self.labels[index])}

    def sample(self, index: int, generator: np.random.Generator) -> Record:
        """A fresh point, whatever the index."""
        points, components = draw_points(self.mixture, self.factors, generator, 1)
        return {POINT: points[0], LABEL: int(components[0]) if self.spec.num_classes else NO_LABEL}

    def name(self, index: int) -> str:
        """`density:spiral record 17`."""
        return f"{self.spec.name} record {index}"


def draw_points(
    mixture: Mixture, factors: np.ndarray, generator: np.random.Generator, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """`count` points, float32 [count, d], and the component of each, int [count]. `factors`: see `DensitySource`."""
    edges = np.cumsum(mixture.weights)
    components = np.minimum(np.searchsorted(edges, generator.random(count), side="right"), len(edges) - 1)
    normal = generator.standard_normal((count, mixture.means.shape[1]))
    points = mixture.means[components] + np.einsum("nij,nj->ni", factors[components], normal)
    return points.astype(np.float32), components


def open_density(arguments: SourceArguments) -> Source:
    """One split of a density's points. Raises UserError for an unknown density or a count that is no number above 1."""
    name, at, text = arguments.path.partition("@")
    if name not in DENSITIES:
        raise UserError(f"{arguments.name}: unknown density '{name}'{nearest(name, DENSITIES)}; there are {', '.join(DENSITIES)}")
    if at and (not text.isdecimal() or int(text) < 2):
        raise UserError(f"{arguments.name}: write the number of points after the @, as in density:{name}@{DEFAULT_COUNT}")
    count, mixture = int(text) if at else DEFAULT_COUNT, DENSITIES[name]()
    factors = np.linalg.cholesky(mixture.covariances)
    generator = np.random.default_rng([arguments.split_seed, zlib.crc32(name.encode())])
    points, components = draw_points(mixture, factors, generator, count)
    classes = len(mixture.weights) if 1 < len(mixture.weights) <= MOST_CLASSES else None
    labels = components.astype(np.int32) if classes else np.full(count, NO_LABEL, np.int32)
    held_out = round(count * arguments.val_percent / 100)
    rows = {"train": slice(held_out, None), "val": slice(0, held_out)}
    members = {split: [(str(i), int(labels[i])) for i in range(count)[rows[split]]] for split in SPLITS}
    spec = DataSpec(
        name=arguments.name,
        image_shape=None,
        channels=0,
        mean=(),
        std=(),
        num_classes=classes,
        class_names=tuple(f"component {number}" for number in range(classes or 0)),
        counts={split: len(listed) for split, listed in members.items()},
        split_hash=split_hash(members["train"], members["val"]),
        fields={POINT: Field((mixture.means.shape[1],), "float32")},
        details={"density": name},
    )
    part = rows[arguments.split]
    return DensitySource(mixture, factors, points[part], labels[part], spec)
