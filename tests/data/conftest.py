"""A folder of small image files."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import encode, smooth_image


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """10 cats and 20 dogs, JPEG and PNG, with different sizes."""
    for label, count in (("cat", 10), ("dog", 20)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(count):
            suffix, form = ((".jpg", "JPEG"), (".png", "PNG"))[number % 2]
            image = smooth_image(24 + number, 40 - number, seed=number)
            (tmp_path / "photos" / label / f"{number:02d}{suffix}").write_bytes(encode(image, form))
    return tmp_path / "photos"
