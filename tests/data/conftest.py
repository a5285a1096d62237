"""A folder of small image files, and a web server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pictures import encode, smooth_image
from served import Served, Server


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


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A web server without files, which is asked without a proxy."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.served
        server.served.gate.set()
        server.shutdown()
