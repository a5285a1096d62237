"""What a representation is worth: extract features once, run the evaluators on them.

    evaluators = make_evaluators({"knn": {"ks": (20,)}, "rank": {}})
    train, val = (extract(features_fn, batches, needed_keys(evaluators)) for batches in splits)
    metrics = run(evaluators, train, val, seed=0)

No evaluator looks at validation labels before its last line: whatever it chooses, it chooses on training rows.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from maskae.errors import UserError, check_arguments, check_choice
from maskae.evaluate.accuracy import Accuracy
from maskae.evaluate.detection import Detection
from maskae.evaluate.emotion import Recall
from maskae.evaluate.evaluators import Attentive, Clustering, Evaluator, Knn, Linear, Logistic, Rank, Ridge
from maskae.evaluate.features import Features, extract, raw_pixels, standardise, to_host
from maskae.evaluate.few_shot import FewShot
from maskae.evaluate.graph_svm import GraphSvm
from maskae.evaluate.identity import Identity
from maskae.evaluate.label_fractions import LabelFractions
from maskae.evaluate.matched import Matched
from maskae.evaluate.missing_cells import MissingCells
from maskae.evaluate.multilabel import MultiLabel
from maskae.evaluate.node_clusters import NodeClusters
from maskae.evaluate.node_probe import NodeProbeEvaluator
from maskae.evaluate.score_field import Denoising, ScoreField

__all__ = [
    "EVALUATORS",
    "Evaluator",
    "Features",
    "extract",
    "has_labels",
    "make_evaluators",
    "needed_keys",
    "raw_pixels",
    "run",
    "standardise",
    "to_host",
]

EVALUATORS: dict[str, type] = {
    "accuracy": Accuracy,
    "attentive": Attentive,
    "clustering": Clustering,
    "denoising": Denoising,
    "detection": Detection,
    "few_shot": FewShot,
    "graph_svm": GraphSvm,
    "identity": Identity,
    "knn": Knn,
    "label_fractions": LabelFractions,
    "linear": Linear,
    "logistic": Logistic,
    "matched": Matched,
    "missing_cells": MissingCells,
    "multilabel": MultiLabel,
    "node_clusters": NodeClusters,
    "node_probe": NodeProbeEvaluator,
    "rank": Rank,
    "recall": Recall,
    "ridge": Ridge,
    "score_field": ScoreField,
}


def make_evaluators(arguments: Mapping[str, Mapping[str, Any]]) -> dict[str, Evaluator]:
    """Evaluators by name, from {name in EVALUATORS: its arguments}; lists become tuples, a number a tuple of one where one is expected.

    Raises:
        UserError: an unknown evaluator or argument, named with the nearest right one, or an argument out of its range.
    """
    evaluators = {}
    for name, given in arguments.items():
        check_choice("evaluator", name, EVALUATORS)
        fields = {field.name: field for field in dataclasses.fields(EVALUATORS[name])}
        check_arguments(f"evaluator '{name}'", given, EVALUATORS[name])
        values = {argument: _checked(f"{name}.{argument}", value, fields[argument]) for argument, value in given.items()}
        evaluators[name] = EVALUATORS[name](**values)
    return evaluators


def _checked(name: str, value: Any, field: dataclasses.Field[Any]) -> Any:
    """`value` in the form of the field's default: a tuple, a number, a string, a truth value, or None where the type allows it."""
    optional = str(field.type).endswith("| None")
    if optional and value is None:
        return None
    if not isinstance(field.default, tuple):
        return _of_kind(name, value, int if field.default is None else type(field.default))
    items = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(_of_kind(name, item, type(field.default[0])) for item in items)


def _of_kind(name: str, value: Any, kind: type) -> Any:
    accepted = (int, float) if kind is float else kind
    # bool is a kind of int in Python, but True is no number of epochs.
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{name} = {value!r}: it takes a value of type {kind.__name__}")
    return value


def needed_keys(evaluators: Mapping[str, Evaluator]) -> tuple[str, ...]:
    """All features that the evaluators read, each once, in order."""
    return tuple(dict.fromkeys(key for evaluator in evaluators.values() for key in evaluator.keys))


def has_labels(features: Features) -> bool:
    """Whether every example has a label."""
    return "label" in features and bool((features["label"] >= 0).all())


def run(evaluators: Mapping[str, Evaluator], train: Features | None, val: Features, seed: int = 0) -> dict[str, float]:
    """The metrics of all evaluators in one dict; those that need labels are left out, with a line in the log, where labels are missing.

    `train` may be None where no evaluator reads it (`reads_train` False).
    """
    metrics: dict[str, float] = {}
    complete = has_labels(val) and (train is None or has_labels(train))
    for name, evaluator in evaluators.items():
        if evaluator.needs_labels and not complete:
            logging.info("evaluator '%s' is left out: it needs labels, and the data has examples without", name)
            continue
        metrics.update(evaluator(train or {}, val, seed))
    return metrics
