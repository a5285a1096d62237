"""Plain attention as CPUs want it: JAX's own values and gradients, and JAX's own function for everything that is not a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from maskae.kernels import attention_cpu
from maskae.kernels.attention_cpu import compiles_for_cpu, plain_attention


def operands(queries: int = 5, keys: int = 7) -> list[jax.Array]:
    """query, key, value, a bias and the output's gradient."""
    shapes = [(2, queries, 3, 4), (2, keys, 3, 4), (2, keys, 3, 4), (1, 3, queries, keys), (2, queries, 3, 4)]
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_those_of_jax(with_bias: bool) -> None:
    query, key, value, bias, gradient = operands()
    inputs = (query, key, value, bias) if with_bias else (query, key, value)

    def own(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        return plain_attention(query, key, value, bias=bias, scale=0.3)

    def plain(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, bias=bias, scale=0.3, implementation="xla")

    assert jax.make_jaxpr(own)(*inputs).pretty_print() != jax.make_jaxpr(plain)(*inputs).pretty_print(), "another computation"
    for ours, theirs in zip(
        jax.tree.leaves(jax.jit(lambda *x: (own(*x), jax.vjp(own, *x)[1](gradient)))(*inputs)),
        jax.tree.leaves(jax.jit(lambda *x: (plain(*x), jax.vjp(plain, *x)[1](gradient)))(*inputs)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_scores_far_apart_stay_finite() -> None:
    query, key, value, _, gradient = operands()
    out, back = jax.vjp(lambda *x: plain_attention(*x, scale=1e4), query, key, value)
    assert all(bool(jnp.isfinite(array).all()) for array in (out, *back(gradient)))


def test_the_mesh_decides_what_it_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiles_for_cpu() == (jax.default_backend() == "cpu")
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices("cpu")[:1], axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        assert compiles_for_cpu(), "the mesh's devices, not this process's"
    assert not compiles_for_cpu()


@pytest.mark.parametrize("why", ["another device", "another dtype"])
def test_everything_else_is_left_to_jax(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, *_ = operands()
    if why == "another device":
        monkeypatch.setattr(attention_cpu, "compiles_for_cpu", lambda: False)
    else:
        query, key, value = (x.astype(jnp.bfloat16) for x in (query, key, value))
    ours = jax.make_jaxpr(lambda *x: plain_attention(*x, scale=0.5))(query, key, value)
    theirs = jax.make_jaxpr(lambda *x: jax.nn.dot_product_attention(*x, scale=0.5, implementation="xla"))(query, key, value)
    assert ours.pretty_print() == theirs.pretty_print()
