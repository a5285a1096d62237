"""Time a GraphMAE training step on one graph against the plain way of writing it, in one run, turn by turn.

    python tools/bench_graph.py --root shared/data --recipe cora

The plain way multiplies by the decoder's kernel before it sums over neighbours, sums by `segment_sum` over the edges, reconstructs all
nodes, and leaves the backward pass to autodiff; masks, dropout and the encoder's first products are the same. Loss and gradients of both
are compared before they are timed. On two CPU cores shared with some fifteen processes the plain way took 1.41 times as long (quartiles
1.33 to 1.42 of nine turns; 1.40 to 1.64 of five in an earlier run). The aim is 2; a free machine has not been measured.
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
from maskae.nn.graph_batch import TABLE
from maskae.nn.graph_layers import Graph, attention_weights, dropout, fold
from maskae.nn.node_masks import NodeMask
from maskae.step import init_train_state, make_train_step
from maskae.systems.graph_mae import GraphMae

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


class PlainGraphMae(GraphMae):
    """The same system with its decoder written out edge by edge."""

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


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call, until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def check_equal(after: dict[str, tuple[Any, Any]]) -> None:
    """Raises UserError where loss or gradients of the first step differ; Adam's first moment is a tenth of the gradient."""
    losses = {name: float(metrics["loss"]) for name, (_, metrics) in after.items()}
    moments = {name: jax.tree.leaves(state["opt"]["mu"]) for name, (state, _) in after.items()}
    largest = max(float(jnp.abs(leaf).max()) for leaf in moments["plain"])
    worst = max(float(jnp.abs(a - b).max()) for a, b in zip(moments["ours"], moments["plain"], strict=True)) / largest
    off = abs(losses["ours"] / losses["plain"] - 1)
    print(f"loss {losses['plain']:.6f}, relative difference {off:.1e}; gradients differ by {worst:.1e} of the largest")
    if not (off <= LOSS_TOLERANCE and worst <= GRADIENT_TOLERANCE):
        raise UserError("the two do not compute the same")


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
        systems = {"ours": experiment.system, "plain": PlainGraphMae(**experiment.config.model.to_dict())}
        whole = {name: jnp.asarray(value) for name, value in experiment.pipeline.batch(0).items()}
        batches = {"ours": whole, "plain": {name: value for name, value in whole.items() if not name.startswith(TABLE)}}
        optimizer = experiment.optimizer
        state = init_train_state(systems["ours"], optimizer, jax.random.key(0), whole, ema=False)
        steps = {name: jax.jit(make_train_step(system, optimizer, lambda b, _: b, jax.random.key(0))) for name, system in systems.items()}
        check_equal({name: jax.block_until_ready(step(state, batches[name])) for name, step in steps.items()})
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    times = np.asarray([[seconds(partial(steps[name], state, batches[name])) for name in steps] for _ in range(options.repeats)])
    for name, column in zip(steps, times.T, strict=True):
        print(f"{name:6s} {np.median(column):.3f} s per step, quartiles {np.percentile(column, 25):.3f} to {np.percentile(column, 75):.3f}")
    ratios = times[:, 1] / times[:, 0]
    print(f"plain / ours {np.median(ratios):.2f}, quartiles {np.percentile(ratios, 25):.2f} to {np.percentile(ratios, 75):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
