"""The command: MAE equals the paper's code on every recorded tensor, and a difference is not missed."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "parity.py"
    spec = importlib.util.spec_from_file_location("parity_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mae_equals_the_papers_code(tool: ModuleType, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(shared / "goldens/mae/a")]) == 0
    table = capsys.readouterr().out
    recorded = load_file(shared / "goldens/mae/a/outputs.safetensors")
    assert f"{len(recorded)} of {len(recorded)} recorded tensors agree" in table
    assert {line.split()[0] for line in table.splitlines()} >= set(recorded)


def test_a_changed_weight_and_a_new_tensor_are_found(
    tool: ModuleType, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "case"
    shutil.copytree(shared / "goldens/mae/a", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    kept = ("latent", "pred", "loss", "mask")
    outputs = {name: value for name, value in load_file(folder / "outputs.safetensors").items() if name in kept}
    save_file(outputs | {"unheard_of": np.ones(3)}, folder / "outputs.safetensors")
    record = json.loads((folder / "case.json").read_text())
    listed = record["tensors"]["outputs.safetensors"]
    record["tensors"]["outputs.safetensors"] = [each for each in listed if each["name"] in kept]
    (folder / "case.json").write_text(json.dumps(record))
    weights = load_file(folder / "weights.safetensors")
    weights["decoder_pred.bias"][7] += 1e-3
    save_file(weights, folder / "weights.safetensors")
    assert tool.main([str(folder)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 5 recorded tensors agree; not: pred, loss, unheard_of"


def test_what_is_no_case_ends_with_one_line(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is not a reference case" in error
