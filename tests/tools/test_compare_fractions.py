"""The table and the plot over shares of the labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tools.compare_fractions import main


def write_run(folder: Path, config: dict[str, Any], rows: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps({"examples": {"train": 200, "val": 20}}))
    (folder / "evaluation.json").write_text(json.dumps({"step": 3, "rows": rows}))
    return str(folder)


def shares(all_labels: float, few: float) -> dict[str, float]:
    values = {"labels_100_percent_top1": all_labels, "labels_3_percent_top1": few}
    return values | {"labels_100_percent_auc": 0.9, "labels_3_percent_top1_std": 0.1}


def test_seeds_are_averaged_and_the_best_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    untrained = {"untrained": shares(0.2, 0.1)}
    runs = [
        write_run(tmp_path / "a0", {"system": "spark_medical", "seed": 0}, {"pretrained": shares(0.8, 0.4), **untrained}),
        write_run(tmp_path / "a1", {"system": "spark_medical", "seed": 1}, {"pretrained": shares(0.6, 0.6)}),
        write_run(tmp_path / "b0", {"system": "simclr", "seed": 0}, {"pretrained": shares(0.9, 0.3), **untrained}),
        write_run(tmp_path / "s", {"system": "cnn_finetune", "data": {"max_examples": 20}}, {"trained": {"top1": 0.5}}),
        write_run(tmp_path / "t", {"system": "cnn_finetune", "init_from": str(tmp_path / "a0"), "data": {}}, {"trained": {"top1": 0.7}}),
    ]
    assert main([*runs, "--out", str(tmp_path / "out" / "table")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| top1 | runs | 100 % | 10 % | 3 % |"
    assert "| spark_medical | 2 | 0.700 ± 0.100 |  | **0.500 ± 0.100** |" in lines
    assert "| untrained | 1 | 0.200 ± 0.000 |  | 0.100 ± 0.000 |" in lines
    assert "| simclr | 1 | **0.900 ± 0.000** |  | 0.300 ± 0.000 |" in lines
    assert "| scratch | 1 |  | **0.500 ± 0.000** |  |" in lines
    assert "| tuned spark_medical | 1 | 0.700 ± 0.000 |  |  |" in lines
    assert (tmp_path / "out" / "table.md").read_text().startswith(lines[0])
    assert Image.open(tmp_path / "out" / "table.png").size[0] > 400


def test_a_run_without_shares_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", {"system": "mae", "seed": 0}, {"pretrained": {"knn_top1_k20": 0.5}})
    assert main([run, "--out", str(tmp_path / "table")]) == 2
    assert "no `labels_..._percent_top1`" in capsys.readouterr().err
