"""Places as pairs of rasters: the same records as from .npz, however the bands are stored; how values are scaled; what is refused."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from maskae.data.contract import Source
from maskae.data.sensor_scale import ClippedScale
from maskae.data.sources import open_source
from maskae.data.spec import BadRecord
from maskae.errors import UserError

OPTICAL, RADAR = "sensor_optical", "sensor_radar"
BANDS = {"s1": 2, "s2": 5}
SIDE = 8


def write_raster(path: Path, bands: np.ndarray, **options: Any) -> None:
    """[c, H, W] as GDAL writes it: no description of tifffile's own; bands first unless `planarconfig` says otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    planar = options.setdefault("planarconfig", "separate") == "separate" or len(bands) == 1
    options["planarconfig"] = None if len(bands) == 1 else options["planarconfig"]
    values = bands[0] if len(bands) == 1 else bands if planar else bands.transpose(1, 2, 0)
    tifffile.imwrite(path, values, photometric="minisblack", metadata=None, **options)


def write_pair(folder: Path, entry: str, **options: Any) -> dict[str, np.ndarray]:
    """One season of both sensors in uint8; the arrays [c, SIDE, SIDE] by sensor."""
    generator = np.random.default_rng(list(entry.encode()))
    arrays = {sensor: generator.integers(0, 256, (bands, SIDE, SIDE), np.uint8) for sensor, bands in BANDS.items()}
    for sensor, array in arrays.items():
        write_raster(folder / sensor / entry, array, **options)
    return arrays


def write_set(folder: Path, dtype: str, count: int = 4) -> list[dict[str, np.ndarray]]:
    """Places 0.tif, 1.tif, ... of a number type."""
    arrays = []
    for place in range(count):
        generator = np.random.default_rng(place)
        arrays.append({sensor: generator.normal(300, 90, (bands, SIDE, SIDE)).astype(dtype) for sensor, bands in BANDS.items()})
        for sensor, array in arrays[-1].items():
            write_raster(folder / sensor / f"{place}.tif", array)
    return arrays


def opened(folder: Path, split: str = "train", side: str = "", **arguments: Any) -> Any:
    """The source of a folder."""
    return open_source(f"sentinel_pairs:{folder.name}{side}", split, root=str(folder.parent), **arguments)


def assert_same(first: Source, second: Source) -> None:
    """Every record and every draw is the same."""
    assert len(first) == len(second) > 0
    for index in range(len(first)):
        draws = [source.sample(index, np.random.default_rng(index)) for source in (first, second)]  # type: ignore[attr-defined]
        for one, other in ((first[index], second[index]), draws):
            assert set(one) == {OPTICAL, RADAR, "label"} and one[OPTICAL].dtype == np.uint8
            for name in (OPTICAL, RADAR):
                np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("side", ["", "@5"])
def test_rasters_give_the_records_of_an_npz(tmp_path: Path, side: str) -> None:
    (tmp_path / "npz").mkdir()
    for place in range(5):
        if place % 2:
            seasons = [write_pair(tmp_path / "tif", f"{place}.tif")]
        else:
            seasons = [write_pair(tmp_path / "tif", f"{place}/{season}.tif") for season in (9, 10, 11)]
        np.savez(tmp_path / "npz" / f"{place}.npz", **{sensor: np.stack([each[sensor] for each in seasons]) for sensor in BANDS})
    for split in ("train", "val"):
        assert_same(*(opened(tmp_path / kind, split, side, val_percent=40) for kind in ("tif", "npz")))
    source = opened(tmp_path / "tif", side=side)
    assert Path(source.name(0)).exists()
    assert source.spec.fields == opened(tmp_path / "npz", side=side).spec.fields
    assert len({source.sample(0, np.random.default_rng(seed))[OPTICAL].tobytes() for seed in range(20)}) >= (10 if side else 3)


