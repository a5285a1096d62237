"""Sheets of pictures to look at: rows of examples, titled columns such as original, masked, prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# The outputs of `System.reconstruct`. The last one is flattered: each patch gets the mean and the std of the hidden original back,
# which the model was never asked to predict. It must not be taken for a reconstruction, so its title says what it is.
TITLES = {
    "original": "original",
    "masked": "masked",
    "prediction": "prediction (raw)",
    "prediction_with_patch_statistics": "prediction (patch's own mean/std)",
}
GAP = 8
MARGIN = 14
FONT_SIZE = 14
SMALLEST_SIDE = 112
BACKGROUND, INK, PALE_INK = (255, 255, 255), (34, 34, 34), (110, 110, 110)


def to_pixels(images: Any, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undoes the normalisation and makes pictures one can look at.

    Args:
        images: float [B, H, W, C] in normalised units, `(pixel / max_value - mean) / std`.
        mean: of each channel, in units of 0..1 (of `max_value`).
        std: of each channel, in the same units.

    Returns:
        uint8 [B, H, W, 3]. One channel becomes gray; two become red and green; of more than three, the first three are shown. What lies
        outside of 0..1 is clipped; NaN is black.

    Raises:
        ValueError: the shapes do not fit together.
    """
    pixels = np.asarray(images, np.float32)
    if pixels.ndim != 4:
        raise ValueError(f"images must be [B, H, W, C], they are {list(pixels.shape)}")
    channels = pixels.shape[-1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"{channels} channels, but {len(mean)} means and {len(std)} standard deviations")
    pixels = pixels * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
    pixels = (np.clip(np.nan_to_num(pixels, nan=0.0), 0, 1) * 255 + 0.5).astype(np.uint8)
    if channels == 1:
        return np.repeat(pixels, 3, axis=-1)  # [B, H, W, 3]
    if channels == 2:
        return np.concatenate([pixels, np.zeros_like(pixels[..., :1])], axis=-1)  # [B, H, W, 3]
    return pixels[..., :3]  # [B, H, W, 3]


def panel_sheet(
    columns: Mapping[str, Any],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    rows: int = 8,
    caption: str = "",
) -> np.ndarray:
    """Draws a sheet: one row per example, one column per entry of `columns`, tiny images enlarged pixel by pixel.

    Args:
        columns: name -> float [B, H, W, C] in normalised units, as `System.reconstruct` gives them; all of one shape. The names in
            `TITLES` get the title there, others stand for themselves.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        rows: at most so many examples are drawn.
        caption: a line under the pictures.

    Returns:
        uint8 [height, width, 3].

    Raises:
        ValueError: there is nothing to draw, or the shapes differ.
    """
    from PIL import Image, ImageDraw

    shapes = {name: np.shape(images) for name, images in columns.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"all columns must have one shape, they have {shapes}")
    pixels = {name: to_pixels(images[:rows], mean, std) for name, images in columns.items()}
    count, height, width, _ = next(iter(pixels.values())).shape
    if count == 0:
        raise ValueError("there is no example to draw")
    scale = max(1, -(-SMALLEST_SIDE // max(height, width)))
    cell_width, cell_height = width * scale, height * scale

    font = _font()
    titles = [_wrap(TITLES.get(name, name), cell_width + GAP, font) for name in columns]
    widest = max(font.getlength(line) for lines in titles for line in lines)
    column_width = max(cell_width, int(np.ceil(widest)))
    line_height = FONT_SIZE + 4
    top = MARGIN + line_height * max(len(lines) for lines in titles) + GAP // 2
    total_width = 2 * MARGIN + len(titles) * column_width + (len(titles) - 1) * GAP
    captions = _wrap(caption, total_width - 2 * MARGIN, font) if caption else []
    bottom = top + count * cell_height + (count - 1) * GAP
    sheet = Image.new("RGB", (total_width, bottom + MARGIN + line_height * len(captions)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, (name, lines) in enumerate(zip(columns, titles, strict=True)):
        left = MARGIN + column * (column_width + GAP)
        for i, line in enumerate(reversed(lines)):
            y = top - GAP // 2 - line_height * (i + 1)
            draw.text((left + (column_width - font.getlength(line)) / 2, y), line, fill=INK, font=font)
        for row, picture in enumerate(pixels[name]):
            enlarged = _enlarge(Image.fromarray(picture), scale)
            sheet.paste(enlarged, (left + (column_width - cell_width) // 2, top + row * (cell_height + GAP)))
    for i, line in enumerate(captions):
        draw.text((MARGIN, bottom + GAP // 2 + line_height * i), line, fill=PALE_INK, font=font)
    return np.asarray(sheet)  # [height, width, 3]


def _enlarge(picture: Image.Image, scale: int) -> Image.Image:
    from PIL import Image

    # Nearest: the pixels are what one wants to see, not a smooth picture made from them.
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(FONT_SIZE)


def _wrap(text: str, width: float, font: Any) -> list[str]:
    """The text in lines no wider than `width` pixels, broken at spaces; a single longer word keeps its line."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    return lines or [""]
