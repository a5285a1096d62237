"""Node classification on frozen embeddings, by the protocol of self-supervised graph papers (DGI; GraphMAE's released code).

One linear layer on the raw embeddings is trained full-batch by Adam on the training nodes. The test accuracy is read twice: after the last
epoch, and at the epoch with the best validation accuracy (of equals, the later).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maskae.errors import UserError, nearest
from maskae.evaluate.evaluators import check_positive
from maskae.evaluate.features import Features
from maskae.optim import make_optimizer
from maskae.schedules import make_schedule

SPLIT_MASKS = ("train_mask", "val_mask", "test_mask")


class NodeProbe(NamedTuple):
    """The probe after its last epoch, and the accuracies (shares in 0..1) after every epoch."""

    params: dict[str, jax.Array]  # kernel [D, K], bias [K]
    val: jax.Array  # [epochs]
    test: jax.Array  # [epochs]

    @property
    def last(self) -> float:
        """Test accuracy after the last epoch."""
        return float(self.test[-1])

    @property
    def selected(self) -> float:
        """Test accuracy at the epoch of the best validation accuracy, the later of equals."""
        best = len(self.val) - 1 - int(np.argmax(np.asarray(self.val)[::-1]))
        return float(self.test[best])


def initial_probe(key: jax.Array, width: int, classes: int) -> dict[str, jax.Array]:
    """Kernel [D, K] and bias [K], uniform within 1/sqrt(D), torch's default for a linear layer."""
    kernel_key, bias_key = jax.random.split(key)
    bound = width**-0.5
    draw = partial(jax.random.uniform, minval=-bound, maxval=bound)
    return {"kernel": draw(kernel_key, (width, classes)), "bias": draw(bias_key, (classes,))}


@partial(jax.jit, static_argnames=("learning_rate", "weight_decay", "epochs"))
def fit_node_probe(
    params: dict[str, jax.Array],
    train: tuple[jax.Array, jax.Array],
    val: tuple[jax.Array, jax.Array],
    test: tuple[jax.Array, jax.Array],
    *,
    learning_rate: float,
    weight_decay: float,
    epochs: int,
) -> NodeProbe:
    """Trains the linear layer `params` on `train`; each split is (embeddings float32 [n, D], labels int [n])."""
    schedule = make_schedule("constant", peak=learning_rate, total_steps=epochs)
    optimizer = make_optimizer("adam", schedule=schedule, weight_decay=weight_decay, no_decay=())

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        logits = train[0] @ params["kernel"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, train[1]).mean()

    def accuracy(params: dict[str, jax.Array], split: tuple[jax.Array, jax.Array]) -> jax.Array:
        return ((split[0] @ params["kernel"] + params["bias"]).argmax(-1) == split[1]).mean()

    def epoch(carry: tuple[Any, Any], number: jax.Array) -> tuple[tuple[Any, Any], tuple[jax.Array, jax.Array]]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params, number)
        params = jax.tree.map(jnp.add, params, updates)
        return (params, state), (accuracy(params, val), accuracy(params, test))

    (params, _), (val_accuracy, test_accuracy) = jax.lax.scan(epoch, (params, optimizer.init(params)), jnp.arange(epochs))
    return NodeProbe(params, val_accuracy, test_accuracy)


def node_splits(features: Features, key: str) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """(embeddings, labels) of the training, validation and test nodes of ONE graph, and the number of classes.

    Raises UserError where the features are not those of one whole graph, or a split has no nodes.
    """
    for name in (key, "node_label", *SPLIT_MASKS):
        if name not in features:
            raise UserError(f"node_probe needs '{name}'{nearest(name, features)}; there are {', '.join(sorted(features))}")
    if len(features[key]) != 1:
        raise UserError(f"node_probe evaluates the nodes of one graph, and the split has {len(features[key])} graphs: use graph_svm")
    embeddings, labels = features[key][0], features["node_label"][0].astype(np.int32)
    if not np.isfinite(embeddings).all():
        raise UserError(f"feature '{key}' is not finite: the encoder has diverged")
    splits = []
    for name in SPLIT_MASKS:
        rows = np.flatnonzero(features[name][0])
        if not len(rows):
            raise UserError(f"node_probe: '{name}' marks no node; this data set has no such split")
        splits.append((embeddings[rows], labels[rows]))
    return splits, int(labels.max()) + 1


@dataclass(frozen=True)
class NodeProbeEvaluator:
    """`node_probe_top1` after the last epoch and `node_probe_selected_top1`, on the test nodes of one graph."""

    learning_rate: float = 0.01
    weight_decay: float = 1e-4
    epochs: int = 300
    feature: str = "tokens"
    needs_labels: ClassVar[bool] = False  # a graph's nodes have labels, the graph has none

    def __post_init__(self) -> None:
        check_positive("node_probe", learning_rate=self.learning_rate, epochs=self.epochs)
        if self.weight_decay < 0:
            raise UserError(f"node_probe.weight_decay = {self.weight_decay}: must not be negative")

    @property
    def keys(self) -> tuple[str, ...]:
        """The features that it reads."""
        return (self.feature, "node_label", *SPLIT_MASKS)

    def __call__(self, train: Features, val: Features, seed: int = 0) -> dict[str, float]:
        splits, classes = node_splits(train, self.feature)
        params = initial_probe(jax.random.key(seed), splits[0][0].shape[1], classes)
        arguments = {"learning_rate": float(self.learning_rate), "weight_decay": float(self.weight_decay), "epochs": self.epochs}
        probe = fit_node_probe(params, *splits, **arguments)
        return {"node_probe_top1": probe.last, "node_probe_selected_top1": probe.selected}
