"""What a data set is (`DataSpec`) and the names of the fields of a batch; both are fixed here and nowhere else."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from maskae.errors import UserError

# Every other name is a field of its source (`DataSpec.fields`), such as volume [B, D, H, W, C], spectrogram [B, T, F], points [B, N, 3],
# tokens [B, L] and token_mask [B, L], table [B, F] and table_missing [B, F], sensor_<name> [B, H, W, C], and for graphs nodes [B, N, D],
# senders [B, E], receivers [B, E], node_mask [B, N], edge_mask [B, E].
IMAGE = "image"  # uint8 [B, H, W, C] from the host, float32 [B, H, W, C] after the device transform
VIDEO = "video"  # uint8 [B, T, H, W, C], a field of its source
LABEL = "label"  # int32 [B], -1 where there is none
INDEX = "index"  # int32 [B], the record in its source
CLIP = "clip"  # int32 [B], a field of its source: the clip that a record is a segment of
EXAMPLE = "example"  # int32 [B], the position in the GLOBAL batch: what per-example draws are keyed by
VALID = "valid"  # bool [B], only in evaluation batches: False for padding rows

NO_LABEL = -1

FIELD_DTYPES = ("uint8", "int32", "float32", "bool")

# The statistics of ImageNet's training images, which every paper on natural images normalises by.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BadRecord(Exception):
    """A record that cannot be read; the message is the reason. The pipeline replaces, counts and names it."""


@dataclass(frozen=True)
class Field:
    """One array of every record: its shape without the batch axis, and its dtype."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def parse(cls, text: str) -> Field:
        """The field that `str` wrote, such as `float32[1024,3]`, or `int32[]` for a number. Raises UserError for other text."""
        found = re.fullmatch(r"(\w+)\[([\d, ]*)\]", text.strip())
        if not found or found[1] not in FIELD_DTYPES:
            raise UserError(f"'{text}' is no field: write one of {', '.join(FIELD_DTYPES)} and a shape, as in float32[1024,3]")
        return cls(tuple(int(size) for size in found[2].split(",") if size.strip()), found[1])

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class DataSpec:
    """All that the rest of a run may know about a data set; it travels with every checkpoint.

    Attributes:
      name: the source as it was asked for, for example `digits` or `folder:photos`.
      image_shape: (H, W, C) where every record has the same, else None.
      channels: 1 or 3 (any number for `npz:`); every record is converted to it. 0 where records hold no `image`.
      mean, std: per channel, in units where 1 is `max_value`; computed on training records.
      max_value: the value of full brightness in the uint8 arrays, 255 (16 for the scanned digits).
      num_classes: None where there are no labels.
      class_names: one per class, empty where unknown.
      counts: records of each split.
      split_hash: of the names (or numbers) and labels in the training and the validation split.
      fields: the arrays of a record besides `image`, `label` and `index`, by name.
      details: what else a system or an evaluator of this kind of data must know, as plain JSON values (names of columns, domains, splits).
    """

    name: str
    image_shape: tuple[int, int, int] | None
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_value: int = 255
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    split_hash: str = ""
    fields: dict[str, Field] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise UserError(f"{self.name}: {name} has {len(values)} values for {self.channels} channels")
        if self.std and min(self.std) <= 0:
            raise UserError(f"{self.name}: std {self.std} must be positive: an image set without contrast cannot be normalised")

    @property
    def has_images(self) -> bool:
        """Whether records hold an `image`."""
        return self.channels > 0

    def to_json(self) -> str:
        """The spec as a JSON object; `from_json` gives an equal spec back."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DataSpec:
        """The spec that `to_json` wrote. Raises UserError for text that is no spec."""
        try:
            values = json.loads(text)
            for name in ("mean", "std", "class_names"):
                values[name] = tuple(values[name])
            if values["image_shape"] is not None:
                values["image_shape"] = tuple(values["image_shape"])
            values["fields"] = {name: Field(tuple(each["shape"]), each["dtype"]) for name, each in values.get("fields", {}).items()}
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"not a data spec: {error}") from error


def split_hash(train: Iterable[tuple[str, int]], val: Iterable[tuple[str, int]]) -> str:
    """16 hexadecimal digits that change when any (name, label) enters, leaves or changes sides of the split."""
    digest = hashlib.sha256()
    for title, members in (("train", train), ("val", val)):
        digest.update(f"[{title}]\n".encode())
        for name, label in members:
            digest.update(f"{name}\t{label}\n".encode())
    return digest.hexdigest()[:16]
