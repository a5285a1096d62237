"""The report: one file without outside references, complete with every piece and sound without any."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskae.errors import UserError
from maskae.monitor import describe_run, open_writers
from maskae.plots import Chart, draw_charts
from maskae.report import main, write_report

VOID = {"meta", "img", "br"}


class Balance(HTMLParser):
    """Fails on a tag that is closed in the wrong place; collects text, sources and links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def parse(path: Path) -> Balance:
    page = Balance()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    assert all(source.startswith("data:image/") for source in page.sources)
    return page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with everything in it, and with text that HTML must not take for its own."""
    workdir = tmp_path_factory.mktemp("runs") / "small <run>"
    writers = open_writers(workdir, resume_step=None, tensorboard=False)
    for step in range(1, 41):
        loss = math.nan if step == 7 else 1 / step
        writers.scalars(step, {"loss": loss, "trivial_loss": 1.0, "skipped_steps": 0.0, "machine/examples_per_second": 1000.0 + step})
    for step in (0, 40):
        writers.scalars(step, {"evaluate/knn_top1_k20": 0.5 + step / 100})
        writers.images(step, {"reconstruction": np.full((4, 6, 3), step, np.uint8)})
    rows = {
        "raw pixels": {"knn_top1_k20": 0.812345},
        "untrained": {"knn_top1_k20": 0.5, "effective_rank": 3.0},
        "pretrained": {"knn_top1_k20": 0.9, "effective_rank": 7.0, "linear_learning_rate": 0.125},
    }
    (workdir / "evaluation.json").write_text(json.dumps({"step": 40, "rows": rows}))
    arguments = ["--config", "configs/x.py", "--workdir", "runs/a b", "--config.seed=3"]
    summary = {"system": "mae", "parameters": 1234567, "total_steps": 50, "forward_flops_per_example": 1.5e9, "arguments": arguments}
    (workdir / "summary.json").write_text(json.dumps(describe_run() | summary))
    totals = {"train_seconds": 75.0, "device_hours": 0.02, "pause_seconds": {"evaluate": 61.0}}
    bad = {"bad_records": {"count": 1, "names": ["cats/<broken>.jpg"]}}
    (workdir / "totals.json").write_text(json.dumps(totals | bad))
    (workdir / "config.json").write_text(json.dumps({"train": {"batch_size": 64}, "data": {"source": "folder:<x>", "list": []}}))
    return workdir


def test_report_shows_everything(run: Path) -> None:
    page = parse(write_report(run))
    for expected in (
        "small <run>",
        "step 40 of 50",
        "1.23 M",
        "1.5 GFLOP",
        "unknown",
        "0:01:15",
        "evaluate: 0:01:01",
        "0.8123",
        "cats/<broken>.jpg",
        "1 record could not be read",
        "train.batch size",
        "folder:<x>",
        "reconstruction, step 40",
        "python -m maskae.main --config configs/x.py --config.seed=3 --workdir",
        "--evaluate",
    ):
        assert expected in page.text, expected


def test_baselines_stand_beside_the_trained_encoder_and_the_best_is_marked(run: Path) -> None:
    text = write_report(run).read_text()
    header = re.search(r"<thead><tr>(.*?)</tr>", text)
    assert header is not None and re.findall(r"<th>(.*?)</th>", header[1]) == ["", "pretrained", "raw pixels", "untrained"]
    assert re.findall(r'<td class="best">([0-9.]+)', text) == ["0.9000"], "a rank and a learning rate have no winner"
    assert "What the probes chose" in text and "0.125" in text


def test_pictures_and_curves_are_inside_the_page(run: Path) -> None:
    sources = parse(write_report(run)).sources
    pictures = [source for source in sources if source.startswith("data:image/png;base64,")]
    values = [np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))[0, 0, 0] for source in pictures]
    assert values == [0, 40], "the first and the last panel"
    curves = [base64.b64decode(source.partition(",")[2]) for source in sources if "svg" in source[:30]]
    assert len(curves) == 3, "loss (with the trivial one), rate and kNN; the count that stayed at zero is left out"
    assert all(b"<svg" in curve for curve in curves)


def test_missing_pieces_are_left_out_or_said_to_be_missing(tmp_path: Path) -> None:
    page = parse(write_report(tmp_path))
    for missing in ("No evaluation numbers", "No panels", "No metrics", "--config CONFIG"):
        assert missing in page.text
    assert "Settings" not in page.text and "could not be read" not in page.text


@pytest.mark.parametrize("name", ["config.json", "summary.json", "totals.json", "evaluation.json", "metrics.jsonl", "panels"])
def test_any_one_piece_may_be_missing(run: Path, tmp_path: Path, name: str) -> None:
    for path in run.iterdir():
        if path.name not in (name, "report.html"):
            (tmp_path / path.name).symlink_to(path)
    page = parse(write_report(tmp_path))
    assert ("No panels" in page.text) == (name == "panels")
    assert ("No evaluation numbers" in page.text) == (name == "evaluation.json")


def test_run_without_labels_has_only_label_free_numbers(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({"step": 5, "rows": {"raw pixels": {}, "pretrained": {"effective_rank": 7.5}}}))
    page = parse(write_report(tmp_path))
    assert "effective rank" in page.text and "7.5" in page.text and "raw pixels" not in page.text


def test_command_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert main([str(run.parent / "smal <run>")]) == 2
    assert "did you mean 'small <run>'?" in capsys.readouterr().err
    assert main([]) == 2


def test_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "totals.json").write_text('{"train_seconds": ')
    with pytest.raises(UserError, match=r"totals\.json is not readable as JSON"):
        write_report(tmp_path)


def test_charts_depend_on_their_content_alone() -> None:
    charts = [Chart("loss", {"a": ([1, 2], [1.0, math.nan]), "b": ([1, 2], [0.5, 0.25])}, levels={"pixels": 0.75})]
    assert draw_charts(charts, columns=2, kind="svg") == draw_charts(charts, columns=2, kind="svg")
    with Image.open(io.BytesIO(draw_charts(charts * 3, columns=2, kind="png"))) as picture:
        assert picture.width > picture.height
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_charts([], columns=1, kind="png")
