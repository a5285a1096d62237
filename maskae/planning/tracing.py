"""What one train step computes and keeps, counted in its traced program before any compiler sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from maskae.errors import UserError
from maskae.experiment import Experiment

# A batch size that no other axis of a model has, so that axes of this length are the batch.
TRACED_BATCH = 1009


@dataclass(frozen=True)
class Products:
    """Matrix products: `flops` (2 per multiply-add) and the `bytes` of their operands and results."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Products) -> Products:
        return Products(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Products:
        return Products(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class TracedStep:
    """One forward and backward pass of the loss per example.

    Attributes:
        products: the matrix products, those of recomputation included.
        kept: bytes that the forward pass keeps for the backward pass.
        largest: bytes of the largest single value.
    """

    products: Products
    kept: float
    largest: float


def trace_step(experiment: Experiment) -> TracedStep:
    """Counts in the traced loss and gradient of an experiment, per example of the batch."""
    own = experiment.config.train.batch_size
    # A system of one whole graph per step takes no more than one record; all that it computes is then counted as the batch's.
    if own == 1:
        return _trace(experiment, 1)
    try:
        return _trace(experiment, TRACED_BATCH)
    except UserError:  # a loss over groups of examples refuses a prime number of them
        return _trace(experiment, own)


def _trace(experiment: Experiment, rows: int) -> TracedStep:
    """The same with a batch of so many rows."""
    parameters, state = experiment.abstract_state["params"], experiment.abstract_state["state"]
    batch = {name: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype) for name, leaf in experiment.batch_shapes().items()}
    plain = [jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree) for tree in (parameters, state)]

    def kept(parameters: Any, state: Any, batch: Any) -> Any:
        prepared = experiment.prepare(batch, jax.random.key(0))
        step = jnp.zeros((), jnp.int32)
        return jax.vjp(lambda p: experiment.system.loss(p, state, prepared, jax.random.key(0), step), parameters, has_aux=True)[1]

    def gradients(parameters: Any, state: Any, batch: Any) -> Any:
        return kept(parameters, state, batch)(jnp.ones(()))

    jaxpr = jax.make_jaxpr(gradients)(*plain, batch).jaxpr
    residuals = [leaf for leaf in jax.tree.leaves(jax.eval_shape(kept, *plain, batch)) if rows in (1, *leaf.shape)]
    products = count_products(jaxpr)
    return TracedStep(
        Products(products.flops / rows, products.bytes / rows),
        sum(map(_bytes, residuals)) / rows,
        largest_value(jaxpr, rows) / rows,
    )


def count_products(jaxpr: core.Jaxpr) -> Products:
    """The matrix products of a traced program; scans count with their length, of a `cond` the dearest branch.

    Of a choice by platform (`jax.lax.platform_dependent`) the default counts, which comes last.
    """
    total = Products()
    for equation in jaxpr.eqns:
        inner = [count_products(body) for body in _bodies(equation.params)]
        name = equation.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            flops = _dot_flops(equation) if name == "dot_general" else _convolution_flops(equation)
            total += Products(flops, sum(_bytes(value.aval) for value in (*equation.invars, *equation.outvars)))
        elif name == "cond":
            by_platform = equation.params.get("branches_platforms") is not None
            total += inner[-1] if by_platform else max(inner, key=lambda products: products.flops)
        else:
            total += sum(inner, Products()) * (equation.params["length"] if name == "scan" else 1)
    return total


def largest_value(jaxpr: core.Jaxpr, rows: int = TRACED_BATCH) -> float:
    """Bytes of the largest value with a batch axis of `rows` inside the loops of a traced program (what scans stack up lies outside).

    With one row every value counts.
    """
    largest = 0.0
    for equation in jaxpr.eqns:
        bodies = _bodies(equation.params)
        values = [] if equation.primitive.name == "scan" else [value.aval for value in equation.outvars]
        sizes = [_bytes(value) for value in values if rows in (1, *getattr(value, "shape", ()))] if not bodies else []
        largest = max(largest, *sizes, *(largest_value(body, rows) for body in bodies), 0.0)
    return largest


def _bytes(value: Any) -> float:
    return float(math.prod(value.shape) * value.dtype.itemsize) if hasattr(value, "dtype") else 0.0


def _bodies(params: dict[str, Any]) -> list[core.Jaxpr]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            body = getattr(item, "jaxpr", item)
            if isinstance(body, core.Jaxpr):
                found.append(body)
    return found


def _dot_flops(equation: core.JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left: Any = equation.invars[0].aval
    out: Any = equation.outvars[0].aval
    return 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)


def _convolution_flops(equation: core.JaxprEqn) -> float:
    kernel: Any = equation.invars[1].aval
    out: Any = equation.outvars[0].aval
    outputs = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(out.shape) * math.prod(kernel.shape) / outputs
