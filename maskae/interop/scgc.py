"""SCGC's reference cases: both variants' training on a small graph, the evaluation code, and the graph of nearest neighbours."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskae.data.neighbourhoods import SIMILARITIES, knn_edges, neighbourhood_weights, transition_matrix
from maskae.errors import UserError, check_choice
from maskae.evaluate.clustering import clustering_metrics, fill_empty_clusters
from maskae.interop.case import GRADIENT, Case, Reproduced, exact
from maskae.interop.graph_mae_layout import gradient_outputs, linear, load_variables, official_names
from maskae.interop.layout import VALUE, Layout, Rule
from maskae.interop.munkres import munkres_matching
from maskae.losses.neighbourhood import Neighbourhood, neighbourhood_contrast
from maskae.losses.soft_clusters import sharpened_target
from maskae.optim import make_optimizer
from maskae.schedules import make_schedule
from maskae.systems.contract import Params
from maskae.systems.scgc import Scgc
from maskae.vectors import unit

METRICS = ("cluster_accuracy", "cluster_nmi", "cluster_ari", "cluster_macro_f1")
MODELS = {"SCGC": True, "SCGC_TRIM": False}  # whether there is a decoder
TERMS = {"kl_loss": "cluster", "ncontrast_loss": "contrast", "re_loss": "reconstruction"}


class Part(NamedTuple):
    """One variant with its recorded weights and graph."""

    name: str
    options: dict[str, Any]
    system: Scgc
    params: Params
    x: jax.Array
    gamma: np.ndarray  # [N, N]
    pairs: Neighbourhood


def layout_of(system: Scgc) -> Layout:
    """The names of the released code."""
    depth = len(system.hidden)
    rules = [Rule("centres", ("cluster_layer",), VALUE)]
    for half, short, last in (("encoder", "enc", "z_layer"), ("decoder", "dec", "x_bar_layer")):
        for number in range(depth + 1):
            rules += linear(f"{half}/layer_{number}", f"ae.{last if number == depth else f'{short}_{number + 1}'}")
    return Layout(tuple(rules))


def part_of(case: Case, name: str, transition: Any) -> Part:
    """The recorded weights of a part, on the case's graph. Raises UserError for a model of the released code that is another system."""
    shared, options = case.record["config"], case.record["config"][name]
    check_choice("model", options["model"], MODELS)
    system = Scgc(
        clusters=shared["n_clusters"],
        hidden=tuple(shared["widths"]),
        latent=shared["n_z"],
        decode=MODELS[options["model"]],
        scale=options["tau"],
        contrast_weight=options["alpha"],
        cluster_weight=options["beta"],
        freedom=shared.get("v", 1.0),
    )
    x = jnp.asarray(case.inputs["x"])
    weights = {key.removeprefix(f"{name}/"): value for key, value in case.weights.items() if key.startswith(f"{name}/")}
    template = jax.eval_shape(lambda: system.init(jax.random.key(0), {"nodes": x[None]}))
    params = load_variables(weights, template, layout_of(system)).params
    gamma = neighbourhood_weights(transition, options["order"], total=bool(options["influence"])).tocoo()
    pairs = Neighbourhood(*(jnp.asarray(array) for array in (gamma.row, gamma.col, gamma.data.astype(np.float32))))
    return Part(name, options, system, params, x, gamma.toarray(), pairs)


def replay_forward(part: Part) -> dict[str, Reproduced]:
    """Every recorded tensor of the first pass, and the losses."""
    system, params, autoencoder = part.system, part.params, part.system.autoencoder

    @jax.jit
    def forward(params: Params) -> dict[str, jax.Array]:
        hidden = autoencoder.hidden_layers(params, "encoder", part.x)
        codes = hidden[-1]
        found = {f"enc_h{number + 1}": rows for number, rows in enumerate(hidden[:-1])}
        assignment = system.assign(params, codes)
        found |= {"z": codes, "q": assignment, "p": sharpened_target(assignment)}
        directions = unit(codes)
        found["feature_dis"] = jnp.where(jnp.eye(len(codes), dtype=bool), 0.0, directions @ directions.T)
        if system.decode:
            found["x_bar"] = autoencoder.decode(params, codes)
        terms = system.terms(params, part.x, part.pairs)
        return found | {name: terms[own] for name, own in TERMS.items() if own in terms} | {"loss": system.total(terms)}

    found = {name: Reproduced(value) for name, value in forward(params).items()} | {"gamma": Reproduced(part.gamma)}
    codes = jax.lax.stop_gradient(autoencoder.encode(params, part.x))
    slope = jax.jit(jax.grad(lambda z: neighbourhood_contrast(z, part.pairs, system.scale)))(codes)
    found["dnc_dz"] = Reproduced(slope, GRADIENT)
    return {f"{part.name}/{name}": value for name, value in found.items()}


