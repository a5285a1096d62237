"""Every kind of source: what it reads, how it splits, and what it says when something is wrong."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import encode, smooth_image

from maskae.data.contract import measure, stratified_split
from maskae.data.images import Picture
from maskae.data.pipeline import Pipeline
from maskae.data.sources import open_source
from maskae.data.spec import DataSpec, split_hash
from maskae.data.transforms import make_transform
from maskae.errors import UserError


def pixels(source: Any, index: int) -> np.ndarray:
    return Picture(source[index]["image"], source.spec.channels).read()


def members(source: Any) -> list[tuple[str, int]]:
    return [(source.name(i), source[i]["label"]) for i in range(len(source))]


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared TFDS data set `maskae_tiny`: 20 training and 6 test images of two classes."""
    tfds = pytest.importorskip("tensorflow_datasets")
    import io

    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core import example_serializer

    root = tmp_path_factory.mktemp("tfds")
    folder = root / "maskae_tiny" / "1.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(names=["ant", "bee"])}
    )
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    infos = []
    for split, count in (("train", 20), ("test", 6)):
        template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name="maskae_tiny", split=split, filetype_suffix="array_record")
        path = folder / f"maskae_tiny-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for number in range(count):
            image = io.BytesIO(encode(smooth_image(8, 9 + number, seed=number), "PNG"))
            writer.write(serializer.serialize_example(features.encode_example({"image": image, "label": number % 2})))
        writer.close()
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=[count], num_bytes=path.stat().st_size, filename_template=template))
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=infos, check_data=False)
    return root


def test_folder_classes_split_and_statistics(photos: Path) -> None:
    train, val = (open_source(f"folder:{photos}", split, val_percent=20, split_seed=1) for split in ("train", "val"))
    assert train.spec == val.spec
    assert train.spec.class_names == ("cat", "dog")
    assert train.spec.counts == {"train": 24, "val": 6}
    assert [sorted(label for _, label in members(s)) for s in (train, val)] == [[0] * 8 + [1] * 16, [0] * 2 + [1] * 4]
    assert not {name for name, _ in members(train)} & {name for name, _ in members(val)}
    for name, label in members(train):
        assert Path(name).is_file()
        assert Path(name).parent.name == ("cat", "dog")[label]
    np.testing.assert_allclose((train.spec.mean, train.spec.std), measure([pixels(train, i) for i in range(24)], 3), rtol=1e-9)
    again = open_source(f"folder:{photos}", "val", val_percent=20, split_seed=1)
    assert (members(again), again.spec) == (members(val), val.spec)
    other = open_source(f"folder:{photos}", "val", val_percent=20, split_seed=2)
    assert members(other) != members(val)
    assert other.spec.split_hash != val.spec.split_hash


def test_folder_with_its_own_split_and_with_train_only(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "both" / "train")
    shutil.copytree(photos / "dog", tmp_path / "both" / "val" / "dog")
    train, val = (open_source("folder:both", split, root=str(tmp_path)) for split in ("train", "val"))
    assert (len(train), len(val)) == (30, 20)
    assert {label for _, label in members(val)} == {1}
    assert "/both/val/dog/" in val.name(0)
    (tmp_path / "both" / "val" / "dog").rename(tmp_path / "both" / "val" / "dogs")
    with pytest.raises(UserError, match=r"class 'dogs' .* \(did you mean 'dog'\?\)"):
        open_source("folder:both", "val", root=str(tmp_path))
    shutil.rmtree(tmp_path / "both" / "val")
    assert len(open_source("folder:both", "val", root=str(tmp_path))) == 3


def test_folder_without_classes_has_no_labels(photos: Path) -> None:
    train = open_source(f"folder:{photos}/dog", "train", channels=1)
    assert train.spec.num_classes is None
    assert train.spec.class_names == ()
    assert train[0]["label"] == -1
    assert (len(train), len(train.spec.mean), pixels(train, 0).shape[-1]) == (18, 1, 1)


