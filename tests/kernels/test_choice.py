"""The table of measured choices."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from maskae.errors import UserError
from maskae.kernels.choice import choose, load_table
from maskae.kernels.operands import feature_names
from tests.kernels.attention_case import FEATURES, make_case

ROW = {"device": "NVIDIA H200", "dtype": "bfloat16", "options": "plain", "head_dim": 64, "min_length": 1, "max_length": 512,
       "implementation": "cudnn"}
ROWS = (ROW, {"device": "NVIDIA H200", "options": "mask", "min_length": 100, "max_length": 200, "implementation": "pallas_gpu"})


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        (("NVIDIA H200", 50, 512, 64, jnp.dtype("bfloat16"), "plain"), "cudnn"),
        (("NVIDIA H200", 50, 513, 64, jnp.dtype("bfloat16"), "plain"), "xla"),
        (("NVIDIA H200", 50, 50, 48, jnp.dtype("bfloat16"), "plain"), "xla"),
        (("NVIDIA H200", 50, 50, 64, jnp.dtype("float32"), "plain"), "xla"),
        (("NVIDIA H200", 50, 50, 64, jnp.dtype("bfloat16"), "mask"), "xla"),
        (("NVIDIA H200", 100, 50, 48, jnp.dtype("float32"), "mask"), "pallas_gpu"),
        (("TPU v5e", 50, 50, 64, jnp.dtype("bfloat16"), "plain"), "xla"),
    ],
)
def test_the_first_row_that_fits_counts_and_without_one_plain_jax(asked: tuple, chosen: str) -> None:
    assert choose(*asked, table=ROWS) == chosen


def test_the_installed_table_is_sound() -> None:
    for row in load_table():
        assert 1 <= row["min_length"] <= row["max_length"]
    assert choose("a device of tomorrow", 1, 1, 64, jnp.dtype("float32"), "plain") == "xla"


@pytest.mark.parametrize(("changed", "words"), [({"implementation": "cudn"}, "mean 'cudnn'"), ({"max_length": None}, "'max_length'")])
def test_a_damaged_table_is_said(tmp_path: Path, changed: dict, words: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"rows": [ROW, ROW | changed]}))
    with pytest.raises(UserError, match=words) as error:
        load_table(path)
    assert "row 1" in str(error.value)


def test_features_have_names() -> None:
    names = [feature_names(*make_case((1, 1, 1, 1, 1), features)[:2]) for features in ((), ("mask", "cap"), FEATURES)]
    assert names == ["plain", "mask+cap", "mask+segments+positions+cap"]
