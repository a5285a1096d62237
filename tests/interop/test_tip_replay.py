"""TIP's replay with options that the recorded case does not have: basic blocks, other columns, the other schedule, absent parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.interop import tip as interop
from maskae.interop.case import Case
from maskae.interop.cnn import foreign_names
from maskae.systems.tip import Tip

OPTIONS = {"model": "resnet18", "img_size": 33, "projection_dim": 4, "multimodal_embedding_dim": 16, "temperature": 0.2, "lambda_0": 0.3}
OPTIONS |= {"tabular_transformer_num_layers": 1, "multimodal_transformer_num_layers": 2, "drop_rate": 0.0}
WIDTHS = (2, 4, 8, 16)


def case_of(outputs: dict[str, np.ndarray], built: dict[str, Any] | None = None, **options: Any) -> Case:
    """A case of basic blocks and of one continuous column, without corruption, with random weights."""
    config = {"hparams": OPTIONS | options, "resnet": {"block": "BasicBlock", "layers": [2, 1, 1, 1], "width": 2}}
    config |= {"field_lengths": [3, 2, 1], "corruption_rate": 0.0, "replace_special_rate": 0.4} | (built or {})
    generator = np.random.default_rng(0)
    rows = np.stack([generator.integers(0, 3, 9), generator.integers(0, 2, 9), generator.normal(size=9)], 1).astype(np.float32)
    inputs = {"image": generator.uniform(size=(3, 3, 33, 33)).astype(np.float32), "table": rows[:3], "marginal_rows": rows}
    inputs |= {"corrupt_columns": np.zeros((3, 0), np.int32), "corrupt_rows": np.zeros((3, 0), np.int32)}
    inputs |= {"mask_columns": np.asarray([[0], [2], [1]]), "neg_table": np.asarray([1, 2, 0]), "neg_image": np.asarray([2, 0, 1])}
    record = {"system": "tip", "case": "t", "config": config, "tensors": {"outputs": {}}}
    return Case(Path(), record, weights(inputs["table"]), inputs, outputs)


def weights(table: np.ndarray) -> dict[str, np.ndarray]:
    """Random tensors under the official names, maps of keys and values as one."""
    system = Tip(
        image_size=33,
        network="resnet18",
        layers=(2, 1, 1, 1),
        widths=WIDTHS,
        cardinalities=(3, 2),
        continuous=1,
        table_width=16,
        table_depth=1,
        fusion_depth=2,
        projection=4,
    )
    fresh = jax.eval_shape(system.init, jax.random.key(0), {"table": table, "table_missing": table})
    generator = np.random.default_rng(1)
    drawn = jax.tree.map(lambda leaf: generator.uniform(0.1, 0.5, leaf.shape).astype(np.float32), fresh)
    return interop.official_names(drawn.params) | foreign_names({"encoder": drawn.state["encoder"]}, interop.LAYOUT)


def test_basic_blocks_other_columns_and_absent_parts() -> None:
    case = case_of({"loss": np.zeros(())})
    found = interop.replay(case)
    shapes = {"image_features": (3, 16, 2, 2), "cat_logits": (3, 2, 5), "con_pred": (3, 1, 1), "mm_pos": (3, 4, 16), "itm_logits": (9, 2)}
    assert {name: np.shape(found[name].value) for name in shapes} == shapes
    # Rectifiers need the precision of the recording.
    assert found["image_features"].value.dtype == np.float64
    np.testing.assert_array_equal(found["table_corrupted"].value, case.inputs["table"])
    assert not {"lr_per_epoch", "finetune/logits", "grad/itm_head.bias"} & set(found)


def test_the_cosine_schedule() -> None:
    case = case_of({"lr_per_epoch": np.zeros(7)}, scheduler="cosine", lr=0.1, dataset_length=5, cosine_anneal_mult=2)
    rates = interop.replay_schedule(case)["lr_per_epoch"].value
    np.testing.assert_allclose(rates, 0.05 * (1 + np.cos(np.pi * np.arange(7) / 10)), rtol=1e-5)


@pytest.mark.parametrize(
    ("built", "options", "message"),
    [
        ({}, {"model": "vit_small"}, "hparams.model=vit_small"),
        ({}, {"drop_rate": 0.1}, "hparams.drop_rate=0.1"),
        ({"replace_random_rate": 0.2}, {}, "replace_random_rate=0.2"),
    ],
)
def test_what_cannot_be_replayed_is_named(built: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        interop.system_of(case_of({}, built, **options))


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(UserError, match="hparams.scheduler=step"):
        interop.replay_schedule(case_of({"lr_per_epoch": np.zeros(2)}, scheduler="step"))


def test_marginals_are_the_recorded_rows() -> None:
    case = case_of({})
    with jax.enable_x64(True):
        variables = interop.variables_of(case, interop.system_of(case))
    np.testing.assert_array_equal(variables.state["marginals"], jnp.asarray(case.inputs["marginal_rows"]))