def test_relative_paths_start_at_root_or_in_the_environment(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKAE_DATA", str(photos.parent))
    assert len(open_source("folder:photos", "train")) == 27
    assert len(open_source("folder:dog", "train", root=str(photos))) == 18


def test_imagenet_statistics_limits_and_the_cache(photos: Path) -> None:
    source = open_source(f"folder:{photos}", "train", statistics="imagenet", max_examples=5, cache="ram")
    assert source.spec.mean == (0.485, 0.456, 0.406)
    assert len(source) == 5
    before = source[3]
    Path(source.name(3)).unlink()
    assert source[3] == before
    assert pickle.loads(pickle.dumps(source))[2] == source[2]
    with pytest.raises(IndexError):
        source[5]


@pytest.mark.parametrize(
    ("source", "split", "arguments", "message"),
    [
        ("foldr:x", "train", {}, r"unknown data source 'foldr:x' \(did you mean 'folder'\?\)"),
        ("digits", "tarin", {}, r"unknown split 'tarin' \(did you mean 'train'\?\)"),
        ("digits", "train", {"statistics": "imagnet"}, r"unknown statistics 'imagnet' \(did you mean 'imagenet'\?\)"),
        ("digits", "train", {"statistics": "imagenet"}, "for 3 channels, not 1"),
        ("digits", "train", {"cache": "rom"}, r"unknown cache 'rom' \(did you mean 'ram'\?\)"),
        ("digits", "train", {"channels": 3}, "the images have 1 channels, not 3"),
        ("digits:x", "train", {}, "digits takes no path"),
        ("digits", "train", {"val_percent": 100}, "val_percent must be"),
        ("digits", "train", {"max_examples": 0}, "max_examples must be at least 1"),
        ("folder:", "train", {}, "name the folder after a colon"),
        ("folder:photo", "train", {}, r"no folder .*photo \(did you mean 'photos'\?\)"),
        ("folder:there/photos", "train", {}, "there is no folder .*there"),
        ("folder:empty", "train", {}, "no images in .*empty"),
        ("folder:photos", "val", {"val_percent": 0}, "no records in split 'val'"),
        ("folder:photos", "train", {"channels": 4}, "1 or 3 channels, not 4"),
        ("npz:data.npz", "train", {}, "no file .*data.npz"),
        ("arrayrecord:empty", "train", {}, "no spec.json in .*empty: make the folder with tools/prepare_data.py"),
        ("tfds:", "train", {}, "name the data set after a colon"),
    ],
)
def test_wrong_sources_are_one_clear_line(photos: Path, source: str, split: str, arguments: dict[str, Any], message: str) -> None:
    (photos.parent / "empty").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        open_source(source, split, root=str(photos.parent), **arguments)
    assert "\n" not in str(caught.value)


def test_images_beside_class_folders_are_an_error(photos: Path) -> None:
    (photos / "stray.jpg").write_bytes(encode(smooth_image(8, 8)))
    with pytest.raises(UserError, match=r"1 images, for example stray\.jpg, lie beside the class folders"):
        open_source(f"folder:{photos}", "train")


def test_broken_files_are_replaced_and_named(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    victims = [photos / "dog" / "00.jpg", photos / "dog" / "02.jpg"]
    victims[0].write_bytes(victims[0].read_bytes()[:-300])
    victims[1].write_text("words")
    source = open_source(f"folder:{photos}", "train", val_percent=0)
    pipe = Pipeline(source, make_transform((("resize", {"size": 8}),)), batch_size=30, seed=0, max_bad_percent=20)
    indices = pipe.batch(0)["index"]
    assert sorted(pipe.bad.names) == [str(path) for path in victims]
    assert not set(pipe.bad.names) & {source.name(int(i)) for i in indices}
    assert f"{victims[0]}: truncated JPEG" in caplog.text
    assert f"{victims[1]}: not an image file" in caplog.text


@pytest.mark.parametrize("key", ["image", "images"])
def test_npz_arrays_and_splits(tmp_path: Path, key: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 7, 3), dtype=np.uint8)
    labels = np.arange(40) % 4
    np.savez(tmp_path / "whole.npz", **{key: images, "labels": labels})
    train, val = (open_source(f"npz:{tmp_path}/whole.npz", split, val_percent=25) for split in ("train", "val"))
    assert (len(train), len(val), train.spec.num_classes, train.spec.image_shape) == (28, 12, 4, (6, 7, 3))
    rows = [int(source.name(i).rpartition(" ")[2]) for source in (train, val) for i in range(len(source))]
    assert sorted(rows) == list(range(40))
    for row, (source, i) in zip(rows, [(s, i) for s in (train, val) for i in range(len(s))], strict=True):
        np.testing.assert_array_equal(source[i]["image"], images[row])
        assert source[i]["label"] == labels[row]
    np.savez(tmp_path / "split.npz", train_images=images[..., 0] / 255, val_images=images[:5, ..., 0] / 255)
    train, val = (open_source(f"npz:{tmp_path}/split.npz", split) for split in ("train", "val"))
    assert (len(train), len(val), train.spec.num_classes, train.spec.image_shape) == (40, 5, None, (6, 7, 1))
    np.testing.assert_array_equal(val[2]["image"], images[2, ..., :1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"imges": np.zeros((2, 3, 3))}, r"no array 'images' or 'train_images' \(did you mean 'imges'\?\)"),
        ({"images": np.zeros((2, 3))}, r"must be \[N, H, W\]"),
        ({"images": np.full((2, 3, 3), 300)}, "values 300..300 must be whole numbers in 0..255"),
        ({"images": np.zeros((2, 3, 3)), "labels": np.zeros(3, int)}, "labels must be 2 whole numbers"),
        ({"images": np.array([None, {}])}, "is no .npz file of plain arrays"),
        ({"images": np.zeros((4, 3, 3))}, "std .* must be positive"),
    ],
)
def test_wrong_npz_files_are_one_clear_line(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        open_source(f"npz:{tmp_path}/data.npz", "train")


def test_tfds_sets_are_read_encoded_with_their_own_test_split(tfds_folder: Path) -> None:
    train, val = (open_source("tfds:maskae_tiny", split, root=str(tfds_folder)) for split in ("train", "val"))
    assert (len(train), len(val)) == (20, 6)
    assert train.spec.class_names == ("ant", "bee")
    assert isinstance(train[3]["image"], bytes)
    np.testing.assert_array_equal(pixels(train, 3), smooth_image(8, 12, seed=3))
    assert train[3]["label"] == 1
    assert val.name(5) == "tfds:maskae_tiny test[5]"
    np.testing.assert_allclose((train.spec.mean, train.spec.std), measure([pixels(train, i) for i in range(20)], 3), rtol=1e-9)
    assert pickle.loads(pickle.dumps(train))[7] == train[7]


def test_tfds_sets_that_are_missing_or_unknown_are_one_clear_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow_datasets")
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(UserError, match=r"tfds:cifar10: not prepared in .*tfds build cifar10 --file_format=array_record"):
        open_source("tfds:cifar10", "train", root=str(tmp_path))
    with pytest.raises(UserError, match=r"no data set 'mnisst' in TFDS \(did you mean 'mnist'\?\)"):
        open_source("tfds:mnisst", "train", root=str(tmp_path))


def test_stratified_split_is_disjoint_complete_and_fair() -> None:
    labels = np.repeat([-1, 0, 1, 2], [40, 20, 10, 1])
    train, val = stratified_split(labels, 20, 0)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, val])), np.arange(71))
    np.testing.assert_array_equal(np.unique(labels[val], return_counts=True), [[-1, 0, 1], [8, 4, 2]])
    assert len(stratified_split(np.zeros(5, int), 1, 0)[1]) == 1
    assert len(stratified_split(np.zeros(5, int), 0, 0)[1]) == 0


