"""What a run is, before it starts: sizes, FLOPs, batch, shardings, and one abstract step."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from maskae.experiment import Experiment, parameter_count
from maskae.paths import flatten_paths


def describe_experiment(experiment: Experiment) -> dict[str, Any]:
    """Numbers about model, data and length as one JSON object, for the report."""
    state = experiment.abstract_state
    spec = experiment.spec
    parts = {name: parameter_count(tree) for name, tree in state["params"].items()}
    return {
        "system": experiment.config.system,
        "parameters": parameter_count(state["params"]),
        "parameters_by_part": parts,
        "forward_flops_per_example": experiment.forward_flops,
        "train_flops_per_example": experiment.train_flops,
        "batch_size": experiment.config.train.batch_size,
        "total_steps": experiment.total_steps,
        "data": spec.name,
        "examples": dict(spec.counts),
        "classes": spec.num_classes,
        "split_hash": spec.split_hash,
        "mesh": {axis: size for axis, size in experiment.mesh.shape.items() if size > 1} or {"data": 1},
    }


def dry_run_lines(experiment: Experiment) -> list[str]:
    """The lines that `--dry_run` prints; runs one abstract step, so shapes that do not fit fail here and not after an hour."""
    facts = describe_experiment(experiment)
    state = experiment.abstract_state
    after, metrics = jax.eval_shape(experiment.train_step, state, experiment.batch_shapes())
    assert jax.tree.leaves(jax.tree.map(lambda a, b: a.shape == b.shape, after, state))
    lines = [
        f"system      {facts['system']}, {facts['total_steps']:,} steps of {facts['batch_size']:,} examples",
        f"parameters  {facts['parameters']:,} (" + ", ".join(f"{k} {v:,}" for k, v in facts["parameters_by_part"].items()) + ")",
        f"train state {_bytes(state) / 2**20:,.1f} MiB over all devices",
        f"FLOPs       {facts['forward_flops_per_example'] / 1e9:.4g} GFLOP forward, {facts['train_flops_per_example'] / 1e9:.4g} GFLOP"
        " training, per image, matrix products by formula",
        f"data        {facts['data']}: {facts['examples']}, split {facts['split_hash']}",
        f"mesh        {dict(experiment.mesh.shape)} over {experiment.mesh.size} {jax.devices()[0].device_kind} device(s)",
        "batch",
    ]
    lines += [f"  {name:10s} {leaf.dtype}{list(leaf.shape)} {leaf.sharding.spec}" for name, leaf in experiment.batch_shapes().items()]
    lines.append("parameters and where they lie")
    for name, leaf in flatten_paths(state["params"]).items():
        lines.append(f"  {name:50s} {leaf.dtype}{list(leaf.shape)} {leaf.sharding.spec}")
    lines.append("one abstract step gives " + ", ".join(sorted(metrics)))
    return lines


def _bytes(tree: Any) -> int:
    return int(sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))
