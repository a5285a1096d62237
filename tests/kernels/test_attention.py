"""Attention in plain JAX and as interpreted kernels against float64, over shapes, dtypes, masks and options; on eight devices as on one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskae.errors import UserError
from maskae.kernels import attention_tpu
from maskae.kernels.attention import attention
from maskae.kernels.attention_tpu import TOKENS, Blocks, choose_blocks
from tests.kernels.attention_case import FEATURES, Case, assert_close, expected, make_case

GRADIENTS = ("d_query", "d_key", "d_value", "d_slopes")


def computed(case: Case, implementation: str) -> dict[str, jax.Array]:
    """What `attention` gives for a case: outputs and gradients."""
    fixed = case.operands._replace(query=None, key=None, value=None, slopes=None)._asdict()
    companions = {name: array for name, array in fixed.items() if array is not None}

    @jax.jit
    def run(learned: tuple[Any, ...], cotangents: tuple[Any, ...]) -> tuple[Any, Any]:
        def attend(query: Any, key: Any, value: Any, slopes: Any = None) -> Any:
            options = {"soft_cap": case.options.soft_cap, "implementation": implementation, "with_log_sum_exp": True}
            return attention(query, key, value, slopes=slopes, **options, **companions)

        outputs, pullback = jax.vjp(attend, *learned)
        return outputs, pullback(cotangents)

    learned = case.operands[:3] if case.operands.slopes is None else (*case.operands[:3], case.operands.slopes)
    (out, log_sum_exp), gradients = run(learned, case[2:])
    return {"out": out, "log_sum_exp": log_sum_exp} | dict(zip(GRADIENTS, gradients, strict=False))


def interpreted(case: Case, blocks: Blocks) -> dict[str, jax.Array]:
    """What the kernels for TPUs give with blocks of these sizes."""

    @jax.jit
    def run(case_arrays: Any) -> Any:
        operands, d_out, d_log_sum_exp = case_arrays
        outputs = attention_tpu.forward(case.options, operands, interpret=True, blocks=blocks)
        return outputs, attention_tpu.backward(case.options, operands, *outputs, d_out, d_log_sum_exp, interpret=True, blocks=blocks)

    (out, log_sum_exp), gradients = run(case[1:])
    found = {"out": out, "log_sum_exp": log_sum_exp} | dict(zip(GRADIENTS, gradients, strict=True))
    return {name: array for name, array in found.items() if array is not None}


shapes = st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 40), st.sampled_from((1, 2, 4)), st.sampled_from((4, 12)))
cases = st.builds(
    lambda shape, features, dtype, seed: (make_case(shape, tuple(sorted(features)), dtype, seed), dtype),
    shapes,
    st.sets(st.sampled_from(FEATURES)),
    st.sampled_from(("float32", "bfloat16")),
    st.integers(0, 9),
)
few = settings(max_examples=5, deadline=None, derandomize=True)


@few
@given(cases)
def test_plain_jax_equals_float64(drawn: tuple[Case, str]) -> None:
    case, dtype = drawn
    assert_close(computed(case, "xla"), expected(case), dtype)


@few
@given(cases, st.sampled_from((16, 32, 48)), st.sampled_from((16, 32, 48)))
def test_kernels_equal_float64_in_blocks_of_any_size(drawn: tuple[Case, str], queries: int, keys: int) -> None:
    case, dtype = drawn
    heads = case.operands.query.shape[2]
    assert_close(interpreted(case, Blocks(queries, keys, max(1, heads // 2))), expected(case), dtype)


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "width", "features"),
    [
        (1, 1, 1, 32, ()),
        (49, 49, 2, 48, ("positions",)),
        (50, 49, 2, 64, FEATURES),
        (197, 197, 1, 128, ()),
        (226, 50, 1, 80, ("mask", "segments")),
        (1568, 1568, 1, 8, ("segments", "positions", "cap")),
    ],
)
def test_the_lengths_of_the_systems(queries: int, keys: int, heads: int, width: int, features: tuple[str, ...]) -> None:
    case = make_case((1 if keys > 1000 else 2, queries, keys, heads, width), features)
    assert_close(computed(case, "pallas_tpu"), expected(case), "float32")


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_rows_without_keys_are_zero_and_have_no_gradient(implementation: str) -> None:
    case = make_case((2, 3, 5, 1, 4), ("mask",))
    found = computed(case, implementation)
    assert not case.operands.key_mask[0].any() and np.isneginf(found["log_sum_exp"][0]).all()
    assert all((np.asarray(found[name][0]) == 0).all() for name in ("out", "d_query", "d_key", "d_value"))
    assert all(np.isfinite(np.asarray(found[name][1])).all() and found[name][1].any() for name in ("out", "d_query", "d_key", "d_value"))


def test_without_options_it_equals_jax_own_attention() -> None:
    query, key, value = make_case((2, 5, 7, 2, 8)).operands[:3]
    wanted = jax.nn.dot_product_attention(query, key, value)
    np.testing.assert_allclose(attention(query, key, value, implementation="xla"), wanted, atol=2e-6)
    doubled = jax.nn.dot_product_attention(query, key, value, scale=2.0)
    np.testing.assert_allclose(attention(query, key, value, scale=2.0, implementation="pallas_tpu"), doubled, atol=2e-6)


@pytest.mark.parametrize("heads", [1, 6, 12, 16])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (50, 50), (197, 50), (512, 513), (1568, 1568), (50, 3136)])
def test_blocks_are_what_the_compiler_takes(queries: int, keys: int, heads: int) -> None:
    blocks = choose_blocks(queries, keys, heads)
    for length, block in ((queries, blocks.queries), (keys, blocks.keys)):
        assert block % 128 == 0 or (block % 16 == 0 and length <= block < length + 16)
    assert heads % blocks.heads == 0
    assert blocks.heads == 1 or blocks.heads * max(blocks[:2]) <= TOKENS


def test_eight_devices_compute_what_one_does_each_its_rows_and_heads() -> None:
    if jax.device_count() < 8:
        pytest.skip("needs eight simulated devices")
    case = make_case((4, 6, 5, 2, 4), FEATURES)
    mesh = jax.make_mesh((1, 2, 2, 2), ("slice", "data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 4)
    tokens = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("slice", "data", "fsdp"), None, "tensor"))
    query, key, value = (jax.device_put(array, tokens) for array in case.operands[:3])
    with jax.set_mesh(mesh):
        split = case._replace(operands=case.operands._replace(query=query, key=key, value=value))
        assert_close(computed(split, "pallas_tpu"), expected(case), "float32")
        program = jax.jit(lambda *x: attention(*x, implementation="pallas_tpu")).lower(query, key, value).compile()
    assert program.output_shardings.is_equivalent_to(tokens, 4)
    assert "all-gather" not in program.as_text()


def test_a_batch_that_the_mesh_does_not_divide_is_computed_whole() -> None:
    if jax.device_count() < 8:
        pytest.skip("needs eight simulated devices")
    query, key, value = make_case((3, 4, 4, 1, 4)).operands[:3]
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)):
        found = jax.jit(lambda *x: attention(*x, implementation="pallas_tpu"))(query, key, value)
    np.testing.assert_allclose(found, attention(query, key, value, implementation="xla"), atol=2e-6)


BASE = make_case((2, 3, 5, 2, 4), FEATURES).operands


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"implementation": "pallas"}, "unknown attention 'pallas' (did you mean 'pallas_"),
        ({"implementation": "cudnn"}, "needs an NVIDIA GPU"),
        ({"key": BASE.key[:, :4]}, "key (2, 4, 2, 4), value (2, 5, 2, 4)"),
        ({"query": BASE.query.astype(jnp.bfloat16)}, "must be of one floating dtype"),
        ({"key_mask": BASE.key_mask[:, :4]}, "key_mask has shape (2, 4), and must have (2, 5)"),
        ({"key_mask": jnp.ones((2, 5))}, "must be bool"),
        ({"query_segments": None}, "query_segments and key_segments come together"),
        ({"slopes": None}, "query_positions, key_positions and slopes come together"),
        ({"slopes": jnp.ones(3)}, "slopes has shape (3,), and must have (2,)"),
        ({"key_segments": jnp.ones((2, 5))}, "key_segments is float32, and must be of integers"),
        ({"query_positions": jnp.ones((2, 3, 4))}, "positions of 4 dimensions"),
        ({"soft_cap": 0.0}, "soft_cap=0.0 must be above 0"),
    ],
)
def test_what_does_not_fit_is_said(changed: dict[str, Any], words: str) -> None:
    arguments = BASE._asdict() | changed
    with pytest.raises(UserError) as error:
        attention(arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_dtype_that_tpus_lack_is_said() -> None:
    query, key, value = (each.astype(jnp.float16) for each in BASE[:3])
    with pytest.raises(UserError, match="bfloat16 or float32, and dtype is float16"):
        attention(query, key, value, implementation="pallas_tpu")
