"""Constraints split what a mesh can split and do nothing without one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from maskae.nn.sharding import constrain, gather_parameters


def mesh(**sizes: int) -> jax.sharding.Mesh:
    if jax.device_count() < 8:
        pytest.skip("needs eight simulated devices")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def spec_under(mesh: jax.sharding.Mesh, shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
    with jax.set_mesh(mesh):
        return jax.jit(lambda: constrain(jnp.zeros(shape), *axes))().sharding.spec


def test_without_a_mesh_nothing_happens() -> None:
    x = jnp.zeros((4, 2))
    assert constrain(x, "batch") is x


def test_batch_is_split_over_data_and_fsdp() -> None:
    spec = spec_under(mesh(data=2, fsdp=4, tensor=1), (8, 3, 4), "batch", None, "tensor")
    assert spec[0] == ("data", "fsdp")
    assert all(axis is None for axis in spec[1:])


def test_heads_are_split_over_tensor() -> None:
    spec = spec_under(mesh(data=2, fsdp=1, tensor=4), (8, 3, 4), "batch", None, "tensor")
    assert spec[0] in ("data", ("data",))
    assert spec[2] in ("tensor", ("tensor",))


def test_what_does_not_divide_stays_whole() -> None:
    spec = spec_under(mesh(data=4, tensor=2), (6, 3, 3), "batch", None, "tensor")
    assert all(axis is None for axis in spec)


def test_inside_shard_map_nothing_happens() -> None:
    rows = PartitionSpec("data")
    split = jax.shard_map(lambda x: constrain(x, "batch") * 2, mesh=mesh(data=8), in_specs=rows, out_specs=rows)
    np.testing.assert_array_equal(jax.jit(split)(jnp.arange(8.0)), 2 * jnp.arange(8.0))


PARAMS = {"attention": {"qkv": {"kernel": jnp.arange(8.0 * 3 * 2 * 4).reshape(8, 3, 2, 4), "bias": jnp.ones((3, 2, 4))}}}


def test_parameters_are_gathered_over_fsdp_and_their_gradients_scattered() -> None:
    def loss(params: dict) -> tuple[jax.Array, dict]:
        whole = gather_parameters(params)
        return (whole["attention"]["qkv"]["kernel"] ** 2).sum(), whole

    with jax.set_mesh(mesh(data=1, fsdp=4, tensor=2)):
        gradient, whole = jax.jit(jax.grad(loss, has_aux=True))(PARAMS)
    kernel, scattered = whole["attention"]["qkv"]["kernel"], gradient["attention"]["qkv"]["kernel"]
    assert tuple(kernel.sharding.spec) + (None,) * (4 - len(kernel.sharding.spec)) == (None, None, "tensor", None)
    assert scattered.sharding.spec[0] == "fsdp" and scattered.sharding.spec[2] == "tensor"
    np.testing.assert_array_equal(kernel, PARAMS["attention"]["qkv"]["kernel"])
    np.testing.assert_array_equal(scattered, 2 * PARAMS["attention"]["qkv"]["kernel"])


def test_parameters_stay_as_they_are_where_nothing_is_split_over_fsdp() -> None:
    assert gather_parameters(PARAMS) is PARAMS
    with jax.set_mesh(mesh(data=8, fsdp=1, tensor=1)):
        assert gather_parameters(PARAMS) is PARAMS
    with jax.set_mesh(mesh(data=8)):
        assert gather_parameters(PARAMS) is PARAMS
