"""GraphMAE's reference cases: node and graph tasks, the loss alone, and the node probe; molecules are in `graph_mae_molecules`.

They are replayed in double precision, as they were recorded: Adam makes whole steps of gradients that are small, and in single precision
those are rounding.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskae.errors import UserError, check_choice
from maskae.evaluate.node_probe import fit_node_probe
from maskae.interop.case import GRADIENT, Case, Reproduced, exact
from maskae.interop.graph_mae_layout import gradient_outputs, layout_of, load_variables, official_names
from maskae.interop.graph_mae_molecules import padded_rows, replay_molecules
from maskae.losses.reconstruction import scaled_cosine_error
from maskae.nn.graph_batch import POOLS, pool_nodes
from maskae.nn.graph_layers import Graph
from maskae.nn.node_masks import NodeMask, corrupt, mask_nodes
from maskae.optim import make_optimizer
from maskae.schedules import make_schedule
from maskae.systems.contract import Variables
from maskae.systems.graph_mae import GraphMae

NORM_NAMES = {"none": "none", "batchnorm": "batch", "layernorm": "layer"}
LOSS_NAMES = {"sce": "scaled_cosine", "mse": "mse"}
NAMED_INPUTS = ("x", "edge_index", "label", "perm", "perm_mask", "noise_perm", "graph_id", "train_val_test_mask")
OPTIMIZERS, MOMENTUM = ("adam", "adamw", "sgd"), 0.9
ROUNDING = 1e-4  # more than the share of the sum of learning rates by which Adam moves a parameter whose gradient is rounding


class Part(NamedTuple):
    """One network of a case with its recorded inputs: `seen` is the graph without the dropped edges, which the encoder gets."""

    name: str
    options: dict[str, Any]
    system: GraphMae
    variables: Variables
    x: jax.Array
    graph: Graph
    seen: Graph
    mask: NodeMask


def system_of(options: dict[str, Any]) -> GraphMae:
    """The system with a part's own options. Raises UserError for what the released code does not run with, or what is not rebuilt here."""
    check_choice("norm", options["norm"] or "none", NORM_NAMES)
    check_choice("loss_fn", options["loss_fn"], LOSS_NAMES)
    if options["decoder"] == "gat" and options.get("num_out_heads", 1) != 1:
        raise UserError(f"num_out_heads={options['num_out_heads']}: a GAT decoder of several heads does not have the features' width")
    return GraphMae(
        width=options["num_hidden"],
        depth=options["num_layers"],
        heads=options["num_heads"],
        encoder=options["encoder"],
        decoder=options["decoder"],
        activation=options["activation"] or "none",
        norm=NORM_NAMES[options["norm"] or "none"],
        residual=bool(options["residual"]),
        input_dropout=options["in_drop"],
        attention_dropout=options["attn_drop"],
        negative_slope=options["negative_slope"],
        mask_rate=options["mask_rate"],
        replace_rate=options["replace_rate"],
        edge_drop_rate=options["drop_edge_rate"],
        loss_name=LOSS_NAMES[options["loss_fn"]],
        exponent=options["alpha_l"],
        concat_hidden=options["concat_hidden"],
    )


def plain_graph(senders: np.ndarray, receivers: np.ndarray, nodes: int) -> Graph:
    """A graph without padding."""
    return Graph(jnp.asarray(senders), jnp.asarray(receivers), jnp.ones(len(senders), bool), jnp.ones(nodes, bool))


def part_of(case: Case, name: str) -> Part:
    """The recorded weights, inputs and draws of one part."""
    options, inputs = case.record["config"][name], under(case.inputs, name)
    system, x, nodes = system_of(options), jnp.asarray(inputs["x"], float), len(inputs["x"])
    batch = {"nodes": x[None]}
    variables = load_variables(under(case.weights, name), jax.eval_shape(lambda: system.init(jax.random.key(0), batch)), layout_of(system))
    senders, receivers = inputs["edge_index"]
    graph = seen = plain_graph(senders, receivers, nodes)
    if system.edge_drop_rate > 0:
        kept, loops = kept_edges(inputs), np.arange(nodes)
        seen = plain_graph(np.concatenate([senders[kept], loops]), np.concatenate([receivers[kept], loops]), nodes)
    mixed, donors = (jnp.asarray(inputs[draw]) if draw in inputs else None for draw in ("perm_mask", "noise_perm"))
    mask = mask_nodes(jnp.asarray(inputs["perm"]), nodes, system.mask_rate, system.replace_rate, mixed, donors)
    return Part(name, options, system, variables, x, graph, seen, mask)


