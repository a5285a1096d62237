"""Point-CMAE's replay with options that the recorded case does not have: other sizes, Chamfer-L1, the MLP head, parts that are absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.interop import point_cmae as interop
from maskae.interop.case import Case
from maskae.interop.parity import compare
from maskae.interop.point_layout import CLASSIFIER
from maskae.systems.point_classifier import PointClassifier

TRANSFORMER = {"mask_ratio": 0.5, "mask_type": "rand", "trans_dim": 8, "encoder_dims": 8, "depth": 2, "drop_path_rate": 0.0, "num_heads": 2}
TRANSFORMER |= {"decoder_depth": 1, "decoder_num_heads": 4}
MODEL = {"NAME": "Point_CMAE", "group_size": 3, "num_group": 4, "loss": "cdl1", "transformer_config": TRANSFORMER}


def case_of(config: dict[str, Any], outputs: dict[str, np.ndarray]) -> Case:
    """A case with random weights, whose loss has other weights than the released code's."""
    config = {"model": MODEL, "loss_weights": [10.0, 2.0]} | config
    record = {"system": "point_cmae", "case": "t", "config": config, "tensors": {"outputs": {}}}
    generator = np.random.default_rng(0)
    inputs = {"pts": generator.normal(size=(2, 12, 3)), "aug_scale": np.full((2, 3), 1.1), "aug_shift": np.full((2, 3), 0.1)}
    inputs |= {f"mask{view}": generator.permuted(np.tile([0, 0, 1, 1], (2, 1)), axis=1) for view in (1, 2)}
    return Case(Path(), record, {}, {name: np.asarray(value, np.float32) for name, value in inputs.items()}, outputs)


def weights_of(system: Any, layout: Any) -> dict[str, np.ndarray]:
    """Random tensors under the official names; one of the tokenizer in half precision, as some are stored."""
    generator = np.random.default_rng(1)
    fresh = jax.eval_shape(system.init, jax.random.key(0), {})
    drawn = jax.tree.map(lambda leaf: generator.uniform(0.1, 0.5, leaf.shape).astype(np.float32), {**fresh.params, **fresh.state})
    names = interop.official_names(drawn, layout)
    return {name: value.astype(np.float16) if name.endswith("first_conv.3.weight") else value for name, value in names.items()}


def test_other_sizes_and_absent_parts() -> None:
    case = case_of({}, {"loss": np.zeros(()), "rebuild1": np.zeros((1, 2, 3, 3))})
    with jax.enable_x64(True):
        case.weights.update(weights_of(interop.system_of(case), interop.POINT_CMAE))
    found = interop.replay(case)
    shapes = {"tokens": (2, 4, 8), "block1_1": (2, 3, 8), "de_feats2": (2, 4, 8), "rebuild1": (1, 2, 3, 3), "knn_idx": (2, 4, 3)}
    assert {name: np.shape(found[name].value) for name in shapes} == shapes
    value = {name: float(found[name].value) for name in ("loss", "loss_recon", "loss_contras")}
    assert value["loss"] == pytest.approx(10 * value["loss_recon"] + 2 * value["loss_contras"], rel=1e-6)
    # Rectifiers and the order of neighbours need the precision of the recording.
    assert found["neighborhood"].value.dtype == found["tokens"].value.dtype == np.float64
    assert not {"lr_per_epoch", "chamfer/l1", "finetune/logits", "grad/mask_token1"} & set(found)


def test_gradients_that_are_zero_are_compared_with_the_largest_one() -> None:
    bias = "MAE_encoder.encoder.first_conv.0.bias"
    case = case_of({}, {f"grad/{bias}": np.zeros(128, np.float32), f"gradnorm/{bias}": np.asarray(1e-17)})
    system = interop.system_of(case)
    with jax.enable_x64(True):
        variables = interop.load(weights_of(system, interop.POINT_CMAE), system, interop.POINT_CMAE)
        found = interop.replay_gradients(case, system, variables)
    assert all(compare(name, recorded, found[name]).agrees for name, recorded in case.outputs.items())


def test_the_classifier_with_an_mlp_head() -> None:
    case = case_of({"finetune": {"type": "mlp3", "cls_dim": 5}}, {})
    case.inputs["label"] = np.asarray([0, 4], np.int32)
    with jax.enable_x64(True):
        system = PointClassifier(**interop.sizes_of(case), num_classes=5, points=12)
        names = weights_of(system, CLASSIFIER)
        parts = {name: "finetune/" if name.startswith("cls_") else "MAE_encoder." for name in names}
        case.weights.update({parts[name] + name: value for name, value in names.items()})
        found = interop.replay_classifier(case)
    assert np.shape(found["finetune/logits"].value) == (2, 5)
    assert np.isfinite(found["finetune/loss"].value)


def test_schedules_of_other_lengths() -> None:
    case = case_of({"scheduler": {"lr": 1e-2, "epochs": 8, "initial_epochs": 2}}, {})
    rates = interop.replay_schedule(case)["lr_per_epoch"].value
    # Warm-up over epochs 0 to 2, of which the first two share a rate; then the cosine, whose phase counts from epoch 0.
    cosine = [1e-6 + (1e-2 - 1e-6) * (1 + np.cos(np.pi * epoch / 8)) / 2 for epoch in range(2, 8)]
    np.testing.assert_allclose(rates, [1e-6, 1e-6, (1e-2 + 1e-6) / 2, *cosine], rtol=1e-5)


def test_an_unknown_loss_is_named() -> None:
    with pytest.raises(UserError, match="chamfer"):
        interop.system_of(case_of({"model": MODEL | {"loss": "emd"}}, {}))
