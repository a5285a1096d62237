"""Every recorded reference curve is reproduced."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from maskae.config import load_config, load_module
from tools.record_reference import losses_of, main

FILES = sorted((Path(__file__).parent / "refs").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_recorded_losses_come_again(path):
    record = json.loads(path.read_text())
    losses = losses_of(record["config"], record["overrides"], len(record["losses"]))
    np.testing.assert_allclose(losses, record["losses"], rtol=record["tolerance"])


def test_a_reference_curve_notices_a_changed_recipe():
    record = json.loads((Path(__file__).parent / "refs" / "mae_tiny.json").read_text())
    losses = losses_of(record["config"], [*record["overrides"], "model.mask_ratio=0.5"], 3)
    assert np.abs(np.array(losses) / record["losses"][:3] - 1).max() > 10 * record["tolerance"]


def test_a_reference_is_not_replaced_by_accident(capsys):
    assert main(["configs/mae.py:tiny", str(FILES[0])]) == 2
    assert "there already" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_variant_of_every_config_loads(path):
    for variant in getattr(load_module(path), "VARIANTS", ()):
        assert load_config(f"{path}:{variant}").train.batch_size >= 1
    assert load_config(str(path)).train.batch_size >= 1
