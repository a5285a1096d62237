"""The flag tables: well formed, and accepted by the compilers that are installed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from maskae.errors import UserError
from maskae.xla_flags import FLAGS, GPU_CHIPS, TPU_CHIPS, environment_for, flags_for


def started(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return subprocess.run([sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, timeout=120, check=False)


def test_every_flag_says_why_and_by_whom() -> None:
    assert set(FLAGS) == {"cpu", *TPU_CHIPS, *GPU_CHIPS}
    for chip in FLAGS:
        for flag in flags_for(chip, slices=2):
            assert re.fullmatch(r"xla_\w+|[A-Z_]+", flag.name)
            assert len(flag.reason) > 20 and len(flag.source) > 10 and flag.value
            assert flag.variable == ("LIBTPU_INIT_ARGS" if chip in TPU_CHIPS else flag.variable)


def test_environment_joins_the_flags_of_a_variable() -> None:
    assert environment_for("cpu") == {}
    assert environment_for("v4") == {"LIBTPU_INIT_ARGS": "--xla_enable_async_all_gather=true --xla_enable_async_collective_permute=true"}
    h100 = environment_for("h100")
    assert set(h100) == {"XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION"}
    assert h100["XLA_FLAGS"].split()[0] == "--xla_gpu_enable_latency_hiding_scheduler=true"
    assert "--xla_tpu_scoped_vmem_limit_kib=98304" in environment_for("v6e")["LIBTPU_INIT_ARGS"].split()
    between = "--xla_tpu_enable_data_parallel_all_reduce_opt=true"
    assert between in environment_for("v5p", slices=2)["LIBTPU_INIT_ARGS"]
    assert between not in environment_for("v5p")["LIBTPU_INIT_ARGS"]
    assert environment_for("h100", slices=2) == h100


def test_unknown_chip_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown chip 'v5' .did you mean 'v5"):
        flags_for("v5")


def test_jaxlib_knows_the_gpu_flags() -> None:
    code = "import jax; print(jax.numpy.ones(2).sum())"
    flags = environment_for("h100")["XLA_FLAGS"]
    assert started(code, XLA_FLAGS=flags, JAX_PLATFORMS="cpu").stdout.strip() == "2.0"
    wrong = started(code, XLA_FLAGS=f"{flags} --xla_gpu_no_such_flag=true", JAX_PLATFORMS="cpu")
    assert wrong.returncode != 0, "else this test could not fail"


def test_libtpu_knows_the_tpu_flags() -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu, which brings the TPU compiler: pip install libtpu")
    code = (
        "from jax.experimental import topologies\n"
        "print(len(topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices))"
    )
    flags = " ".join(sorted({flag.text for chip in TPU_CHIPS for flag in flags_for(chip, slices=2)}))
    common = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
    right = started(code, LIBTPU_INIT_ARGS=flags, **common)
    assert right.stdout.strip() == "4", right.stderr[-2000:]
    wrong = started(code, LIBTPU_INIT_ARGS=f"{flags} --xla_tpu_no_such_flag=true", **common)
    assert wrong.stdout.strip() != "4", "else this test could not fail"
