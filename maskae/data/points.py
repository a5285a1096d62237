"""`points:PATH`: point clouds.

    points:FOLDER            one file per cloud (.npy .npz .ply .off .txt .xyz .pts .csv), split and labelled as `folder:` does
    points:FILE.npz          arrays `points` [R, N, 3] and maybe `label` [R], or both with the prefixes `train_` and `val_`
    points:FILE.npz          labelled scenes: `xyz` [S, P, 3], `label` [S, P] (0 background, 1.. objects), `category` [S] (the MOSD layout);
                             every object is a record of its scene's category, and scenes, not objects, are held out
    points:PATH@2048         so many points per record; 1024 by default

Records hold `points` float32 [points, 3], centroid subtracted and divided by the largest radius (Point-MAE's preparation), a random subset
in random order: a new one each time in training, the same one in evaluation. A cloud with fewer points is filled up with repetitions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from maskae.data.contract import SPLITS, Record, Source, SourceArguments, stratified_split
from maskae.data.folder import FileKind, split_folder
from maskae.data.point_files import POINT_SUFFIXES, read_points
from maskae.data.spec import LABEL, NO_LABEL, DataSpec, Field, split_hash
from maskae.errors import UserError, nearest

POINTS = "points"
DEFAULT_COUNT = 1024
POINT_FILES = FileKind("point files", POINT_SUFFIXES)


def in_unit_ball(points: np.ndarray) -> np.ndarray:
    """Points [N, 3] less their centroid, over the largest radius; float32. Points that are all one stay at the origin."""
    centred = points - points.mean(axis=0, dtype=np.float64)
    radius = np.sqrt(np.square(centred).sum(axis=1).max())
    return (centred / radius if radius > 0 else centred).astype(np.float32)


def draw_points(points: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` of the points [N, 3], in random order; with fewer than `count` all of them come as often as possible before any once more."""
    rounds = [generator.permutation(len(points)) for _ in range(-(-count // len(points)))]
    return points[np.concatenate(rounds)[:count]]


@dataclass(frozen=True)
class PointSource:
    """Clouds in memory or in files.

    Attributes:
      clouds: float [N, 3] each, or the path of a file.
      labels: int32 [R], -1 where there is none.
      names: of the records.
      count: points per record.
      spec: of the whole data set.
    """

    clouds: tuple[np.ndarray | Path, ...]
    labels: np.ndarray
    names: tuple[str, ...]
    count: int
    spec: DataSpec

    def __len__(self) -> int:
        return len(self.clouds)

    def __getitem__(self, index: int) -> Record:
        return self.sample(index, np.random.default_rng(0))

    def sample(self, index: int, generator: np.random.Generator) -> Record:
        """A random subset of the cloud's points. Raises BadRecord where its file cannot be read."""
        cloud = self.clouds[index]
        points = read_points(cloud) if isinstance(cloud, Path) else cloud
        return {POINTS: in_unit_ball(draw_points(points, self.count, generator)), LABEL: int(self.labels[index])}

    def name(self, index: int) -> str:
        """The path of the file, or the record's place in its archive."""
        return self.names[index]


@dataclass(frozen=True)
class Clouds:
    """One split: `clouds`, `labels` int32 [R] and `names`, and the class names of all splits."""

    clouds: tuple[np.ndarray | Path, ...]
    labels: np.ndarray
    names: tuple[str, ...]
    class_names: tuple[str, ...] = ()

    def take(self, rows: np.ndarray) -> Clouds:
        """Some of the records."""
        clouds, names = (tuple(each[i] for i in rows) for each in (self.clouds, self.names))
        return Clouds(clouds, self.labels[rows], names, self.class_names)


def options_of(arguments: SourceArguments) -> tuple[SourceArguments, int]:
    """The arguments with the bare path, and the number of points after its last @. Raises UserError where that is no number above 0."""
    path, at, text = arguments.path.rpartition("@")
    if not at:
        return arguments, DEFAULT_COUNT
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{arguments.name}: write the number of points per record after an @, as in points:{path}@{DEFAULT_COUNT}")
    return dataclasses.replace(arguments, path=path), int(text)


def open_points(arguments: SourceArguments) -> Source:
    """One split of a set of point clouds. Raises UserError for a folder or an archive that holds none."""
    arguments, count = options_of(arguments)
    is_archive = arguments.path.lower().endswith(".npz")
    parts = _archive_parts(arguments) if is_archive else _folder_parts(arguments)
    classes = parts["train"].class_names
    members = [list(zip(parts[split].names, parts[split].labels.tolist(), strict=True)) for split in SPLITS]
    spec = DataSpec(
        name=arguments.name,
        image_shape=None,
        channels=0,
        mean=(),
        std=(),
        num_classes=len(classes) or None,
        class_names=classes,
        counts={split: len(part.clouds) for split, part in parts.items()},
        split_hash=split_hash(*members),
        fields={POINTS: Field((count, 3), "float32")},
    )
    part = parts[arguments.split]
    return PointSource(part.clouds, part.labels, part.names, count, spec)


def _folder_parts(arguments: SourceArguments) -> dict[str, Clouds]:
    root = arguments.resolve("folder")
    parts = {}
    for split, listing in split_folder(root, arguments, POINT_FILES).items():
        paths = tuple(root / file for file in listing.files)
        parts[split] = Clouds(paths, listing.labels, tuple(map(str, paths)), listing.class_names)
    return parts


def _archive_parts(arguments: SourceArguments) -> dict[str, Clouds]:
    path = arguments.resolve("file")
    try:
        with np.load(path, allow_pickle=False) as loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, BadZipFile) as error:
        raise UserError(f"{arguments.name}: {path} is no .npz file of plain arrays: {error}") from error
    if {"xyz", "label", "category"} <= set(arrays):
        whole, groups = scene_objects(arrays, arguments.name)
        scenes, of_scene = np.unique(groups, return_index=True)
        rows = stratified_split(whole.labels[of_scene], arguments.val_percent, arguments.split_seed)
        return {split: whole.take(np.flatnonzero(np.isin(groups, scenes[part]))) for split, part in zip(SPLITS, rows, strict=True)}
    if "val_points" in arrays:
        return {split: _plain_clouds(_without_prefix(arrays, f"{split}_"), arguments.name) for split in SPLITS}
    whole = _plain_clouds(arrays, arguments.name)
    rows = stratified_split(whole.labels, arguments.val_percent, arguments.split_seed)
    return {split: whole.take(part) for split, part in zip(SPLITS, rows, strict=True)}


def scene_objects(arrays: Mapping[str, np.ndarray], name: str) -> tuple[Clouds, np.ndarray]:
    """Every object of labelled scenes as a cloud of its scene's category, and the scene of each, int [R]. Raises UserError for bad shapes.

    arrays: `xyz` [S, P, 3], `label` [S, P] (0 background, 1.. objects), `category` [S], maybe `name` [S].
    """
    xyz, label, category = arrays["xyz"], arrays["label"], arrays["category"]
    if xyz.ndim != 3 or xyz.shape[2] != 3 or label.shape != xyz.shape[:2] or category.shape != xyz.shape[:1]:
        raise UserError(f"{name}: xyz {xyz.shape}, label {label.shape}, category {category.shape}; want [S, P, 3], [S, P], [S]")
    scene_names = arrays.get("name", np.arange(len(xyz)).astype(str))
    classes, classed = np.unique(category, return_inverse=True)
    found = [(scene, int(thing)) for scene in range(len(xyz)) for thing in np.unique(label[scene]) if thing > 0]
    if not found:
        raise UserError(f"{name}: not one point belongs to an object (all labels are 0)")
    clouds = tuple(xyz[scene][label[scene] == thing].astype(np.float32) for scene, thing in found)
    scenes = np.asarray([scene for scene, _ in found])
    names = tuple(f"{scene_names[scene]} object {thing}" for scene, thing in found)
    return Clouds(clouds, classed[scenes].astype(np.int32), names, tuple(map(str, classes))), scenes


def _without_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _plain_clouds(arrays: Mapping[str, np.ndarray], name: str) -> Clouds:
    key = next((each for each in (POINTS, "xyz") if each in arrays), None)
    if key is None:
        raise UserError(f"{name}: no array 'points'{nearest(POINTS, arrays)}; there are {', '.join(arrays)}")
    points = arrays[key]
    if points.ndim != 3 or points.shape[2] < 3 or not points.size or not np.isfinite(points).all():
        raise UserError(f"{name}: {key} {points.shape} must be finite numbers [R, N, 3]")
    label_key = next((each for each in ("label", "labels") if each in arrays), None)
    labels = np.full(len(points), NO_LABEL) if label_key is None else arrays[label_key].reshape(-1)
    if len(labels) != len(points) or labels.dtype.kind not in "iu":
        raise UserError(f"{name}: {label_key} must be {len(points)} whole numbers, not {labels.dtype} {labels.shape}")
    clouds = tuple(cloud[:, :3].astype(np.float32) for cloud in points)
    classes = tuple(str(number) for number in range(int(labels.max()) + 1))
    return Clouds(clouds, labels.astype(np.int32), tuple(f"{name} record {i}" for i in range(len(points))), classes)
