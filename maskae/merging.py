"""Parts of a config laid over a config: the stages of a run, the optimizers of some parameters."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from ml_collections import ConfigDict

from maskae.errors import UserError, nearest

SUFFIXES = ("steps", "epochs", "examples", "percent")

# Groups whose keys the default config cannot know; the command line may replace one as a whole: --config.evaluate.evaluators="{'knn': {}}"
OPEN_GROUPS = ("optimizer.arguments", "optimizer.schedule_arguments", "optimizer.groups", "evaluate.evaluators", "data.fields")


def group_of(group: ConfigDict, pattern: str) -> ConfigDict:
    """`optimizer` with what `optimizer.groups` says for one pattern. Raises UserError for a key that is not one of an optimizer's."""
    merged = group.copy_and_resolve_references()
    merge(merged, group.groups[pattern], f"optimizer.groups.{pattern}.", replaced=("arguments", "schedule_arguments"))
    return merged


def stage_config(config: ConfigDict, name: str) -> ConfigDict:
    """The whole config of one stage: `config` with what `config.stage[name]` says.

    A stage with a system of its own has a model of its own, and one with a source of its own has downloads of its own.

    Raises UserError for an unknown stage or key.
    """
    if name not in config.stage:
        raise UserError(f"stages names '{name}', which `stage` does not hold{nearest(name, config.stage)}")
    merged = copy.deepcopy(config)
    partial = config.stage[name]
    with merged.unlocked():
        merged.stages, merged.stage = (), ConfigDict()
        if "system" in partial:
            merged.model = ConfigDict()
        merge(merged, partial, f"stage.{name}.", replaced=OPEN_GROUPS)
    merged.lock()
    return merged


def merge(config: ConfigDict, partial: ConfigDict, prefix: str, replaced: Sequence[str] = (), inside: str = "") -> None:
    """Sets what `partial` holds in `config`, group by group; the groups `replaced` are taken as a whole, `model` and its groups gain keys.

    A duration in one suffix replaces one in another. Raises UserError for a key that `config` does not have.
    """
    of_model = inside.split(".")[0] == "model"
    for key, value in partial.items():
        path = f"{inside}.{key}" if inside else key
        if key not in config and not of_model:
            raise UserError(f"{prefix}{path}: no key '{path}'{nearest(path, all_keys(config, f'{inside}.' if inside else ''))}")
        with config.unlocked():
            if isinstance(value, ConfigDict) and path not in replaced:
                if key not in config:
                    config[key] = ConfigDict()
                merge(config[key], value, prefix, replaced, path)
                continue
            if path == "data.source" and "downloads" not in partial:
                config.downloads = ()
            if not of_model and value is not None and is_duration(key):
                for sibling in siblings(key):
                    if sibling in config:
                        config[sibling] = None
            if key in config and isinstance(config[key], ConfigDict) != isinstance(value, ConfigDict):
                raise UserError(f"{prefix}{path} is a group: it cannot be {value!r}")
            config[key] = copy.deepcopy(value)


def all_keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """The dotted names of all leaves."""
    keys: list[str] = []
    for name in config:
        value = config[name]
        keys += all_keys(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) and len(value) else [prefix + name]
    return keys


def is_duration(name: str) -> bool:
    return name.rpartition("_")[2] in SUFFIXES


def siblings(key: str) -> list[str]:
    stem, _, suffix = key.rpartition("_")
    return [f"{stem}_{other}" for other in SUFFIXES if other != suffix]
