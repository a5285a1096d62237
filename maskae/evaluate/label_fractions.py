"""What a representation is worth when labels shrink: a probe on frozen features, fitted on ever smaller parts of the labelled rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from sklearn.linear_model import LogisticRegression

from maskae.errors import UserError, check_choice, nearest
from maskae.evaluate.detection import macro_auc
from maskae.evaluate.evaluators import OverFeatures, check_positive
from maskae.evaluate.features import Features, standardise
from maskae.evaluate.threads import limited_threads

SAMPLERS = ("stratified", "shuffled", "first")
MAX_ITERATIONS = 300


def draw_fraction(labels: np.ndarray, fraction: float, seed: int, sampler: str) -> np.ndarray:
    """Positions of the rows that keep their labels, in growing order; a function of the arguments alone.

    Args:
        labels: int [N].
        fraction: in (0, 1].
        sampler: "stratified" keeps this share of every class, rounded, at least one row; "shuffled" floor(fraction * N) rows of a fixed
            shuffle (the CT study's COVID-CT); "first" the first floor(fraction * N) rows (its OrganSMNIST, in file order).

    Raises:
        UserError: a sampler that does not exist, or no row left.
    """
    check_choice("sampler", sampler, SAMPLERS)
    generator = np.random.default_rng(seed)
    if sampler == "stratified":
        rows = []
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            rows.append(generator.permutation(members)[: max(1, round(fraction * len(members)))])
        return np.sort(np.concatenate(rows))
    count = int(fraction * len(labels))
    if count < 1:
        raise UserError(f"a fraction of {fraction} of {len(labels)} labelled rows is none at all")
    return np.sort(generator.permutation(len(labels))[:count]) if sampler == "shuffled" else np.arange(count)


def fraction_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    val: np.ndarray,
    val_labels: np.ndarray,
    *,
    fractions: Sequence[float],
    draws: int = 3,
    sampler: str = "stratified",
    c: float = 1.0,
    seed: int = 0,
) -> dict[str, float]:
    """Logistic regression on each share of the labels (Wolf et al. 2023, arXiv 2308.06534, with a probe in place of fine-tuning).

    Features are standardised by the statistics of ALL training rows, which need no labels; the draws depend on labels and seed alone, so
    that encoders are compared on the same rows.

    Args:
        train: [N, D] with train_labels int [N]. val: [M, D] with val_labels int [M].
        fractions: each in (0, 1]. draws: averaged, of each fraction that is below 1.
        sampler: see `draw_fraction`. c: inverse strength of the L2 penalty.

    Returns:
        `labels_<percent>_top1` (which is the micro-F1 as well) and `labels_<percent>_auc` (macro, one against the rest), means over the
        draws, and `labels_<percent>_top1_std` over them.
    """
    classes = int(max(train_labels.max(), val_labels.max())) + 1
    fitted, scored = standardise(train, val)
    metrics: dict[str, float] = {}
    for fraction in fractions:
        accuracies, areas = [], []
        for draw in range(draws if fraction < 1 and sampler != "first" else 1):
            rows = draw_fraction(train_labels, fraction, seed * draws + draw, sampler)
            probabilities = np.zeros((len(scored), classes))
            known = np.unique(train_labels[rows])
            if len(known) > 1:
                with limited_threads(fitted.size), warnings.catch_warnings():
                    # scikit-learn takes a few rows of many classes for a regression.
                    warnings.simplefilter("ignore", UserWarning)
                    model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS).fit(fitted[rows], train_labels[rows])
                    probabilities[:, known] = model.predict_proba(scored)
            else:
                probabilities[:, known] = 1.0
            accuracies.append(float((probabilities.argmax(1) == val_labels).mean()))
            areas.append(macro_auc(probabilities, val_labels))
        name = f"labels_{100 * fraction:g}_percent"
        metrics |= {f"{name}_top1": float(np.mean(accuracies)), f"{name}_auc": float(np.mean(areas))}
        metrics[f"{name}_top1_std"] = float(np.std(accuracies))
    return metrics


@dataclass(frozen=True)
class LabelFractions(OverFeatures):
    """A probe on shrinking shares of the labels: `labels_<percent>_percent_top1` and `..._auc` (see `fraction_probe`)."""

    fractions: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03)
    draws: int = 3
    sampler: str = "stratified"
    c: float = 1.0

    def __post_init__(self) -> None:
        check_positive("label_fractions", fractions=self.fractions, draws=self.draws, c=self.c)
        if max(self.fractions) > 1:
            raise UserError(f"label_fractions.fractions = {self.fractions}: shares are at most 1")
        if self.sampler not in SAMPLERS:
            known = ", ".join(SAMPLERS)
            raise UserError(f"label_fractions.sampler = '{self.sampler}'{nearest(self.sampler, SAMPLERS)}; there are {known}")

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        probe = partial(fraction_probe, fractions=self.fractions, draws=self.draws, sampler=self.sampler, c=self.c, seed=seed)
        return self.each_labelled(train, val, probe)
