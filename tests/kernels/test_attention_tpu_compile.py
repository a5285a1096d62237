"""The attention kernels compiled by the real TPU compiler, which needs no TPU; the slow ones run with `pytest -m slow tests/kernels`."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from maskae.config import load_config
from maskae.kernels.attention import attention
from maskae.planning.chips import parse_topology
from maskae.planning.compile import tpu_devices
from maskae.planning.plan import plan
from tests.kernels.attention_case import FEATURES

# B, N, M, H, D: eight clips of VideoMAE, and the bytes of one float32 score for each pair of tokens.
SHAPE = (8, 1568, 1568, 12, 64)
SCORES = 8 * 12 * 1568 * 1568 * 4
ALL_PAIRS = re.compile(r"\b(1568|1664|1792|1920|2048),(1568|1664|1792|1920|2048)\b")
OTHERS = ("v4:2x2x1", "v5p:2x2x1", "v6e:1x1")


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    assert importlib.util.find_spec("libtpu"), "the TPU compiler is not installed: pip install -e '.[test]' brings the package libtpu"


def compiled(
    topology: str, shape: tuple[int, ...], features: tuple[str, ...], dtype: str = "bfloat16", implementation: str = "pallas_tpu"
) -> Any:
    """Forward and backward of attention with operands of `shape` (B, N, M, H, D), compiled for one chip of `topology`."""
    sharding = jax.sharding.SingleDeviceSharding(tpu_devices(parse_topology(topology))[0])
    batch, queries, keys, heads, width = shape

    def abstract(*dimensions: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dimensions, dtype, sharding=sharding)

    tokens = [abstract(batch, length, heads, width, dtype=dtype) for length in (queries, keys, keys)]
    companions: dict[str, Any] = {}
    if "mask" in features:
        companions["key_mask"] = abstract(batch, keys, dtype=jnp.bool_)
    for name, length in (("query", queries), ("key", keys)):
        if "segments" in features:
            companions[f"{name}_segments"] = abstract(batch, length, dtype=jnp.int32)
        if "positions" in features:
            companions[f"{name}_positions"] = abstract(batch, length, 2)
    slopes = [abstract(heads)] if "positions" in features else []

    def gradients(learned: list[Any], companions: dict[str, Any]) -> Any:
        def loss(learned: list[Any]) -> jax.Array:
            query, key, value, *slopes = learned
            options = {"soft_cap": 30.0 if "cap" in features else None, "implementation": implementation, "with_log_sum_exp": True}
            out, log_sum_exp = attention(query, key, value, slopes=slopes[0] if slopes else None, **options, **companions)
            return jnp.square(out.astype(jnp.float32)).sum() + jnp.square(log_sum_exp).sum()

        return jax.value_and_grad(loss)(learned)

    return jax.jit(gradients).lower([*tokens, *slopes], companions).compile()


def assert_linear_memory(topology: str, features: tuple[str, ...]) -> None:
    """No array has two axes of (padded) tokens, and temporaries are copies of the operands: below half a float32 score for each pair."""
    program = compiled(topology, SHAPE, features)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3
    assert not ALL_PAIRS.search(program.as_text())
    assert program.memory_analysis().temp_size_in_bytes < SCORES / 2


def test_no_score_or_bias_of_all_pairs_is_kept() -> None:
    assert_linear_memory("v5e:1x1", FEATURES)


def test_plain_jax_keeps_them() -> None:
    program = compiled("v5e:1x1", SHAPE, (), implementation="xla")
    assert ALL_PAIRS.search(program.as_text())
    assert program.memory_analysis().temp_size_in_bytes > SCORES


@pytest.mark.slow
@pytest.mark.parametrize("features", [(), FEATURES])
@pytest.mark.parametrize("topology", OTHERS)
def test_nor_on_any_other_chip(topology: str, features: tuple[str, ...]) -> None:
    assert_linear_memory(topology, features)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("queries", "keys", "width"), [(1, 1, 32), (49, 50, 48), (50, 49, 64), (197, 197, 80), (226, 513, 96), (513, 226, 128), (1, 1568, 64)]
)
@pytest.mark.parametrize("topology", ["v5e:1x1", *OTHERS])
def test_every_length_and_head_size_compiles(topology: str, queries: int, keys: int, width: int, dtype: str) -> None:
    assert compiled(topology, (2, queries, keys, 16, width), FEATURES, dtype).memory_analysis() is not None


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "overrides"), [("v5e:2x2", ()), ("v6e:2x4", ("mesh.fsdp=2", "mesh.tensor=2"))])
def test_a_train_step_over_a_mesh_compiles_with_the_kernels(topology: str, overrides: tuple[str, ...]) -> None:
    recipe = "configs/mae.py:tiny"
    scanned = ("model.scan=true", "model.remat=full", "model.depth=3", "model.decoder_depth=1", "model.attention=pallas_tpu")
    report = plan(recipe, load_config(recipe, [*scanned, *overrides]), parse_topology(topology))
    assert report.fits and not report.warnings