@pytest.mark.parametrize(
    "options",
    [
        {"planarconfig": "contig"},
        {"planarconfig": "contig", "tile": (16, 16), "compression": "zlib", "predictor": True},
        {"compression": "zlib", "rowsperstrip": 3},
        {"byteorder": ">", "bigtiff": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_storage_does_not_matter(tmp_path: Path, options: dict[str, Any]) -> None:
    for folder, how in (("plain", {}), ("other", options)):
        for place in range(2):
            write_pair(tmp_path / folder, f"{place}.tiff", **how)
    assert_same(opened(tmp_path / "plain", val_percent=0), opened(tmp_path / "other", val_percent=0))


def test_bands_of_equal_count_and_side_follow_the_axes(tmp_path: Path) -> None:
    bands = np.arange(2 * 2 * 2, dtype=np.uint8).reshape(2, 2, 2)
    for order in ("separate", "contig"):
        for sensor in BANDS:
            write_raster(tmp_path / order / sensor / "0.tif", bands, planarconfig=order)
        np.testing.assert_array_equal(opened(tmp_path / order)[0][OPTICAL], bands.transpose(1, 2, 0))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_other_numbers_are_scaled_by_the_training_places(tmp_path: Path, dtype: str) -> None:
    arrays = write_set(tmp_path / "set", dtype)
    train, val = (opened(tmp_path / "set", split, val_percent=25) for split in ("train", "val"))
    assert (len(train), len(val)) == (3, 1)
    held_out = int(Path(val.name(0)).stem)
    for name, sensor in ((OPTICAL, "s2"), (RADAR, "s1")):
        scale = ClippedScale.measured(arrays[place][sensor].transpose(1, 2, 0) for place in range(4) if place != held_out)
        np.testing.assert_array_equal(val[0][name], scale(arrays[held_out][sensor].transpose(1, 2, 0)))
        assert train.spec.details["ranges"][name] == {"low": list(scale.low), "high": list(scale.high)}
    assert train.spec == val.spec


def test_missing_values_are_zero_and_not_measured(tmp_path: Path) -> None:
    arrays = write_set(tmp_path / "whole", "float32", 2)
    write_set(tmp_path / "holes", "float32", 2)
    for sensor in BANDS:
        extended = np.pad(arrays[0][sensor], ((0, 0), (0, SIDE), (0, SIDE)), constant_values=-9999)
        extended[:, SIDE, :SIDE], extended[:, SIDE + 1, :SIDE] = np.nan, -np.inf
        write_raster(tmp_path / "holes" / sensor / "0.tif", extended, extratags=[(42113, "s", 0, "-9999", True)])
    whole, holes = (opened(tmp_path / folder, side=f"@{SIDE}", val_percent=0) for folder in ("whole", "holes"))
    for name, ranges in whole.spec.details["ranges"].items():
        np.testing.assert_allclose(holes.spec.details["ranges"][name]["low"], ranges["low"])
    half, middle = SIDE // 2, holes[0][OPTICAL]
    np.testing.assert_array_equal(middle[:half, :half], whole[0][OPTICAL][half:, half:])
    assert not middle[half:].any() and not middle[:, half:].any()


def test_a_channel_without_contrast_stays_finite() -> None:
    images = [np.full((4, 4, 1), 1234.0), np.full((4, 4, 1), 1234.0)]
    scale = ClippedScale.measured(images)
    with np.errstate(all="raise"):
        assert abs(int(scale(images[0])[0, 0, 0]) - 128) <= 32
    with pytest.raises(UserError, match="every channel"):
        ClippedScale.measured([np.full((4, 4, 1), np.nan)])


def test_a_season_may_be_a_folder_of_bands(tmp_path: Path) -> None:
    dates = ("S1B_20200101T01", "S1A_20200401T01"), ("20200105T02_T43", "20200403T02_T43")
    for season in range(2):
        for band, side in (("B1", 2), ("B2", SIDE), ("B8", SIDE), ("B8A", 4), ("B11", 4)):
            value = 100 * season + int(band[1:].replace("8A", "9"))
            write_raster(tmp_path / "set" / "s2" / "0000001" / dates[1][season] / f"{band}.tif", np.full((1, side, side), value, np.uint8))
        for band in ("VH", "VV"):
            value = 100 * season + (band == "VV")
            write_raster(tmp_path / "set" / "s1" / "0000001" / dates[0][season] / f"{band}.tif", np.full((1, SIDE, SIDE), value, np.uint8))
        (tmp_path / "set" / "s2" / "0000001" / dates[1][season] / "metadata.json").write_text("{}")
    source = opened(tmp_path / "set")
    for season in range(2):
        place = source._place(0, lambda count, season=season: season)
        np.testing.assert_array_equal(place[OPTICAL][3, 3], np.asarray([1, 2, 8, 9, 11]) + 100 * season)
        np.testing.assert_array_equal(place[RADAR][3, 3], np.asarray([0, 1]) + 100 * season)
    assert place[OPTICAL].shape == (SIDE, SIDE, 5)


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_pair(tmp_path / "both", "0.tif")
    np.savez(tmp_path / "both" / "1.npz", s1=np.zeros(1))
    write_pair(tmp_path / "alone", "0.tif")
    write_raster(tmp_path / "alone" / "s1" / "1.tif", np.zeros((2, 4, 4), np.uint8))
    write_raster(tmp_path / "radar" / "s1" / "1.tif", np.zeros((2, 4, 4), np.uint8))
    for folder, message in (
        ("empty", "no .npz files and no folders s1 and s2 of rasters in"),
        ("both", "both .npz files and rasters"),
        ("alone", "1 places of s1, for example 1.tif, are not in s2"),
        ("radar", "radar/s2: No such file or directory"),
    ):
        with pytest.raises(UserError, match=f"sentinel_pairs:{folder}: .*{message}") as caught:
            opened(tmp_path / folder)
        assert "\n" not in str(caught.value)


def wrong_size(folder: Path) -> None:
    write_raster(folder / "s1" / "0.tif", np.zeros((2, 4, SIDE), np.uint8))


def not_a_raster(folder: Path) -> None:
    (folder / "s1" / "0.tif").write_bytes(b"no picture")


def cut_short(folder: Path) -> None:
    whole = (folder / "s1" / "0.tif").read_bytes()
    (folder / "s1" / "0.tif").write_bytes(whole[:-20])


def wrong_header(folder: Path) -> None:
    with tifffile.TiffFile(folder / "s1" / "0.tif", mode="r+") as opened:
        opened.pages.first.tags["ImageWidth"].overwrite(2**24)


def other_bands(folder: Path) -> None:
    write_raster(folder / "s1" / "0.tif", np.zeros((3, SIDE, SIDE), np.uint8))


def other_numbers(folder: Path) -> None:
    write_raster(folder / "s1" / "0.tif", np.zeros((2, SIDE, SIDE), np.uint16))


def not_numbers(folder: Path) -> None:
    write_raster(folder / "s1" / "0.tif", np.zeros((2, SIDE, SIDE), np.complex64))


def too_many_axes(folder: Path) -> None:
    tifffile.imwrite(folder / "s1" / "0.tif", np.zeros((2, 3, SIDE, SIDE), np.uint8), metadata={"axes": "TZYX"}, photometric="minisblack")


def no_seasons(folder: Path) -> None:
    for sensor in BANDS:
        (folder / sensor / "0.tif").unlink()
        (folder / sensor / "0.tif").mkdir()


def other_seasons(folder: Path) -> None:
    no_seasons(folder)
    for sensor, seasons in (("s1", 1), ("s2", 2)):
        for season in range(seasons):
            write_raster(folder / sensor / "0.tif" / f"{season}.tif", np.zeros((BANDS[sensor], SIDE, SIDE), np.uint8))


def many_bands_in_a_folder_of_bands(folder: Path) -> None:
    no_seasons(folder)
    for sensor in BANDS:
        for band in range(2):
            write_raster(folder / sensor / "0.tif" / "season" / f"{band}.tif", np.zeros((BANDS[sensor], SIDE, SIDE), np.uint8))


DAMAGE = [
    (wrong_size, r"s2 8 x 8 pixels and s1 4 x 8 are not of the same size"),
    (not_a_raster, r"s1/0.tif: no readable TIFF file: not a TIFF file"),
    (cut_short, r"s1/0.tif: no readable TIFF file: failed to read"),
    (wrong_header, r"s1/0.tif: no readable TIFF file: .* in so small a file"),
    (not_numbers, r"s1/0.tif: complex64 values"),
    (too_many_axes, r"s1/0.tif: the axes TZYX"),
    (no_seasons, r"s2/0.tif: no .tif or .tiff in the folder"),
    (other_seasons, r"s2 has 2 seasons and s1 1"),
    (many_bands_in_a_folder_of_bands, r"s2/0.tif/season/0.tif: 5 bands"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[each[0].__name__ for each in DAMAGE])
def test_damage_is_told_at_opening_and_during_training(tmp_path: Path, damage: Any, message: str) -> None:
    for place in ("0.tif", "1.tif"):
        write_pair(tmp_path / "set", place)
    source = opened(tmp_path / "set", val_percent=0)
    damage(tmp_path / "set")
    for read in (lambda: source[0], lambda: source.sample(0, np.random.default_rng(0))):
        with pytest.raises(BadRecord, match=message) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert source[1][RADAR].shape == (SIDE, SIDE, 2)
    with pytest.raises(UserError, match=f"sentinel_pairs:set: .*s2/0.tif: {message}"):
        opened(tmp_path / "set")


@pytest.mark.parametrize(
    ("damage", "message"), [(other_bands, "s1 has 8 x 8 pixels of 3 channels"), (other_numbers, "s1 holds other numbers than uint8")]
)
def test_a_place_unlike_the_first_is_a_bad_record(tmp_path: Path, damage: Any, message: str) -> None:
    for place in ("-first.tif", "0.tif"):
        write_pair(tmp_path / "set", place)
    damage(tmp_path / "set")
    source = opened(tmp_path / "set", val_percent=0)
    with pytest.raises(BadRecord, match=message):
        source[1]


def test_statistics_pass_over_bad_places(tmp_path: Path) -> None:
    write_set(tmp_path / "set", "uint16", 2)
    expected = opened(tmp_path / "set", val_percent=0).spec.details
    write_raster(tmp_path / "set" / "s1" / "3.tif", np.full((7, SIDE, SIDE), 9, np.uint16))
    write_raster(tmp_path / "set" / "s2" / "3.tif", np.full((5, SIDE, SIDE), 9, np.uint8))
    for sensor in BANDS:
        (tmp_path / "set" / sensor / "4.tif").write_bytes(b"no picture")
    assert opened(tmp_path / "set", val_percent=0).spec.details == expected


@pytest.mark.skipif(find_spec("imagecodecs") is not None, reason="with imagecodecs, LZW is read")
def test_a_compression_that_needs_a_package_names_it(tmp_path: Path) -> None:
    for sensor in BANDS:
        (tmp_path / "set" / sensor).mkdir(parents=True)
        Image.fromarray(np.zeros((SIDE, SIDE), np.uint8)).save(tmp_path / "set" / sensor / "0.tif", compression="tiff_lzw")
    with pytest.raises(UserError, match=r"s2/0.tif: .*LZW.* requires the 'imagecodecs' package: pip install 'maskae\[rasters\]'$"):
        opened(tmp_path / "set")
