"""The records that a config names: opened, or assumed where only their number and their fields matter (a dry run, a plan)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from maskae.data.sources import Source, open_source
from maskae.data.spec import DataSpec, Field
from maskae.errors import UserError

logger = logging.getLogger(__name__)


def open_sources(config: ConfigDict, *, fetch: bool = True) -> tuple[Source, Source]:
    """The training and the validation records; published files are fetched where they are missing, unless `fetch` forbids it.

    Raises UserError for a source that is not there.
    """
    data = config.data

    def opened(split: str, max_examples: int | None) -> Source:
        return open_source(
            data.source,
            split,
            root=data.root or None,
            val_percent=data.val_percent,
            split_seed=data.split_seed,
            channels=data.channels,
            statistics=data.statistics,
            max_examples=max_examples,
            cache=data.cache,
            cache_gigabytes=data.cache_gigabytes,
            shard_folder=data.shard_folder or None,
            shard_gigabytes=data.shard_gigabytes,
            own_crop=not data.train_transform,
            downloads=data.downloads,
            fetch=fetch,
        )

    return opened("train", data.max_examples or None), opened("val", None)


@dataclass(frozen=True)
class AbsentSource:
    """Stands for records that are not on this machine where only sizes matter (a dry run, a plan); reading one fails."""

    spec: DataSpec
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise UserError(f"{self.spec.name} is not on this machine")

    def name(self, index: int) -> str:
        """The record's number."""
        return f"record {index}"


def open_or_assume(config: ConfigDict) -> tuple[Source, Source]:
    """As `open_sources`, but nothing is fetched; where the data is not there, its size is taken from `data.examples`.

    Raises UserError where that is 0.
    """
    try:
        return open_sources(config, fetch=False)
    except UserError as error:
        if not config.data.examples:
            raise
        logger.info("%s; going on with data.examples=%d as the recipe says", error, config.data.examples)
    return assumed_sources(config)


def assumed_sources(config: ConfigDict) -> tuple[Source, Source]:
    """Stand-ins for the recipe's data, `data.examples` records that cannot be read."""
    data = config.data
    channels = data.channels
    classes = config.model.num_classes if "num_classes" in config.model else None
    counts = {"train": data.examples}
    fields = {name: Field.parse(text) for name, text in data.fields.items()}
    statistics = (0.5,) * channels, (0.25,) * channels
    spec = DataSpec(data.source, None, channels, *statistics, num_classes=classes, counts=counts, fields=fields)
    source = AbsentSource(spec, data.examples)
    return source, source
