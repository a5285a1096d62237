"""Time a GraphMAE training step on one graph against the plain ways of writing it, in one run, turn by turn.

    python tools/bench_graph.py --root shared/data --recipe cora

`plain` is the model as one writes it with JAX's ordinary pieces: dense products of all nodes, `segment_max` and `segment_sum` over the
edges, dropout by `jax.random.bernoulli`, autodiff. `plain sums` is ours with the sums over neighbours alone written that way, and with the
decoder's kernel before its sum. Before anything is timed the loss and the gradients of all are compared; for that `plain` gets the draws
of ours. Both wall time and processor time (of all threads) are shown: on a shared machine the second is the steadier.

On two CPU cores that nothing else used, two runs: a step of ours took 0.120 and 0.124 s, `plain` 2.46 and 2.41 times as long in wall time
(quartiles 2.31 to 2.50 and 2.38 to 2.46), `plain sums` 1.24 and 1.20. Where malloc gives freed memory back to the system (as it does when
MALLOC_... is set, see `maskae.host_memory`) ours took 0.168 s, `plain` 4.12 times (3.83 to 5.55) and `plain sums` 1.43 times as long: the
plain forms have larger arrays. So the sums with their own gradient give about 1.2 of the factor; the rest is the sparse first layer, and
dropout without a draw for each value.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from maskae.config import load_config
from maskae.errors import UserError
from maskae.experiment import build
from maskae.host_memory import keep_host_memory
from maskae.nn.graph_batch import TABLE
from maskae.nn.graph_layers import Graph, attention_weights, dropout, fold
from maskae.nn.node_masks import NodeMask, corrupt
from maskae.nn.sparse_nodes import MaskedWords
from maskae.step import init_train_state, make_train_step
from maskae.systems.graph_mae import GraphMae

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


class PlainSums(GraphMae):
    """The same system with its sums over neighbours written out edge by edge."""

    def decode(
        self,
        params: Any,
        state: Any,
        hidden: list[jax.Array],
        graph: Graph,
        mask: NodeMask,
        key: jax.Array | None = None,
        rows: jax.Array | None = None,
    ) -> tuple[dict[str, jax.Array], Any]:
        """As the original, of all nodes, from which `rows` are taken."""
        layer = params["decoder"]
        code = hidden[-1] @ params["encoder_to_decoder"]["kernel"]
        code = jnp.where(mask.masked[:, None], 0, code)
        values = dropout(code, self.input_dropout, fold(key, 0)) @ layer["kernel"][:, 0]  # [N, D]
        left, right = values @ layer["source"][0], values @ layer["target"][0]
        logits = jax.nn.leaky_relu(left[graph.senders] + right[graph.receivers], self.negative_slope)
        weights = dropout(attention_weights(logits[:, None], graph), self.attention_dropout, fold(key, 1))
        recon = jax.ops.segment_sum(weights * values[graph.senders], graph.receivers, values.shape[0]) + layer["bias"]
        return {"remasked": code, "recon": recon if rows is None else recon[rows]}, state


class PlainGraphMae(GraphMae):
    """GAT's loss from ordinary pieces; for graphs without padding, as the citation sets are."""

    def drop(self, x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
        """Dropout as everyone writes it."""
        return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)

    def first_input(self, x: jax.Array, graph: Graph, mask: NodeMask, token: jax.Array, key: jax.Array) -> jax.Array:
        """Corrupted and dropped features [N, D]."""
        return self.drop(corrupt(x, mask, token), self.input_dropout, key)

    def attend(self, values: jax.Array, layer: Any, graph: Graph, key: jax.Array) -> jax.Array:
        """Graph attention over values [N, H, width] -> [N, H * width]."""
        count = values.shape[0]
        left, right = ((values * layer[end]).sum(-1) for end in ("source", "target"))  # [N, H]
        logits = jax.nn.leaky_relu(left[graph.senders] + right[graph.receivers], self.negative_slope)  # [E, H]
        largest = jax.ops.segment_max(jax.lax.stop_gradient(logits), graph.receivers, count)
        exponents = jnp.exp(logits - largest[graph.receivers])
        weights = exponents / jax.ops.segment_sum(exponents, graph.receivers, count)[graph.receivers]
        weights = self.drop(weights, self.attention_dropout, key)
        return jax.ops.segment_sum(weights[..., None] * values[graph.senders], graph.receivers, count).reshape(count, -1) + layer["bias"]

    def loss_given_mask(self, params: Any, state: Any, graph: Graph, x: jax.Array, mask: NodeMask, key: Any) -> tuple[jax.Array, Any]:
        """As the original."""
        encoder_key, decoder_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        hidden = x
        for number in range(self.depth):
            layer, layer_key = params["encoder"][f"layer_{number}"], jax.random.fold_in(encoder_key, number)
            drop_key = jax.random.fold_in(layer_key, 0)
            if number == 0:
                hidden = self.first_input(x, graph, mask, params["mask_token"], drop_key)
            else:
                hidden = self.drop(hidden, self.input_dropout, drop_key)
            out = self.attend(jnp.tensordot(hidden, layer["kernel"], 1), layer, graph, jax.random.fold_in(layer_key, 1))
            hidden = jnp.where(out >= 0, out, layer["activation"]["slope"] * out)
        code = jnp.where(mask.masked[:, None], 0, hidden @ params["encoder_to_decoder"]["kernel"])
        code = self.drop(code, self.input_dropout, jax.random.fold_in(decoder_key, 0))
        values = jnp.tensordot(code, params["decoder"]["kernel"], 1)  # [N, 1, D]
        recon = self.attend(values, params["decoder"], graph, jax.random.fold_in(decoder_key, 1))
        return self.error(recon[mask.nodes], x[mask.nodes], mask.counted), state