def test_the_spec_survives_json_and_refuses_nonsense() -> None:
    spec = open_source("digits", "train").spec
    assert DataSpec.from_json(spec.to_json()) == spec
    with pytest.raises(UserError, match="not a data spec"):
        DataSpec.from_json("{}")
    with pytest.raises(UserError, match="mean has 1 values for 3 channels"):
        DataSpec("x", None, 3, (0.5,), (0.5,) * 3)
    members = [("a", 0), ("b", 1)]
    assert len({split_hash(members, []), split_hash([], members), split_hash(members[:1], members[1:]), split_hash([("a", 1)], [])}) == 4


HIDDEN = """
import sys
from importlib.machinery import PathFinder
class Hider:
    def find_spec(self, name, path=None, target=None):
        return None if name.partition('.')[0] in ('tensorflow', 'torch') else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hider()
from maskae.data import device, pipeline, transforms
from maskae.data.sources import open_source
transform = transforms.make_transform((('resize', {{'size': 8}}),))
batch = pipeline.Pipeline(open_source({name!r}, 'train', root={root!r}), transform, batch_size=4, seed=0).batch(0)
assert batch['image'].shape[:3] == (4, 8, 8), batch['image'].shape
assert not {{'tensorflow', 'torch'}} & set(sys.modules)
"""


@pytest.mark.parametrize("name", ["digits", "tfds:maskae_tiny"])
def test_no_source_imports_tensorflow_or_torch(tfds_folder: Path, name: str) -> None:
    program = HIDDEN.format(name=name, root=str(tfds_folder))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2], env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr


def test_a_limit_takes_records_of_all_classes(photos: Path) -> None:
    whole = open_source(f"folder:{photos}", "train", statistics="imagenet")
    few = open_source(f"folder:{photos}", "train", statistics="imagenet", max_examples=len(whole) // 2)
    labels = {whole[i]["label"] for i in range(len(whole))}
    assert {few[i]["label"] for i in range(len(few))} == labels and len(labels) > 1
    assert len({few.name(i) for i in range(len(few))}) == len(few)
