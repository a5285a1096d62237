"""The loop, run in this process on a tiny MAE: what it leaves behind, resume, stops, refusals."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from maskae import train
from maskae.checkpoint import Checkpointer
from maskae.config import load_config
from maskae.errors import UserError
from maskae.monitor import is_machine_column, read_metrics

SMALL = (
    "model.depth=1",
    "model.width=16",
    "model.heads=2",
    "model.decoder_width=16",
    "model.decoder_depth=1",
    "model.decoder_heads=2",
    "train.batch_size=32",
    "train.total_steps=12",
    "checkpoint.every_steps=4",
    "checkpoint.keep_last=10",
    "evaluate.every_steps=6",
    "evaluate.batch_size=512",
    "evaluate.evaluators={'knn': {}, 'rank': {}}",
    "log.every_steps=5",
    "log.tensorboard=false",
)


def tiny_config(*overrides: str) -> ConfigDict:
    return load_config("configs/mae.py:tiny", [*SMALL, *overrides])


def rows(workdir: Path) -> list[dict[str, float]]:
    """The metric rows without the columns that depend on the machine."""
    return [{k: v for k, v in row.items() if not is_machine_column(k)} for row in read_metrics(workdir / "metrics.jsonl")]


def stored(workdir: Path, step: int) -> dict:
    with Checkpointer(str(workdir / "checkpoints"), keep_last=1) as checkpointer:
        return checkpointer.restore_raw(step)


def assert_same_run(a: Path, b: Path, step: int = 12) -> None:
    jax.tree.map(np.testing.assert_array_equal, stored(a, step), stored(b, step))
    assert rows(a) == rows(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that was never interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert train.run(tiny_config(), workdir) == 0
    return workdir


def test_a_run_leaves_everything_to_look_at(whole):
    for name in ("config.json", "metrics.csv", "metrics.jsonl", "evaluation.json", "summary.json", "totals.json", "report.html"):
        assert (whole / name).stat().st_size, name
    steps = [row["step"] for row in rows(whole)]
    assert steps == [0, 5, 6, 10, 12, 12], "losses at 5, 10 and the end; evaluations at 0, 6 and the end"
    results = json.loads((whole / "evaluation.json").read_text())["rows"]
    assert set(results) == {"pretrained", "untrained", "raw pixels"}
    assert results["raw pixels"]["knn_top1_k10"] > 0.95
    assert sorted(p.name for p in (whole / "panels").glob("*.png")) == [f"{s:08d}_reconstruction.png" for s in (0, 6, 12)]
    assert sorted(int(p.name) for p in (whole / "checkpoints").iterdir()) == [4, 8, 12]


def stop_after(monkeypatch, step: int, number: signal.Signals) -> None:
    """Sends this process a signal once step `step` has been taken."""
    taken = train.Loop.after_step

    def after_step(self, state, done, metrics):
        taken(self, state, done, metrics)
        if done == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(train.Loop, "after_step", after_step)


@pytest.mark.parametrize(
    ("step", "number", "status"),
    [(3, signal.SIGTERM, 0), (6, signal.SIGTERM, 0), (8, signal.SIGINT, 130)],
    ids=["between", "at-an-evaluation", "at-a-save"],
)
def test_a_stopped_run_saves_and_goes_on_bit_for_bit(whole, tmp_path, monkeypatch, step, number, status):
    workdir = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_after(patch, step, number)
        assert train.run(tiny_config(), workdir) == status
    assert step in [int(p.name) for p in (workdir / "checkpoints").iterdir()]
    assert train.run(tiny_config(), workdir) == 0
    assert_same_run(whole, workdir)


def test_a_stop_during_an_evaluation_saves_at_once_and_evaluates_after_the_resume(whole, tmp_path, monkeypatch):
    workdir = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        metrics = train.Evaluation.metrics

        def interrupted(self, state):
            if int(state["step"]) == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return metrics(self, state)

        patch.setattr(train.Evaluation, "metrics", interrupted)
        assert train.run(tiny_config(), workdir) == 0
    assert max(int(p.name) for p in (workdir / "checkpoints").iterdir()) == 6
    assert 6 not in [row["step"] for row in rows(workdir)]
    assert train.run(tiny_config(), workdir) == 0
    assert_same_run(whole, workdir)


def test_a_damaged_newest_checkpoint_is_passed_over(whole, tmp_path, monkeypatch, caplog):
    workdir = tmp_path / "damaged"
    with monkeypatch.context() as patch:
        stop_after(patch, 9, signal.SIGTERM)
        train.run(tiny_config(), workdir)
    victim = max((p for p in (workdir / "checkpoints" / "9").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert train.run(tiny_config(), workdir) == 0
    assert any("step 9" in record.getMessage() and "passed over" in record.getMessage() for record in caplog.records)
    assert_same_run(whole, workdir)


def test_a_finished_run_is_left_as_it_is_and_tells_its_speed(whole, caplog):
    before = (whole / "metrics.jsonl").read_bytes()
    with caplog.at_level("INFO"):
        assert train.run(tiny_config(), whole) == 0
    assert (whole / "metrics.jsonl").read_bytes() == before
    speed = [record.getMessage() for record in caplog.records if "examples/s" in record.getMessage()]
    assert len(speed) == 1 and "MFU unknown" in speed[0] and "waiting for data" in speed[0]


def test_a_longer_run_goes_on_from_a_finished_one_and_keeps_the_old_config(whole, tmp_path):
    import shutil

    workdir = tmp_path / "longer"
    shutil.copytree(whole, workdir)
    assert train.run(tiny_config("train.total_steps=14", "optimizer.schedule=constant"), workdir) == 0
    assert rows(workdir)[: len(rows(whole))] == rows(whole)
    assert rows(workdir)[-1]["step"] == 14
    assert json.loads((workdir / "config_before_step_12.json").read_text())["train"]["total_steps"] == 12


def test_a_changed_model_is_refused_leaf_by_leaf_and_nothing_changes_on_disk(whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    with pytest.raises(UserError) as caught:
        train.run(tiny_config("model.decoder_width=32"), whole)
    assert "params/decoder/mask_token" in str(caught.value) and "[1, 1, 16]" in str(caught.value) and "[1, 1, 32]" in str(caught.value)
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()} == before


def test_resume_never_and_must_say_what_is_there(whole, tmp_path):
    with pytest.raises(UserError, match="checkpoint of step 12"):
        train.run(tiny_config("checkpoint.resume=never"), whole)
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        train.run(tiny_config("checkpoint.resume=must"), tmp_path / "empty")


def test_a_bucket_is_no_folder_for_logs():
    with pytest.raises(UserError, match="mount the bucket"):
        train.run(tiny_config(), Path("gs://bucket/run"))


def test_logs_of_another_run_are_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"seed": 7}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(UserError, match="choose another folder"):
        train.run(tiny_config(), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'


def test_too_many_non_finite_steps_stop_the_run_and_name_the_records(tmp_path):
    config = tiny_config("optimizer.base_learning_rate=1e38", "optimizer.warmup_steps=0", "train.max_nonfinite_in_a_row=2")
    with pytest.raises(UserError, match="2 steps in a row"):
        train.run(config, tmp_path / "bad")
    record = json.loads((tmp_path / "bad" / "nonfinite.json").read_text())
    assert len(record["index"]) == 32 and record["in_a_row"] == 2 and record["records"][0].startswith("digits record")


def test_a_checkpoint_is_evaluated_as_during_training(whole, capsys):
    expected = json.loads((whole / "evaluation.json").read_text())["rows"]["pretrained"]
    train.evaluate_run(tiny_config(), whole)
    assert f"{expected['effective_rank']:.4f}" in capsys.readouterr().out
    assert json.loads((whole / "evaluation.json").read_text())["rows"]["pretrained"] == expected


def test_a_later_evaluation_adds_to_the_numbers_of_the_same_step(whole, tmp_path):
    import shutil

    workdir = tmp_path / "again"
    shutil.copytree(whole, workdir)
    config = tiny_config("evaluate.evaluators={'ridge': {}}")
    train.evaluate_run(config, workdir)
    row = json.loads((workdir / "evaluation.json").read_text())["rows"]["pretrained"]
    assert {"ridge_top1", "effective_rank", "knn_top1_k10"} <= set(row)


def test_fine_tuning_by_the_same_loop_adds_its_accuracy(whole, tmp_path):
    import shutil

    workdir = tmp_path / "tuned"
    shutil.copytree(whole, workdir)
    config = tiny_config("evaluate.finetune=configs/mae_finetune.py:tiny")
    train.evaluate_run(config, workdir)
    row = json.loads((workdir / "evaluation.json").read_text())["rows"]["pretrained"]
    assert row["finetune_top1"] > 0.8
    assert (workdir / "finetune" / "report.html").exists()


def test_another_run_can_start_from_this_one(whole, tmp_path):
    workdir = tmp_path / "next"
    config = tiny_config(f"init_from={whole}", "train.total_steps=1", "optimizer.warmup_steps=0", "train.ema_decay=0.5")
    assert train.run(config, workdir) == 0
    first = stored(whole, 12)["params"]["encoder"]["patch_embed"]["kernel"]
    assert np.abs(stored(workdir, 1)["params"]["encoder"]["patch_embed"]["kernel"] - first).max() < 0.01
    assert "before training" in json.loads((workdir / "evaluation.json").read_text())["rows"]
    with pytest.raises(UserError, match="did you mean"):
        train.run(tiny_config(f"init_from={whole}x"), tmp_path / "none")
