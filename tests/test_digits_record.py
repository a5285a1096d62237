"""The digits protocol over three seeds: minutes of training, the record behind the README's figures.

    pytest -n 0 -m slow tests/test_digits_record.py -s
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from maskae.monitor import read_metrics
from tests.test_main import ENVIRONMENT, ROOT

# Masked loss of predicting each position's mean pixel, and of predicting zero; un-normalised and normalised pixels.
TRIVIAL = {"configs/quickstart.py": 0.517, "configs/mae.py:tiny": 0.544}
SEEDS = (0, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("spec", TRIVIAL)
def test_digits_over_three_seeds(spec, tmp_path):
    rows, losses = [], []
    for seed in SEEDS:
        workdir = tmp_path / str(seed)
        words = ["--config", spec, "--workdir", str(workdir), f"--config.seed={seed}"]
        assert subprocess.run([sys.executable, "-m", "maskae.main", *words], cwd=ROOT, env=ENVIRONMENT, check=False).returncode == 0
        rows.append(json.loads((workdir / "evaluation.json").read_text())["rows"])
        losses.append({row["step"]: row["loss"] for row in read_metrics(workdir / "metrics.jsonl") if "loss" in row})
    few = "logistic_10_per_class_top1"
    for kind in ("pretrained", "untrained", "raw pixels"):
        for metric in ("logistic_top1", few):
            values = [row[kind][metric] for row in rows]
            print(f"{spec} {kind} {metric}: mean {np.mean(values):.3f} of {', '.join(f'{value:.3f}' for value in values)}")
    for step in (500, 1500, 3000):
        print(f"{spec} masked loss, mean of 50 steps up to {step}: {', '.join(f'{loss[step]:.3f}' for loss in losses)}")
    assert all(loss[500] < TRIVIAL[spec] and loss[3000] < 0.6 * TRIVIAL[spec] for loss in losses)
    pretrained, untrained, raw = (np.mean([row[kind][few] for row in rows]) for kind in ("pretrained", "untrained", "raw pixels"))
    assert pretrained >= (0.88 if "quickstart" in spec else 0.86)
    assert pretrained > raw > untrained + 0.1
