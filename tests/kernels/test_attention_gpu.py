"""The kernels for NVIDIA GPUs: interpreted against float64, and lowered to Triton for CUDA without a GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import pytest
from jax import export

from maskae.errors import UserError
from maskae.kernels import attention_gpu
from maskae.kernels.attention import attention
from maskae.kernels.attention_gpu import backward, choose_blocks, forward
from tests.kernels.attention_case import FEATURES, Case, assert_close, expected, make_case

TRITON_CALL = "__gpu$xla.gpu.triton"
NAMES = ("attention_forward", "attention_query_gradient", "attention_key_value_gradient")


def interpreted(case: Case) -> dict[str, jax.Array]:
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # which compiles in half the time
    def run(operands: Any, d_out: Any, d_log_sum_exp: Any) -> tuple[Any, ...]:
        out, log_sum_exp = forward(case.options, operands, interpret=True)
        return out, log_sum_exp, *backward(case.options, operands, out, log_sum_exp, d_out, d_log_sum_exp, interpret=True)

    names = ("out", "log_sum_exp", "d_query", "d_key", "d_value", "d_slopes")
    return {name: array for name, array in zip(names, run(*case[1:]), strict=True) if array is not None}


@pytest.mark.parametrize(
    ("shape", "features", "dtype"),
    [
        ((2, 70, 33, 2, 48), FEATURES, "float32"),  # partial blocks; a head size that is padded; a sample without any key
        ((1, 65, 129, 1, 80), ("positions",), "bfloat16"),  # more blocks than one on both sides
        ((2, 1, 20, 2, 128), ("segments", "cap"), "float32"),  # the smaller tiles
    ],
)
def test_kernels_equal_float64(shape: tuple[int, int, int, int, int], features: tuple[str, ...], dtype: str) -> None:
    case = make_case(shape, features, dtype)
    assert_close(interpreted(case), expected(case), dtype)


def a_gpu() -> AbstractContextManager[Any]:
    """What newer versions of jax want to know: which GPU they lower for."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def lowered_for_cuda(case: Case) -> str:
    """The program of `attention` with all its gradients for CUDA, as text."""
    companions = case.operands._replace(query=None, key=None, value=None, slopes=None)._asdict()
    given = {name: array for name, array in companions.items() if array is not None}

    def run(query: Any, key: Any, value: Any, slopes: Any) -> Any:
        def attend(*learned: Any) -> Any:
            options = {"soft_cap": case.options.soft_cap, "implementation": "pallas_gpu", "with_log_sum_exp": True}
            return attention(*learned[:3], slopes=learned[3], **options, **given)

        outputs, pullback = jax.vjp(attend, query, key, value, slopes)
        return outputs, pullback(case[2:])

    arguments = (*case.operands[:3], case.operands.slopes)
    check = export.DisabledSafetyCheck.custom_call(TRITON_CALL)
    with a_gpu():
        return export.export(jax.jit(run), platforms=["cuda"], disabled_checks=[check])(*arguments).mlir_module()


@pytest.mark.parametrize(
    ("shape", "features", "dtype"),
    [((2, 197, 226, 2, 48), FEATURES, "float32"), ((2, 785, 785, 2, 128), (), "bfloat16"), ((1, 1, 50, 1, 80), ("positions",), "bfloat16")],
)
def test_all_kernels_lower_to_triton_without_a_gpu(shape: tuple[int, int, int, int, int], features: tuple[str, ...], dtype: str) -> None:
    program = lowered_for_cuda(make_case(shape, features, dtype))
    assert program.count(f"@{TRITON_CALL}") == len(NAMES)
    assert all(f'name = "{name}"' in program for name in NAMES)
    # Triton's bytecode within, in which XLA compiles the kernel.
    assert program.count("ML\\EFR") == len(NAMES)
    assert f"{shape[1]}x{shape[2]}xf32" not in program and f"{shape[1]}x{shape[2]}xi1" not in program


def test_a_value_that_triton_cannot_lower_is_refused() -> None:
    # So that the test above cannot pass without running Triton's rules: a tile whose sides are no powers of two is one of them.
    case = make_case((1, 16, 16, 1, 32))
    blocks = choose_blocks(16, 16, 32, 4)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Exception, match="power of 2"):
        patch.setattr(attention_gpu, "choose_blocks", lambda *_: blocks._replace(walked=24))
        lowered_for_cuda(case)


def test_a_jax_without_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_gpu, "triton", None)
    case = make_case((1, 1, 1, 1, 32))
    with pytest.raises(UserError, match="no Triton.*xla"):
        forward(case.options, case.operands)
