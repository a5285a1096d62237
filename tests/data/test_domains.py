"""Images by domain: the split, what is held out, the fake recipes, and episodes over domains."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskae.data.domains import CLASSES, DomainSource
from maskae.data.episodes import EpisodeOrder
from maskae.data.forgeries import DOMAINS, SIDE, fit_autoencoder, region
from maskae.data.sources import open_source
from maskae.errors import UserError

RUNS = np.array([[[0, 5], [5, 4]], [[9, 3], [12, 6]], [[0, 0], [0, 0]], [[18, 4], [22, 4]]])


def picture(seed: int) -> bytes:
    """A smooth random picture as a PNG file."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((120, 100)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`faces/<domain>/<class>/`, the same as an archive with sources, and a folder of photographs."""
    folder = tmp_path_factory.mktemp("domains")
    for number, domain in enumerate(("ff", "wild")):
        for kind in CLASSES:
            (folder / "faces" / domain / kind).mkdir(parents=True)
            for i in range(4):
                (folder / "faces" / domain / kind / f"{i}.png").write_bytes(picture(number * 8 + i))
    (folder / "photographs").mkdir()
    for i in range(16):
        (folder / "photographs" / f"{i:02d}.png").write_bytes(picture(i))
    (folder / "set").mkdir()
    lines = ["file,label,source"]
    with zipfile.ZipFile(folder / "set" / "images.zip", "w") as archive:
        for label, sources in enumerate((("city", "food"), ("diffusion", "gan"))):
            for source in sources:
                for i in range(4):
                    archive.writestr(f"{source}{i}.png", picture(i))
                    lines.append(f"{source}{i}.png,{label},{source}")
    (folder / "set" / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def opened(root: Path, name: str, split: str = "train", val_percent: float = 25.0) -> DomainSource:
    source = open_source(name, split, root=str(root), val_percent=val_percent)
    assert isinstance(source, DomainSource)
    return source


def test_a_held_out_domain_does_not_train_and_validates_whole(root: Path) -> None:
    train, val = (opened(root, "domains:faces:wild", split) for split in ("train", "val"))
    assert [(int(r["domain"]), r["label"], int(r["seen"])) for r in map(train.__getitem__, range(len(train)))] == [
        *[(0, 0, 1)] * 3,
        *[(0, 1, 1)] * 3,
    ]
    assert Counter((int(r["domain"]), int(r["seen"])) for r in map(val.__getitem__, range(len(val)))) == {(0, 1): 2, (1, 0): 8}
    assert train.spec.details == {"domains": ["ff", "wild"], "held_out": "wild", "runs": [[[0, 3], [3, 3]], [[0, 0], [0, 0]]]}
    assert not {train.name(i) for i in range(len(train))} & {val.name(i) for i in range(len(val))}


def test_sources_of_an_archive_make_pairs(root: Path) -> None:
    source = opened(root, "domains:set")
    assert source.spec.details["domains"] == ["diffusion+city", "gan+food"]
    assert source.spec.details["runs"] == [[[0, 3], [3, 3]], [[6, 3], [9, 3]]]
    assert source.spec.class_names == CLASSES


def test_wrong_domains_are_refused(root: Path) -> None:
    with pytest.raises(UserError, match="held-out domain of domains:faces:wilt 'wilt'.*'wild'"):
        opened(root, "domains:faces:wilt")
    with pytest.raises(UserError, match="no images in .*photographs/<domain>/real"):
        opened(root, "domains:photographs")
    with pytest.raises(UserError, match="side in pixels after an @"):
        opened(root, "forgeries:photographs")


def test_forgeries_are_always_the_same_and_change_a_region(root: Path) -> None:
    train, again = (opened(root, "forgeries:photographs@96:phone") for _ in range(2))
    assert train.spec.image_shape == (96, 96, 3)
    assert train.spec.counts == {"train": 18, "val": 14}
    for domain in (0, 1, 3):
        real, fake = (train.entries.index(next(e for e in train.entries if e[:2] == (domain, label))) for label in (0, 1))
        assert train.entries[real].item == train.entries[fake].item
        np.testing.assert_array_equal(train[fake]["image"], again[fake]["image"])
        np.testing.assert_array_equal(train[fake]["image"], pickle.loads(pickle.dumps(train))[fake]["image"])
    # Where no camera stands between, only the region differs.
    forger = train.make
    image = forger.photographs[0]  # type: ignore[attr-defined]
    for domain in range(len(DOMAINS)):
        forged = forger.forge(image, domain, domain, np.random.default_rng(domain))  # type: ignore[attr-defined]
        changed = (np.abs(forged - image).max(-1) > 1e-9).mean()
        assert 0.02 < changed < 0.5, DOMAINS[domain]


def test_the_autoencoder_gives_back_what_it_can(root: Path) -> None:
    photographs = opened(root, "forgeries:photographs@48").make.photographs  # type: ignore[attr-defined]
    network = fit_autoencoder(photographs, range(8))
    once = network(photographs[9])
    # Up to what was cut off at 0 and 255.
    assert np.abs(network(once) - once).mean() < 0.1 < np.abs(once - photographs[9]).mean()
    assert once.shape == (SIDE, SIDE, 3)
    assert 0.05 < region(np.random.default_rng(0), ellipse=False).mean() < 0.4


def test_an_episode_has_its_domains_in_turn_with_both_classes() -> None:
    order = EpisodeOrder(RUNS, batch_size=12, groups=2, seed=3)
    strata = {record: (d, c) for d in range(4) for c in range(2) for record in range(RUNS[d, c, 0], RUNS[d, c].sum())}
    seen: Counter[int] = Counter()
    for batch in range(30):
        rows = [strata[order[batch * 12 + row]] for row in range(12)]
        domains = [int(d) for d in order.chosen(batch)]
        assert len(set(domains)) == 2
        assert rows == [(domains[row % 2], row // 2 % 2) for row in range(12)]
        seen.update(domains)
    assert set(seen) == {0, 1, 3}
    assert min(seen.values()) > 12
    assert [order[j] for j in range(40)] == [EpisodeOrder(RUNS, 12, 2, 3)[j] for j in range(40)]
    assert [order[j] for j in range(40)] != [EpisodeOrder(RUNS, 12, 2, 4)[j] for j in range(40)]


def test_records_of_a_stratum_come_again_when_all_were_used() -> None:
    order = EpisodeOrder(RUNS[:2], batch_size=4, groups=2, seed=0)
    found = [order[j] for j in range(4 * 20) if RUNS[0, 0, 0] <= order[j] < 5]
    assert len(found) == 20
    assert all(sorted(found[i : i + 5]) == list(range(5)) for i in range(0, 20, 5))


@pytest.mark.parametrize(
    ("runs", "batch_size", "groups", "message"),
    [
        (RUNS, 10, 2, "batch_size=10 is not a multiple of an episode's 2 domains x 2 classes"),
        (RUNS, 16, 4, "4 domains; the training data has 3"),
        (np.array([[[0, 5], [0, 0]]]), 4, 1, "domain 0 of the training data has no records of class 1"),
    ],
)
def test_impossible_episodes_are_refused(runs: np.ndarray, batch_size: int, groups: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        EpisodeOrder(runs, batch_size, groups, 0)