class PlainWithOurDraws(PlainGraphMae):
    """For the comparison of values."""

    def drop(self, x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
        """Ours."""
        return dropout(x, rate, key)

    def first_input(self, x: jax.Array, graph: Graph, mask: NodeMask, token: jax.Array, key: jax.Array) -> jax.Array:
        """Ours, put together to the dense array."""
        if graph.words is None:
            return super().first_input(x, graph, mask, token, key)
        parts = MaskedWords(x, mask, token, graph.words)
        dense, values = parts.parts(lambda part, key: dropout(part, self.input_dropout, key), key)
        return jnp.zeros_like(x).at[graph.words.rows, graph.words.columns].set(values).at[mask.nodes].set(dense)


def seconds(function: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor time of one call, until its results are there."""
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(function())
    return time.perf_counter() - wall, time.process_time() - processor


def check_equal(after: dict[str, tuple[Any, Any]]) -> None:
    """Raises UserError where loss or gradients of the first step differ; Adam's first moment is a tenth of the gradient."""
    losses = {name: float(metrics["loss"]) for name, (_, metrics) in after.items()}
    moments = {name: jax.tree.leaves(state["opt"]["mu"]) for name, (state, _) in after.items()}
    largest = max(float(jnp.abs(leaf).max()) for leaf in moments["ours"])
    for name in after:
        worst = max(float(jnp.abs(a - b).max()) for a, b in zip(moments["ours"], moments[name], strict=True)) / largest
        off = abs(losses[name] / losses["ours"] - 1)
        print(f"{name}: loss {losses[name]:.6f}, off by {off:.1e}; gradients off by {worst:.1e} of the largest")
        if not (off <= LOSS_TOLERANCE and worst <= GRADIENT_TOLERANCE):
            raise UserError(f"'{name}' does not compute the same as ours")


def main(arguments: list[str]) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="tools/bench_graph.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=None, help="folder of the data")
    parser.add_argument("--recipe", default="cora", help="a variant of configs/graph_mae.py with one graph")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(arguments)
    try:
        recipe = str(Path(__file__).parent.parent / "configs" / f"graph_mae.py:{options.recipe}")
        experiment = build(load_config(recipe, [f"data.root={options.root}"] if options.root else []))
        kinds = {"plain sums": PlainSums, "plain": PlainGraphMae, "plain, our draws": PlainWithOurDraws}
        systems = {"ours": experiment.system} | {name: kind(**experiment.config.model.to_dict()) for name, kind in kinds.items()}
        whole = {name: jnp.asarray(value) for name, value in experiment.pipeline.batch(0).items()}
        untabled = {name: value for name, value in whole.items() if not name.startswith(TABLE)}
        batches = {name: whole if name == "ours" else untabled for name in systems}
        optimizer = experiment.optimizer
        state = init_train_state(systems["ours"], optimizer, jax.random.key(0), whole, ema=False)
        steps = {name: jax.jit(make_train_step(system, optimizer, lambda b, _: b, jax.random.key(0))) for name, system in systems.items()}
        after = {name: jax.block_until_ready(step(state, batches[name])) for name, step in steps.items()}
        del after["plain"], steps["plain, our draws"]
        check_equal(after)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    times = np.asarray([[seconds(partial(steps[name], state, batches[name])) for name in steps] for _ in range(options.repeats)])
    for kind, table in (("wall", times[..., 0]), ("processor", times[..., 1])):
        for name, column in zip(steps, table.T, strict=True):
            low, middle, high = np.percentile(column / table[:, 0], (25, 50, 75))
            print(f"{kind:9s} {name:10s} {np.median(column):.3f} s per step; over ours {middle:.2f}, quartiles {low:.2f} to {high:.2f}")
    return 0


if __name__ == "__main__":
    keep_host_memory()  # as maskae.main does
    sys.exit(main(sys.argv[1:]))
