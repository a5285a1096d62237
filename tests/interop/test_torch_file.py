"""The one conversion that needs torch."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from maskae.errors import UserError
from maskae.interop.torch_file import convert_torch_file, main


def test_without_torch_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="pip install 'maskae\\[interop\\]'"):
        convert_torch_file(tmp_path / "a.pth", tmp_path / "a.safetensors")


def test_wrong_command_lines_end_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["only-one"]) == 2
    assert capsys.readouterr().err.startswith("usage: ")


class StandInTensor:
    """As much of a torch tensor as the conversion touches; used where torch is not installed."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, str(array.dtype)

    def detach(self) -> StandInTensor:
        return self

    def float(self) -> StandInTensor:
        return StandInTensor(self.array.astype(np.float32))

    def numpy(self) -> np.ndarray:
        return self.array


def test_tensors_inside_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    stored = {"a.weight": StandInTensor(weight.T), "half": StandInTensor(weight.astype(np.float16)), "scale": StandInTensor(np.float32(3))}

    def load(path: Path, map_location: str, weights_only: bool) -> dict[str, Any]:
        assert weights_only, "anything else would run code from the file"
        return {"model": stored | {"version": 2}, "epoch": 3}

    stand_in = SimpleNamespace(Tensor=StandInTensor, load=load, float16="float16", bfloat16="bfloat16")
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    (tmp_path / "a.pth").touch()
    assert main([str(tmp_path / "a.pth"), str(tmp_path / "a.safetensors")]) == 0
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(stored)
    np.testing.assert_array_equal(found["a.weight"], weight.T)
    assert found["half"].dtype == np.float32
    assert found["scale"].shape == ()
    with pytest.raises(UserError, match="exists; weights are not overwritten"):
        convert_torch_file(tmp_path / "a.pth", tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no weights file"):
        convert_torch_file(tmp_path / "b.pth", tmp_path / "b.safetensors")


def test_a_real_torch_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is only needed for this conversion")
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    torch.save({"model": {"a.weight": weight.T, "half": weight.half()}, "epoch": 3}, tmp_path / "a.pth")
    assert convert_torch_file(tmp_path / "a.pth", tmp_path / "a.safetensors") == ["a.weight", "half"]
    np.testing.assert_array_equal(load_file(tmp_path / "a.safetensors")["a.weight"], weight.numpy().T)
