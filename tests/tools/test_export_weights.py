"""A run's newest checkpoint goes out under another library's names."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from maskae.checkpoint import Checkpointer
from maskae.interop.layout import Geometry
from maskae.interop.weights import load_weights, read_tensors
from maskae.systems.mae import Mae

MODEL: dict[str, Any] = {"image_size": 8, "patch_size": 4, "width": 8, "depth": 1, "heads": 2}
MODEL |= {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2, "mask_ratio": 0.5}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "export_weights.py"
    spec = importlib.util.spec_from_file_location("export_weights_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_newest_checkpoint_with_the_runs_config(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = Mae(**MODEL).init(jax.random.key(0), {}).params
    with Checkpointer(str(tmp_path / "run" / "checkpoints"), keep_last=2) as checkpointer:
        for step in (1, 2):
            tree = {"step": np.int32(step), "params": jax.tree.map(lambda x, s=step: x + s, params), "state": {}, "ema": {}}
            checkpointer.save(step, tree, {"config": {"model": MODEL}})
        checkpointer.wait()
    out = tmp_path / "w.safetensors"
    assert tool.main([str(tmp_path / "run"), "--layout", "timm", "--out", str(out)]) == 0
    assert "left out, the timm layout has no name for it: decoder/mask_token" in capsys.readouterr().out
    metadata = read_tensors(out)[1]
    assert metadata["step"] == "2"
    assert json.loads(metadata["maskae"])["config"]["model"] == MODEL
    loaded, _ = load_weights(out, params, Geometry(4, (2, 2)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 2), loaded["encoder"], params["encoder"])
    assert tool.main([str(tmp_path / "run"), "--out", str(out)]) == 2
    assert "exists; weights are not overwritten" in capsys.readouterr().err


def test_a_folder_without_a_checkpoint_ends_with_one_line(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(tmp_path), "--out", str(tmp_path / "w.safetensors")]) == 2
    assert capsys.readouterr().err == f"{tmp_path} holds no whole checkpoint\n"
