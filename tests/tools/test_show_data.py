"""The contact sheet shows the batch of a step as the loss gets it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("maskae_tools_show_data", ROOT / "tools" / "show_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


show_data = load()


def test_pictures_stand_in_reading_order_and_are_enlarged() -> None:
    pictures = np.stack([np.full((8, 16, 3), 40 * i, np.uint8) for i in range(5)])
    sheet = show_data.contact_sheet(pictures, [str(i) for i in range(5)])
    gap, caption, (height, width) = show_data.GAP, show_data.CAPTION, (64, 128)
    assert sheet.shape == (2 * (height + caption + gap) + gap, 3 * (width + gap) + gap, 3)
    for number in range(5):
        top, left = gap + number // 3 * (height + caption + gap), gap + number % 3 * (width + gap)
        assert (sheet[top : top + height, left : left + width] == 40 * number).all()
        assert (sheet[top + height : top + height + caption, left : left + width] != 255).any(), "the caption"


def test_the_sheet_of_the_digits_shows_their_pixels(tmp_path: Path) -> None:
    from maskae.config import load_config
    from maskae.data.sources import open_source

    config = load_config(str(ROOT / "configs" / "quickstart.py"))
    pictures, captions = show_data.seen_images(config, step=3, count=4)
    digits = open_source("digits", "train")
    for picture, caption in zip(pictures, captions, strict=True):
        label, _, index = caption.partition(" #")
        record = digits[int(index)]
        assert str(record["label"]) == label
        np.testing.assert_allclose(picture[..., :1].astype(float), record["image"] * (255 / 16), atol=1)
    out = tmp_path / "sheet.png"
    assert show_data.main(["--config", str(ROOT / "configs" / "quickstart.py"), "--out", str(out), "--images", "9"]) == 0
    assert Image.open(out).size[0] == 3 * (64 + show_data.GAP) + show_data.GAP


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.data.sauce=digits"], "sauce"),
        (["--images", "0"], "--images at least 1"),
        (["--out", "nowhere/sheet.png"], "--out="),
        (["--outt", "x"], "--outt"),
    ],
)
def test_wrong_arguments_are_one_clear_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert show_data.main(["--config", str(ROOT / "configs" / "quickstart.py"), "--out", "sheet.png", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
