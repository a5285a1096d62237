"""Images with tables: kinds of columns, codes, missing cells, splits, labels, cells taken away, and what is said of wrong files."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskae.data.missing_cells import Removal, parse_removal, removed_cells
from maskae.data.pipeline import collate, make_row
from maskae.data.sources import open_source
from maskae.data.tables import LOOPS
from maskae.data.transforms import make_transform
from maskae.errors import UserError

HEAD = "file,split,sex,stage,age,size,finding"
# `age` has more than ten numbers, `stage` three; c.png lacks its age, d.png its sex, and e.png has a sex that no training row has.
SIDES = ["val" if letter in "ef" else "train" for letter in "abcdefghijklmn"]
LINES = [f"{'abcdefghijklmn'[i]}.png,{side},{'mf'[i % 2]},{i % 3},{20 + i},{i / 2},flu{i % 2}" for i, side in enumerate(SIDES)]
LINES[2] = LINES[2].replace(",22,", ",,")
LINES[3] = LINES[3].replace(",f,", ",,")
LINES[4] = LINES[4].replace(",m,", ",x,")


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 6), value, np.uint8)).save(buffer, format="png")
    return buffer.getvalue()


def write(folder: Path, lines: list[str] = LINES, head: str = HEAD, zipped: bool = True) -> Path:
    folder.mkdir()
    (folder / "patients.csv").write_text("\n".join([head, *lines]) + "\n")
    files = {line.split(",")[0]: png(i) for i, line in enumerate(LINES)}
    if zipped:
        with zipfile.ZipFile(folder / "images.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return folder


def opened(folder: Path, rest: str, split: str = "train", **options):
    return open_source(f"table_images:{folder.name}{rest}", split, root=str(folder.parent), channels=1, **options)


@pytest.mark.parametrize("zipped", [True, False])
def test_rows_have_codes_first_then_standardised_numbers(tmp_path: Path, zipped: bool) -> None:
    train = opened(write(tmp_path / "x", zipped=zipped), "@finding:age,sex,stage,size=code")
    spec = train.spec
    assert spec.details["columns"] == ["sex", "stage", "size", "age"]
    assert spec.details["cardinalities"] == [2, 3, 12]
    assert spec.details["codes"]["sex"] == ["f", "m"]
    assert (spec.num_classes, spec.class_names, spec.counts) == (2, ("flu0", "flu1"), {"train": 12, "val": 2})
    assert {name: str(field) for name, field in spec.fields.items()} == {"table": "float32[4]", "table_missing": "bool[4]"}
    rows = np.stack([train[i]["table"] for i in range(len(train))])
    missing = np.stack([train[i]["table_missing"] for i in range(len(train))])
    np.testing.assert_array_equal(np.argwhere(missing), [[2, 3], [3, 0]])
    np.testing.assert_array_equal(rows[missing], 0.0)
    ages = np.asarray([20, 21, 23, 26, 27, 28, 29, 30, 31, 32, 33])
    np.testing.assert_allclose(rows[~missing[:, 3], 3], (ages - ages.mean()) / ages.std(), atol=1e-6)
    np.testing.assert_array_equal(rows[:3, 1], [0, 1, 2])
    val = opened(tmp_path / "x", "@finding:age,sex,stage,size=code", "val")
    np.testing.assert_array_equal(val[0]["table_missing"], [True, False, True, False])
    assert "e.png" in val.name(0)


def test_records_become_batches(tmp_path: Path) -> None:
    train = opened(write(tmp_path / "x"), "@finding=flu1:age,sex#value@0.5")
    rows = [make_row(train[i], i, make_transform((("resize", {}),), 1, 4), np.random.default_rng(0)) for i in range(3)]
    batch = collate(rows, 0)
    assert (batch["image"].shape, batch["table"].shape, batch["table_missing"].dtype) == ((3, 4, 4, 1), (3, 2), bool)
    np.testing.assert_array_equal(batch["label"], [0, 1, 0])
    assert train.cells.missing.sum() >= 12


def test_labels_that_begin_so_and_none(tmp_path: Path) -> None:
    folder = write(tmp_path / "x")
    assert opened(folder, "@finding=flu*:age").labels.tolist() == [1] * 12
    assert opened(folder, ":age").spec.num_classes is None


def test_without_a_split_column_records_are_held_out(tmp_path: Path) -> None:
    lines = [",".join(part for i, part in enumerate(line.split(",")) if i != 1) for line in LINES]
    folder = write(tmp_path / "x", lines, HEAD.replace("split,", ""))
    assert opened(folder, "@finding:age", val_percent=30.0).spec.counts == {"train": 10, "val": 4}


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("@finding", "name the table's columns"),
        ("@finding:agee", "no column 'agee' .did you mean 'age'"),
        ("@finding=flu7:age", "no row has finding 'flu7'"),
        ("@finding:sex=number", "cells that are no numbers"),
        ("@finding:age=cod", "did you mean 'code'"),
        ("@finding:age#valu@0.5", "did you mean 'value'"),
        ("@finding:age#value@1.5", "must be a share in 0..1"),
    ],
)
def test_wrong_names_are_told(tmp_path: Path, rest: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(write(tmp_path / "x"), rest)


def test_wrong_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no column 'file'"):
        opened(write(tmp_path / "a", head=HEAD.replace("file", "fil")), ":age")
    with pytest.raises(UserError, match="1 files of the table are not in .*images.zip, for example z.png"):
        opened(write(tmp_path / "b", [*LINES, LINES[0].replace("a.png", "z.png")]), ":age")
    (tmp_path / "b" / "more.csv").write_text("file\n")
    with pytest.raises(UserError, match="must hold one .csv file, not 2"):
        opened(tmp_path / "b", ":age")
    with pytest.raises(UserError, match="more or fewer cells"):
        opened(write(tmp_path / "c", [*LINES, "o.png,train"]), ":age")


def test_patterns_of_missing_cells() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 60)
    tables = {"train": generator.normal(size=(60, 5)), "val": generator.normal(size=(20, 5))}
    tables["train"][:, 3] += 5 * labels
    found = {name: removed_cells(Removal(name, 0.5), tables, labels) for name in ("value", "feature", "most_important", "least_important")}
    assert [found["value"][split].sum() for split in ("train", "val")] == [150, 50]
    for name in ("feature", "most_important", "least_important"):
        np.testing.assert_array_equal(found[name]["train"].sum(0) // 60, found[name]["val"].sum(0) // 20)
        assert found[name]["train"].sum() == 2 * 60
    assert found["most_important"]["train"][:, 3].all()
    assert not found["least_important"]["train"][:, 3].any()
    assert parse_removal("", "x") is None


def test_the_table_of_the_digits() -> None:
    train, val = (open_source("digits_table", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1437, 360)
    record = train[5]
    assert record["image"].shape == (8, 8, 1)
    labels = np.asarray([train[i]["label"] for i in range(len(train))])
    share = (train.cells.values[:, 1] == np.asarray(LOOPS)[labels]).mean()
    assert share == pytest.approx(0.75 + 0.25 / 3, abs=0.03)
    np.testing.assert_allclose(train.cells.values[:, 3:].std(0), 1.0, atol=1e-3)
    assert not train.cells.missing.any()
    fewer = open_source("digits_table:feature@0.5", "val")
    np.testing.assert_array_equal(fewer.cells.missing.sum(1), 5)


def test_the_chest_x_rays(shared: Path) -> None:
    source = "table_images:covid_cxr@finding=COVID-19*:sex,age"
    train = open_source(source, "train", root=str(shared / "data"), channels=1, statistics="unit")
    assert train.spec.counts == {"train": 277, "val": 78}
    assert train.spec.details["columns"] == ["sex", "age"]
    assert np.bincount(train.labels).tolist() == [80, 197]
    assert train[3]["image"][:2] == b"\xff\xd8"