def replay_training(case: Case, part: Part) -> dict[str, Reproduced]:
    """Gradients of the first step, the losses and metrics of every epoch before its step, and what the last one left."""
    system, labels = part.system, case.inputs["label"]
    optimizer = make_optimizer("adam", schedule=make_schedule("constant", peak=part.options["lr"], total_steps=1), no_decay=())

    def objective(params: Params) -> tuple[jax.Array, tuple[dict[str, jax.Array], jax.Array]]:
        terms = system.terms(params, part.x, part.pairs)
        return system.total(terms), (terms, assignment_of(part, params))

    @jax.jit
    def step(params: Params, moments: Any, number: jax.Array) -> tuple[Any, ...]:
        (loss, (terms, assignment)), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        updates, moments = optimizer.update(gradient, moments, params, number)
        return jax.tree.map(jnp.add, params, updates), moments, loss, terms, assignment, gradient

    params, moments, history, metrics, found = part.params, optimizer.init(part.params), [], [], {}
    for number in range(part.options["epochs"]):
        params, moments, loss, terms, assignment, gradient = step(params, moments, jnp.asarray(number))
        history.append([float(loss), *(float(terms.get(own, 0.0)) for own in TERMS.values())])
        metrics.append(official_metrics(np.asarray(assignment).argmax(1), labels)[0])
        if number == 0:
            found = gradient_outputs(part.name, official_names(gradient, layout_of(system)), case.outputs)
    final = official_names(params, layout_of(system))
    ends = {"final_q": assignment_of(part, params), "final_cluster_layer": final["cluster_layer"]}
    ends |= {f"final_{name.removeprefix('ae.').replace('.', '_')}": value for name, value in final.items() if name.startswith("ae.")}
    named = {name: Reproduced(value, GRADIENT) for name, value in ends.items()}
    named |= {"history": Reproduced(np.asarray(history).T), "metrics": Reproduced(np.asarray(metrics))}
    return found | {f"{part.name}/{name}": value for name, value in named.items()}


def assignment_of(part: Part, params: Params) -> jax.Array:
    """Soft assignment of every node, [N, C]."""
    return part.system.assign(params, part.system.autoencoder.encode(params, part.x))


def official_metrics(assigned: np.ndarray, labels: np.ndarray) -> tuple[list[float], np.ndarray]:
    """ACC, NMI, ARI and macro-F1 as the released code computes them, and the predictions as it leaves them."""
    labels = labels - labels.min()
    filled = fill_empty_clusters(assigned, len(np.unique(labels)))
    found = clustering_metrics(filled, labels, official_matching)
    return [found[name] for name in METRICS], filled


def official_matching(assigned: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The class of each row's cluster, int [N]; of equally good matchings the one that the released code finds.

    Raises UserError where there are not as many clusters as classes: the released code ends in an error there.
    """
    (classes, of_labels), (clusters, of_assigned) = (np.unique(each, return_inverse=True) for each in (labels, assigned))
    if len(classes) != len(clusters):
        raise UserError(f"{len(clusters)} clusters and {len(classes)} classes: the released evaluation wants as many")
    agreement = np.zeros((len(classes), len(clusters)), np.int64)
    np.add.at(agreement, (of_labels, of_assigned), 1)
    return classes[munkres_matching(agreement).argsort()][of_assigned]


def replay_metrics(case: Case) -> dict[str, Reproduced]:
    """The evaluation code alone: clusters under other names, an empty cluster, labels from 1."""
    pairs = {"pair1": ("pred", "label"), "pair2": ("pred_empty", "label"), "pair3": ("pred", "label_from_1")}
    found = {}
    for name, (assigned, labels) in pairs.items():
        if f"metric/{assigned}" in case.inputs and f"metric/{labels}" in case.inputs:
            numbers, changed = official_metrics(case.inputs[f"metric/{assigned}"], case.inputs[f"metric/{labels}"])
            found[f"metric/{name}"] = Reproduced(numbers)
            found[f"metric/{name}_changed_pred"] = exact(changed)
    return found


def replay_knn(case: Case) -> dict[str, Reproduced]:
    """Which rows are neighbours of which, as 0/1 [N, N]."""
    found = {}
    for similarity in SIMILARITIES:
        if "knn/x" in case.inputs and f"knn/{similarity}" in case.outputs:
            rows = case.inputs["knn/x"]
            table = np.zeros((len(rows), len(rows)), np.int32)
            table[tuple(knn_edges(rows, case.record["config"]["knn_k"], similarity))] = 1
            found[f"knn/{similarity}"] = exact(table)
    return found


def replay(case: Case) -> dict[str, Reproduced]:
    """Every recorded output of a SCGC case."""
    found = replay_metrics(case) | replay_knn(case)
    parts = [name for name, options in case.record["config"].items() if isinstance(options, dict) and "model" in options]
    transition = transition_matrix(case.inputs["edges"].T, len(case.inputs["x"]))
    found["A_hat"] = Reproduced(transition.toarray())
    for name in parts:
        part = part_of(case, name, transition)
        found |= replay_forward(part) | replay_training(case, part)
        if "kmeans_inertia" not in found:
            codes = np.asarray(part.system.autoencoder.encode(part.params, part.x), np.float64)
            distances = np.square(codes[:, None] - np.asarray(part.params["centres"], np.float64)).sum(-1)
            found["kmeans_inertia"] = Reproduced(distances.min(1).sum())
    return found
