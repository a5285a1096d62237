"""The evaluators: plain arguments, called with cached features of both splits, the same inside and outside of training.

An evaluator's default feature (`pooled`; `tokens` for the attentive probe) gives metrics by their plain name (`knn_top1_k20`); any other
kind is named in front (`cls_knn_top1_k20`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from maskae.errors import UserError, nearest
from maskae.evaluate import probe
from maskae.evaluate.attentive import attentive_probe
from maskae.evaluate.clustering import clustering_metrics, kmeans
from maskae.evaluate.features import Features
from maskae.evaluate.knn import knn_accuracy
from maskae.evaluate.linear import linear_probe
from maskae.evaluate.logistic import logistic_probe
from maskae.evaluate.rank import effective_rank, feature_std
from maskae.evaluate.ridge import ridge_probe


@runtime_checkable
class Evaluator(Protocol):
    """Features of the training and the validation split (`maskae.evaluate.extract`) and a seed -> metrics, a pure function.

    One with `reads_train` False (optional) never looks at the training features, and may be given {}. `fields` (optional) are those of its
    keys that the data must give.
    """

    needs_labels: ClassVar[bool]

    @property
    def keys(self) -> tuple[str, ...]:
        """The features that it reads."""

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        """Metrics by name. Raises UserError for features or labels that are missing or unusable."""


def column(features: Features, key: str, split: str, dimensions: int = 2) -> np.ndarray:
    """`features[key]`. Raises UserError where it is missing, has another number of dimensions, no rows, or values that are not finite."""
    if key not in features:
        raise UserError(f"no feature '{key}' of the {split} split{nearest(key, features)}; there are {', '.join(sorted(features))}")
    array = features[key]
    if array.ndim != dimensions:
        shape = "[rows, channels]" if dimensions == 2 else "[rows, tokens, channels]"
        raise UserError(f"feature '{key}' has shape {list(array.shape)}; this evaluator needs {shape}")
    if not len(array):
        raise UserError(f"the {split} split has no examples to evaluate")
    # One pass without a mask of the array's size: sums of finite float32 values are finite in float64.
    if not math.isfinite(array.sum(dtype=np.float64)):
        rows = int((~np.isfinite(array.reshape(len(array), -1)).all(axis=1)).sum())
        raise UserError(f"feature '{key}' is not finite in {rows} of the {len(array)} {split} examples: the encoder has diverged")
    return array


def classes_of(features: Features, split: str) -> np.ndarray:
    """Labels int [rows]. Raises UserError where examples have none (-1)."""
    if "label" not in features:
        raise UserError(f"the {split} split has no labels, which this evaluator needs")
    missing = int((features["label"] < 0).sum())
    if missing:
        raise UserError(f"{missing} of the {len(features['label'])} {split} examples have no label, which this evaluator needs")
    return features["label"]


def labelled(train: Features, val: Features) -> tuple[np.ndarray, np.ndarray]:
    """The labels of both splits, checked by `classes_of`."""
    return classes_of(train, "train"), classes_of(val, "val")


def check_positive(evaluator: str, **values: Any) -> None:
    """Raises UserError for a number (or a number in a sequence) that is not above zero, and for an empty sequence."""
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if not numbers or any(isinstance(number, (str, bool)) or not number > 0 for number in numbers):
            raise UserError(f"{evaluator}.{name} = {value}: must be above zero")


@dataclass(frozen=True)
class OverFeatures:
    """What the evaluators share: the kinds of features that they read, each evaluated by itself and named."""

    features: tuple[str, ...] = ("pooled",)
    needs_labels: ClassVar[bool] = True

    @property
    def keys(self) -> tuple[str, ...]:
        """The features that it reads."""
        return self.features

    def each(self, metrics: Callable[[str], dict[str, float]]) -> dict[str, float]:
        """The metrics of each kind of feature, under its names."""
        plain = type(self).features[0]
        return {name if key == plain else f"{key}_{name}": value for key in self.keys for name, value in metrics(key).items()}

    def each_labelled(self, train: Features, val: Features, metrics: Callable[..., dict[str, float]]) -> dict[str, float]:
        """`metrics(train features, train labels, val features, val labels)` of each kind of feature, under its names."""
        train_labels, val_labels = labelled(train, val)
        return self.each(lambda key: metrics(column(train, key, "train"), train_labels, column(val, key, "val"), val_labels))


@dataclass(frozen=True)
class Knn(OverFeatures):
    """Weighted cosine kNN: `knn_top1_k<k>`, `knn_top5_k<k>` (see `knn_accuracy`). Needs no seed."""

    ks: tuple[int, ...] = (10, 20)
    temperature: float = 0.07
    bank_block: int = 16384
    query_block: int = 1024

    def __post_init__(self) -> None:
        check_positive("knn", ks=self.ks, temperature=self.temperature, bank_block=self.bank_block, query_block=self.query_block)

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        accuracy = partial(knn_accuracy, ks=self.ks, temperature=self.temperature, bank_block=self.bank_block, query_block=self.query_block)
        return self.each_labelled(train, val, accuracy)


@dataclass(frozen=True)
class Linear(OverFeatures):
    """Linear probe: `linear_top1` of the entry chosen on held-out training rows, and its place in the grid (see `linear_probe`).

    Several kinds of features are one more dimension of the grid, not separate metrics.
    """

    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    weight_decays: tuple[float, ...] = (0.0, 1e-3, 1e-2)
    epochs: int = 100
    batch_size: int = 256
    held_out_percent: float = 10.0
    report_grid: bool = False

    def __post_init__(self) -> None:
        check_positive("linear", learning_rates=self.learning_rates, epochs=self.epochs, batch_size=self.batch_size)

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        train_labels, val_labels = labelled(train, val)
        entries = linear_probe(
            {key: column(train, key, "train") for key in self.keys},
            train_labels,
            {key: column(val, key, "val") for key in self.keys},
            val_labels,
            learning_rates=self.learning_rates,
            weight_decays=self.weight_decays,
            epochs=self.epochs,
            batch_size=self.batch_size,
            held_out_percent=self.held_out_percent,
            seed=seed,
        )
        return probe.grid_metrics("linear", entries, report_grid=self.report_grid)


@dataclass(frozen=True)
class Logistic(OverFeatures):
    """The digits protocol: `logistic_top1`, `logistic_<n>_per_class_top1` (see `logistic_probe`)."""

    c: float = 1.0
    labels_per_class: int | None = 10
    draws: int = 5

    def __post_init__(self) -> None:
        check_positive("logistic", c=self.c, draws=self.draws)
        if self.labels_per_class is not None:
            check_positive("logistic", labels_per_class=self.labels_per_class)

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        fitted = partial(logistic_probe, c=self.c, labels_per_class=self.labels_per_class, draws=self.draws, seed=seed)
        return self.each_labelled(train, val, fitted)


@dataclass(frozen=True)
class Ridge(OverFeatures):
    """Closed-form probe: `ridge_top1`, penalty by leave-one-out (see `ridge_probe`). Needs no seed."""

    penalties: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)

    def __post_init__(self) -> None:
        check_positive("ridge", penalties=self.penalties)

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        return self.each_labelled(train, val, partial(ridge_probe, penalties=self.penalties))


@dataclass(frozen=True)
class Attentive(OverFeatures):
    """Attentive probe on tokens: `attentive_top1` of the entry chosen on held-out training rows (see `attentive_probe`)."""

    features: tuple[str, ...] = ("tokens",)
    heads: int = 4
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    weight_decays: tuple[float, ...] = (0.01,)
    epochs: int = 50
    batch_size: int = 128
    held_out_percent: float = 10.0
    report_grid: bool = False

    def __post_init__(self) -> None:
        check_positive("attentive", heads=self.heads, learning_rates=self.learning_rates, epochs=self.epochs, batch_size=self.batch_size)

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        train_labels, val_labels = labelled(train, val)

        def metrics(key: str) -> dict[str, float]:
            entries = attentive_probe(
                column(train, key, "train", dimensions=3),
                train_labels,
                column(val, key, "val", dimensions=3),
                val_labels,
                heads=self.heads,
                learning_rates=self.learning_rates,
                weight_decays=self.weight_decays,
                epochs=self.epochs,
                batch_size=self.batch_size,
                held_out_percent=self.held_out_percent,
                seed=seed,
            )
            return probe.grid_metrics("attentive", entries, report_grid=self.report_grid)

        return self.each(metrics)


@dataclass(frozen=True)
class Rank(OverFeatures):
    """Signs of collapse, of the validation features: `effective_rank`, `feature_std`. Needs no labels and no seed."""

    max_examples: int = 25_600
    needs_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive("rank", max_examples=self.max_examples)

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        def metrics(key: str) -> dict[str, float]:
            array = column(val, key, "val")
            return {"effective_rank": effective_rank(array, self.max_examples), "feature_std": feature_std(array)}

        return self.each(metrics)


@dataclass(frozen=True)
class Clustering(OverFeatures):
    """k-means of the validation features against their classes: `cluster_accuracy`, `cluster_nmi`, `cluster_ari`, `cluster_macro_f1`.

    `clusters` None: as many as there are classes.
    """

    clusters: int | None = None
    restarts: int = 10
    reads_train: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive("clustering", restarts=self.restarts)
        if self.clusters is not None:
            check_positive("clustering", clusters=self.clusters)

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        labels = classes_of(val, "val")
        clusters = self.clusters or len(np.unique(labels))

        def metrics(key: str) -> dict[str, float]:
            return clustering_metrics(kmeans(column(val, key, "val"), clusters, restarts=self.restarts, seed=seed), labels)

        return self.each(metrics)