def kept_edges(inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Numbers of the edges that DropEdge keeps: the record has an outcome per edge (1 keeps it) or the numbers, under a name of its own.

    Raises UserError where no tensor is left that could be either.
    """
    edges = inputs["edge_index"].shape[1]
    unknown = {name: value for name, value in inputs.items() if name not in NAMED_INPUTS and value.ndim == 1}
    for value in unknown.values():
        if len(value) == edges and np.isin(value, (0, 1)).all():
            return np.flatnonzero(value)
    for value in unknown.values():
        if value.dtype.kind == "i" and len(np.unique(value)) == len(value) and value.max(initial=0) < edges:
            return value
    raise UserError("drop_edge_rate is above 0, but the inputs do not say which edges were kept")


def under(tensors: dict[str, np.ndarray], part: str) -> dict[str, np.ndarray]:
    """The tensors of a part, without its name in front."""
    return {name.removeprefix(f"{part}/"): value for name, value in tensors.items() if name.startswith(f"{part}/")}


def losses_of(part: Part, params: Any, state: Any) -> tuple[jax.Array, Any]:
    """The part's training loss with its recorded draws, and the moved batch statistics."""
    system = part.system
    hidden, state = system.encode(params, state, corrupt(part.x, part.mask, params["mask_token"]), part.seen, train=True)
    named, state = system.decode(params, state, hidden, part.graph, part.mask, rows=part.mask.nodes)
    return system.error(named["recon"], part.x[part.mask.nodes], part.mask.counted), state


def replay_forward(part: Part) -> dict[str, Any]:
    """Masked input, every layer, the decoder's input and output, the loss, the embedding of the unmasked graph."""
    system, (params, state) = part.system, part.variables

    @jax.jit
    def forward(params: Any) -> dict[str, Any]:
        use_x = corrupt(part.x, part.mask, params["mask_token"])
        encoder = system.modules(part.x.shape[-1])["encoder"]
        variables = {"params": params["encoder"]} | {name: value["encoder"] for name, value in state.items() if "encoder" in value}
        hidden, collected = encoder.apply(variables, use_x, part.seen, None, True, mutable=["intermediates", "batch_stats"])
        named, _ = system.decode(params, state, hidden, part.graph, part.mask)
        named |= {f"hidden{number}": rows for number, rows in enumerate(hidden)}
        for name, sown in collected.get("intermediates", {}).items():
            named[name.replace("layer_", "attention_layer")] = sown["attention"][0]
        loss, _ = losses_of(part, params, state)
        return named | {"use_x": use_x, "loss": loss, "embed": system.encode(params, state, part.x, part.graph)[0][-1]}

    found = {name: Reproduced(value) for name, value in forward(params).items()}
    return {f"{part.name}/{name}": value for name, value in (found | {"mask_nodes": exact(part.mask.nodes)}).items()}


def replay_gradients(part: Part, recorded: dict[str, np.ndarray]) -> dict[str, Reproduced]:
    """`grad/<part>/<name>` and `gradnorm/<part>/<name>` of the loss."""
    params, state = part.variables
    gradient = jax.jit(jax.grad(lambda p: losses_of(part, p, state)[0]))(params)
    return gradient_outputs(part.name, official_names(gradient, layout_of(part.system)), recorded)


def replay_training(part: Part) -> dict[str, Reproduced]:
    """Steps on the same draws: losses, learning rates, what the first step and all steps did to the variables."""
    options, (params, state) = part.options, part.variables
    epochs, steps = options.get("max_epoch", 1), options.get("steps", 1)
    schedule = make_schedule("cosine" if options.get("scheduler") else "constant", peak=options["lr"], total_steps=epochs)
    rates = [float(schedule(number)) for number in range(max(epochs, steps))]
    rule = options.get("optimizer", "adam")
    check_choice("optimizer", rule, OPTIMIZERS)
    optimizer = make_optimizer(rule, schedule=schedule, weight_decay=options["weight_decay"], no_decay=(), momentum=MOMENTUM)

    @jax.jit
    def step(params: Any, state: Any, moments: Any, number: jax.Array) -> tuple[Any, ...]:
        (loss, state), gradient = jax.value_and_grad(lambda p: losses_of(part, p, state), has_aux=True)(params)
        updates, moments = optimizer.update(gradient, moments, params, number)
        return jax.tree.map(jnp.add, params, updates), state, moments, loss

    layout, moments, losses = layout_of(part.system), optimizer.init(params), []
    first, found = official_names(params, layout), {}
    for number in range(steps):
        params, state, moments, loss = step(params, state, moments, jnp.asarray(number))
        losses.append(float(loss))
        if number == 0:
            named = official_names(params, layout, state)
            found = {f"after1/{name}": Reproduced(value, GRADIENT, ROUNDING * rates[0]) for name, value in named.items()}
    moved = {name: np.linalg.norm(value - first[name]) for name, value in official_names(params, layout).items()}
    found |= {f"delta_norm/{name}": Reproduced(value, GRADIENT, ROUNDING * sum(rates[:steps])) for name, value in moved.items()}
    found |= {"step_losses": Reproduced(losses), "lr_used": Reproduced(rates[:steps]), "lr_schedule": Reproduced(rates[:epochs])}
    return {f"{part.name}/{name}": value for name, value in found.items()}


def replay_pools(part: Part, owner: np.ndarray) -> dict[str, Reproduced]:
    """Pooled embeddings of the graphs of a batch; owner int [N] is the graph of each node."""
    tokens, node_mask = padded_rows(part.system.encode(*part.variables, part.x, part.graph)[0][-1], owner)
    return {f"{part.name}/pool_{pool}": Reproduced(pool_nodes(tokens, node_mask, pool)) for pool in POOLS}


def replay_probe(case: Case, part: Part) -> dict[str, Reproduced]:
    """The linear probe on the part's embeddings, from its recorded start."""
    options, inputs, start = part.options, under(case.inputs, part.name), under(case.weights, "probe")
    embeddings = part.system.encode(*part.variables, part.x, part.graph)[0][-1]
    splits = [(embeddings[mask > 0], jnp.asarray(inputs["label"][mask > 0])) for mask in inputs["train_val_test_mask"]]
    params = {"kernel": jnp.asarray(start["linear.weight"].T, float), "bias": jnp.asarray(start["linear.bias"], float)}
    arguments = {"learning_rate": options["lr_f"], "weight_decay": options["weight_decay_f"], "epochs": options["max_epoch_f"]}
    probe = fit_node_probe(params, *splits, **arguments)
    logits = embeddings @ probe.params["kernel"] + probe.params["bias"]
    accuracies = [probe.last, probe.selected]
    found = {"logits": logits, "weight": probe.params["kernel"].T, "bias": probe.params["bias"]}
    return {f"probe/{name}": Reproduced(value) for name, value in found.items()} | {
        "probe/test_acc_last_and_early_stop": Reproduced(accuracies)
    }


def replay_loss(case: Case) -> dict[str, Reproduced]:
    """The scaled cosine error alone, for every recorded exponent."""
    x, y = (jnp.asarray(case.inputs[f"sce/{name}"], float) for name in "xy")
    found = {"sce/cos": Reproduced(1 - scaled_cosine_error(x, y, 1.0))}
    for name in case.outputs:
        if name.startswith("sce/loss_alpha"):
            exponent = float(name.removeprefix("sce/loss_alpha"))
            found[name] = Reproduced(scaled_cosine_error(x, y, exponent).mean())
    return found


def replay(case: Case) -> dict[str, Reproduced]:
    """Every recorded output of a GraphMAE case that is there to compare."""
    with jax.enable_x64(True):
        found = replay_loss(case) if "sce/x" in case.inputs else {}
        for name, options in case.record["config"].items():
            if f"{name}/x" in case.inputs:
                found |= replay_part(case, name) if "encoder" in options else replay_molecules(case, name)
        return {name: dataclasses.replace(each, value=np.asarray(each.value)) for name, each in found.items()}


def replay_part(case: Case, name: str) -> dict[str, Reproduced]:
    """Every recorded output of a node or graph task."""
    part = part_of(case, name)
    found = replay_forward(part) | replay_gradients(part, case.outputs) | replay_training(part)
    if f"{name}/graph_id" in case.inputs:
        found |= replay_pools(part, case.inputs[f"{name}/graph_id"])
    if f"{name}/train_val_test_mask" in case.inputs and "probe/linear.weight" in case.weights:
        found |= replay_probe(case, part)
    return found
