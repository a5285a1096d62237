"""`tfds:NAME`: a data set prepared by TensorFlow Datasets in the array_record format, read without TensorFlow.

The validation split is the set's own `validation`, `val` or `test`; a set without one has val_percent of its training records held out,
without regard to their labels (reading all labels would mean reading everything).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from maskae.data.contract import Record, Source, SourceArguments, measure_sample, stratified_split
from maskae.data.spec import IMAGE, LABEL, NO_LABEL, BadRecord, DataSpec, split_hash
from maskae.errors import UserError, nearest

VALIDATION_NAMES = ("validation", "val", "test")


def _import_tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(f"tfds: cannot import tensorflow_datasets: {error}") from error
    return tensorflow_datasets


@dataclass(frozen=True)
class TfdsSource:
    """Rows of one split of a prepared data set; images stay encoded."""

    dataset: str
    data_dir: str | None
    split: str
    rows: np.ndarray
    spec: DataSpec

    @cached_property
    def _records(self) -> Any:
        return _open_split(_import_tfds().builder(self.dataset, data_dir=self.data_dir), self.split)

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to worker processes; each opens its own.
        return {key: value for key, value in self.__dict__.items() if key != "_records"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        try:
            record = self._records[int(self.rows[index])]
        # What the reader raises for a damaged shard depends on where the damage is.
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise BadRecord(f"damaged record: {error}") from error
        return {IMAGE: record["image"], LABEL: int(record.get("label", NO_LABEL))}

    def name(self, index: int) -> str:
        """`tfds:cifar10 train[17]`."""
        return f"{self.spec.name} {self.split}[{int(self.rows[index])}]"


def _open_split(builder: Any, split: str) -> Any:
    tfds = _import_tfds()
    return builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})


def _open_builder(arguments: SourceArguments) -> tuple[Any, str | None]:
    """(builder, data folder). Raises UserError for an unknown name, or for a set that is not on disk in a format with random access."""
    tfds = _import_tfds()
    name = arguments.path.partition("/")[0].partition(":")[0]
    # `root` is taken where it holds the set; TFDS's own folder otherwise.
    data_dir = str(arguments.base) if name and (arguments.base / name).is_dir() else None
    try:
        builder = tfds.builder(arguments.path, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UserError(
            f"{arguments.name}: no data set '{name}' in TFDS{nearest(name, tfds.list_builders(with_community_datasets=False))}"
        ) from error
    if not builder.is_prepared():
        raise UserError(
            f"{arguments.name}: not prepared in {builder.data_dir}; prepare it once, with TensorFlow installed, by "
            f"`tfds build {arguments.path} --file_format=array_record`"
        )
    if builder.info.file_format.value != "array_record":
        raise UserError(f"{arguments.name}: prepared as {builder.info.file_format.value}; prepare it again with --file_format=array_record")
    return builder, data_dir


def open_tfds(arguments: SourceArguments) -> Source:
    """The split of a prepared TFDS data set with a feature `image` and maybe `label`. Raises UserError where there is none."""
    if not arguments.path:
        raise UserError(f"{arguments.name}: name the data set after a colon, as in tfds:cifar10")
    builder, data_dir = _open_builder(arguments)
    features = builder.info.features
    if "image" not in features:
        raise UserError(f"{arguments.name}: no feature 'image'{nearest('image', features)}; there are {', '.join(features)}")
    shape = features["image"].shape
    channels = arguments.channels or (shape[-1] if shape[-1] in (1, 3) else 3)
    counts = {name: info.num_examples for name, info in builder.info.splits.items()}
    if "train" not in counts:
        raise UserError(f"{arguments.name}: no split 'train'; there are {', '.join(counts)}")
    validation = next((name for name in VALIDATION_NAMES if name in counts), "train")
    rows = [np.arange(counts["train"]), np.arange(counts[validation])]
    if validation == "train":
        rows = list(stratified_split(np.zeros(counts["train"], int), arguments.val_percent, arguments.split_seed))
    train = _open_split(builder, "train")
    known = arguments.known_statistics(channels)
    mean, std = known or measure_sample(lambda i: train[int(rows[0][i])]["image"], len(rows[0]), channels)
    class_names = tuple(getattr(features["label"], "names", None) or ()) if "label" in features else ()
    members = [
        [(f"{builder.info.full_name}/{name}/{i}", NO_LABEL) for i in part] for name, part in zip(("train", validation), rows, strict=True)
    ]
    spec = DataSpec(
        name=arguments.name,
        image_shape=None if None in shape[:2] else (shape[0], shape[1], channels),
        channels=channels,
        mean=mean,
        std=std,
        num_classes=getattr(features["label"], "num_classes", None) if "label" in features else None,
        class_names=class_names,
        counts={"train": len(rows[0]), "val": len(rows[1])},
        split_hash=split_hash(*members),
    )
    position = 0 if arguments.split == "train" else 1
    return TfdsSource(arguments.path, data_dir, ("train", validation)[position], rows[position], spec)
