"""What a system is: pure functions over (params, state, batch) that one training loop, one set of evaluators and one checkpointer serve."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

Params = dict[str, Any]
State = dict[str, Any]
Batch = dict[str, jax.Array]


class Variables(NamedTuple):
    """`params` is what gradients train; `state` is everything else that must survive a restart (EMA teachers, queues, batch statistics)."""

    params: Params
    state: State


class Outputs(NamedTuple):
    """`metrics` are float32 scalars to log; `state` replaces the state that went in (equal to it where the system has none)."""

    metrics: dict[str, jax.Array]
    state: State


@runtime_checkable
class System(Protocol):
    """A frozen dataclass of plain arguments. `batch["image"]` arrives float32 [B, H, W, C], normalised; `batch["example"]` int32 [B]; the
    other fields of the data as the source gives them. Views, crops and noise are the system's own, drawn from `rng` and `example`.

    Optional, looked up by name:
        reconstruct(params, state, batch, rng) -> panels to look at, each float32 [B, H, W, C] in normalised units.
        draw(params, state, batch, rng, spec) -> pictures of other kinds by name, uint8 [H, W, 3]; on the host.
        raw_features(batch) -> {"pooled": [B, D]}: the input itself as a baseline, where it is not an image.
        with_encoder(variables, encoder, grid) -> variables with a pretrained encoder's parameters, for `init_from`; or, where more than the
            encoder's parameters is taken (running statistics), with_pretrained(variables, pretrained).
        begin(variables, stage) -> variables of the same shapes, on the host, once before the first step: k-means centres, pseudo labels,
            frozen copies. `stage` (`maskae.stages.StageData`) gives all training records and the stages before.
        order(variables, batch_size, seed) -> the endless data order, `order[j]` a record (`maskae.data.pipeline.Order`), where it is not a
            new permutation per epoch; None keeps that.
        layer_scales(decay) -> (pattern, factor) pairs of `optimizer.layer_decay`, where the blocks are not those of one encoder.
        train_flops(batch) where a training step is not three forward passes (a frozen part).
        couples_examples: True where the loss is not a mean over examples; gradients are then not accumulated.
    """

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh variables; reads only the shapes of `batch`, so it runs under `jax.eval_shape` and `jax.jit` with output shardings."""
        ...

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Scalar float32 over the global batch. `rng` is the key of this step; draws depend on it and on `batch["example"]` alone."""
        ...

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """`pooled` [B, D], `cls` [B, D] where there is one, `tokens` [B, N, D]; classifiers also `logits` [B, K]. All float32."""
        ...

    def forward_flops(self, batch: Batch) -> float:
        """Matmul FLOPs (2 per multiply-add) of one forward pass of the loss per example, by formula; reads only shapes."""
        ...
