"""maskae's side: its own train step, on the weights, images and noise of the run's folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peers need memory on the same GPU

from maskae.host_memory import keep_host_memory
from tools.peers.turns import serve


def make_side(work: dict[str, Any]) -> Any:
    """Compiles the step. Imports jax only here, after the process was confined to its processors."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import maskae.systems  # noqa: F401 (before maskae.step, which some of the systems import)
    from maskae.interop.layout import Geometry
    from maskae.interop.weights import load_weights
    from maskae.optim import make_optimizer
    from maskae.step import make_train_step, train_state_of
    from maskae.systems.contract import Outputs
    from maskae.systems.mae import Mae

    @dataclass(frozen=True)
    class GivenNoise(Mae):
        """MAE whose masking noise comes with the batch, so that both sides hide the same patches."""

        def loss(self, params: Any, state: Any, batch: Any, rng: Any, step: Any) -> tuple[jax.Array, Outputs]:
            loss, metrics = self.loss_given_noise(params, batch["image"], batch["noise"])
            return loss, Outputs(metrics, state)

    class Maskae:
        def __init__(self) -> None:
            folder = Path(work["folder"])
            system = GivenNoise(**work["model"], dtype=work["dtype"], **work["compute"])
            self.batch = {name: jnp.asarray(np.load(folder / f"{name}.npy")) for name in ("image", "noise")}
            drawn = jax.eval_shape(lambda: system.init(jax.random.key(0), self.batch)).params
            zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), drawn)
            params, report = load_weights(folder / "model.safetensors", zeros, Geometry(system.patch_size, system.grid), "huggingface")
            if report.missing:
                raise ValueError(f"weights lack {', '.join(report.missing)}")
            adamw = work["optimizer"]
            betas = {"b1": adamw["betas"][0], "b2": adamw["betas"][1]}
            rate = adamw["learning_rate"]
            optimizer = make_optimizer("adamw", schedule=lambda step: rate, weight_decay=adamw["weight_decay"], **betas)
            self.state = jax.device_put(train_state_of(jax.tree.map(jnp.asarray, params), {}, optimizer, ema=False))
            step = make_train_step(system, optimizer, lambda batch, key: batch, jax.random.key(0))
            self.program = jax.jit(step, donate_argnums=0).lower(self.state, self.batch).compile()
            self.flops = system.forward_flops(self.batch)

        def describe(self) -> dict[str, Any]:
            device = jax.devices()[0]
            threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            versions = {"jax": jax.__version__, "python": sys.version.split()[0]}
            platform = {"device": device.device_kind, "on_cpu": device.platform == "cpu"}
            return {"versions": versions, "threads": threads, "forward_flops": self.flops, **platform}

        def step(self) -> Callable[[], float]:
            self.state, metrics = self.program(self.state, self.batch)
            return lambda: float(jax.block_until_ready((self.state, metrics))[1]["loss"])

    return Maskae()


if __name__ == "__main__":
    keep_host_memory()  # as maskae.main does
    serve(make_side)
