"""Fine-tuning and probing reproduce the recorded case of the paper's code, and the comparison notices what it should."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from maskae.errors import UserError
from maskae.interop.case import Case, Reproduced
from maskae.interop.mae_classifiers import drop_path_draws, finetune_system, numbers_of, replay_finetune, replay_probe, top_percent
from maskae.interop.parity import compare


@pytest.fixture(scope="module")
def case(shared: Path) -> Case:
    return Case.read(shared / "goldens" / "mae" / "a")


def disagreeing(case: Case, reproduced: dict[str, Reproduced], prefix: str, *elsewhere: str) -> list[str]:
    names = [name for name in case.outputs if name.startswith(prefix) and name not in elsewhere]
    assert len(names) > 5
    return [name for name in names if not compare(name, case.outputs[name], reproduced.get(name)).agrees]


def test_fine_tuning_is_reproduced(case: Case) -> None:
    reproduced = replay_finetune(case)
    assert disagreeing(case, reproduced, "ft_") == []
    # Far inside of what is allowed, and a different table of every name that is recorded.
    assert abs(float(reproduced["ft_loss_soft"].value) - float(case.outputs["ft_loss_soft"])) < 1e-6
    skipped = reproduced["ft_train_params/blocks.1.attn.qkv.bias"].skip
    assert skipped is not None and skipped.sum() == case.record["constructor"]["embed_dim"]


def test_the_probe_is_reproduced(case: Case) -> None:
    assert disagreeing(case, replay_probe(case), "probe_", "probe_crop_table") == []


def test_another_layer_decay_or_trust_is_noticed(case: Case) -> None:
    record = copy.deepcopy(case.record)
    record["finetune"]["layer_decay"] = 0.75
    record["linear_probe"]["optimizer"] = "LARS momentum 0.9 trust 0.002"
    changed = replace(case, record=record)
    wrong = disagreeing(changed, replay_finetune(changed), "ft_")
    assert "ft_train_params/cls_token" in wrong and "ft_logits" not in wrong
    assert "probe_weight" in disagreeing(changed, replay_probe(changed), "probe_", "probe_crop_table")


def test_a_missing_weight_is_named(case: Case) -> None:
    weights = {name: value for name, value in case.weights.items() if name != "blocks.1.mlp.fc1.bias"}
    with pytest.raises(UserError, match="encoder/block_1/mlp/fc1/bias"):
        replay_finetune(replace(case, weights=weights))


def test_draws_belong_to_the_blocks_that_drop(case: Case) -> None:
    system = finetune_system(case)
    rates = np.linspace(0, system.drop_path, system.depth)
    draws = np.asarray(drop_path_draws(case, rates))
    np.testing.assert_array_equal(draws[1:].reshape(-1, draws.shape[-1]), case.inputs["ft_drop_path_u"])
    assert not drop_path_draws(replace(case, inputs={"ft_imgs": case.inputs["ft_imgs"]}), 0 * rates).any()


def test_small_pieces() -> None:
    logits = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    assert top_percent(logits, np.array([0, 1]), 1) == 50.0
    assert top_percent(logits, np.array([0, 1]), 2) == 100.0
    assert numbers_of("AdamW betas (0.9, 0.95) eps 1e-8", r"\(([\d.]+), ([\d.]+)\)") == (0.9, 0.95)
    with pytest.raises(UserError, match="SGD"):
        numbers_of("SGD", r"momentum ([\d.]+)")
