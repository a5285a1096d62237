"""The configuration: every key with its default, the command line's overrides, and the checks that need no data.

A file in `configs/` starts from `default_config()` and sets what its recipe needs. The result is locked: a key that is not listed here,
or an argument that the system does not have, is an error.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from maskae.data.downloads import parse_downloads
from maskae.errors import UserError, check_arguments, nearest
from maskae.merging import OPEN_GROUPS, SUFFIXES, all_keys, is_duration, siblings, stage_config


def duration(**given: float) -> dict[str, Any]:
    """The keys of a duration, e.g. `duration(total_epochs=800)` -> total_epochs=800 and the other three suffixes None.

    Exactly one suffix of a duration is set. An override of another suffix replaces the recipe's.
    """
    (key, value), = given.items()
    name, _, suffix = key.rpartition("_")
    if suffix not in SUFFIXES:
        raise UserError(f"{key}: a duration ends in one of _{', _'.join(SUFFIXES)}{nearest(suffix, SUFFIXES)}")
    return {f"{name}_{other}": value if other == suffix else None for other in SUFFIXES}


def set_duration(group: ConfigDict, **given: float) -> None:
    """Sets a duration of a config group to one suffix and clears the others: `set_duration(config.train, total_epochs=800)`."""
    for key, value in duration(**given).items():
        group[key] = value


def use_digits(config: ConfigDict) -> None:
    """The data of every `:tiny` recipe on images: scikit-learn's 8x8 digits, untransformed, since a flipped digit is another digit."""
    config.data.update({"source": "digits", "image_size": 8, "channels": 1, "train_transform": (), "val_transform": (), "flip": False})


def default_data() -> dict[str, Any]:
    """The keys of `config.data`, which all stages of the input pipeline read."""
    return {
        "source": "digits",  # digits | folder:/path | arrayrecord:/path or gs://bucket/path | tfds:name | npz:/path
        "root": "",  # relative paths of `source` start here (or at MASKAE_DATA)
        # Files that `source` reads, fetched where they are missing: (place below the root, URL, SHA-256). A place that ends in a slash is a
        # folder, into which a zip or tar archive is unpacked. Another `source` clears them.
        "downloads": (),
        "val_percent": 10.0,  # share split off for validation where the source has no split of its own
        "split_seed": 0,
        "max_examples": 0,  # use only so many training records, evenly spaced; 0: all
        "fields": {},  # arrays of a record besides the image, {"points": "float32[1024,3]"}, for a dry run without the data
        "examples": 0,  # training records of the recipe's data, for a dry run on a machine without them
        "statistics": "measured",  # mean and std to normalise by: measured (of the training records) | imagenet | unit (0..1)
        "cache": "none",  # none | ram: keep what was read of each record in memory, as it is stored
        "cache_gigabytes": 16.0,  # of each split's cache per process (and worker); what does not fit is read again
        "shard_folder": "",  # where shards of a bucket are copied to; empty: .cache/maskae/shards in the home folder
        "shard_gigabytes": 500.0,  # of all copies in it
        "image_size": 224,  # pixels per side after the transform
        "channels": 3,
        "train_transform": (("random_resized_crop", {"scale": (0.2, 1.0)}),),  # on the host, uint8 in and out; frames of a clip alike
        "val_transform": (("resize_center_crop", {}),),
        "flip": True,  # horizontal, with probability 0.5, on the device
        "mixup_alpha": 0.0,  # 0: off; needs labels
        "cutmix_alpha": 0.0,
        "label_smoothing": 0.0,
        "erasing": 0.0,  # probability of random erasing per image
        "views": 1,  # augmented views of each decoded image, side by side in a batch; an epoch stays as many examples
        "workers": 0,  # processes that decode; 0: threads of this process
        "threads": 2,  # that read ahead
        "max_bad_percent": 1.0,  # a larger share of unreadable records stops the run
    }


def default_config() -> ConfigDict:
    """All keys of a run. The comment behind a key is its documentation."""
    return ConfigDict({
        "seed": 0,  # of initialisation, data order, augmentation and masks
        "system": "mae",  # a name of maskae.systems.SYSTEMS
        "model": {},  # arguments of the system
        "init_from": "",  # a run folder or a weights file to start from, or stage:NAME, an earlier stage; empty: from scratch
        # Runs one after the other, each in a folder of its own, by name; `stage` holds for each name what differs from the keys here.
        "stages": (),
        "stage": {},
        "data": default_data(),
        "train": {
            "batch_size": 64,  # global: over all devices and microbatches
            **duration(total_epochs=1.0),
            "accumulate": 1,  # microbatches per step
            "ema_decay": 0.0,  # of an averaged copy of the parameters, which is then the one evaluated; 0: none
            "max_nonfinite_in_a_row": 10,  # stop after so many steps in a row with a non-finite loss or gradient
        },
        "optimizer": {
            "name": "adamw",  # adamw | adam | lamb | lars | sgd | nesterov
            "base_learning_rate": 1.5e-4,  # at batch 256: the rate is this times batch_size / 256
            "schedule": "cosine",  # after the warm-up: cosine | cosine_inclusive | cosine_restarts | linear | constant | rsqrt | step
            "schedule_arguments": {},  # of the schedule: period and growth, milestones and factor, timescale; total_steps to end early
            "minimum": 0.0,  # learning rate at the end
            **duration(warmup_percent=5.0),
            "arguments": {},  # of the optimizer: b1, b2, weight_decay (with weight_decay_end: a cosine between), ...
            # Other optimizers for the parameters whose path holds a pattern: {"discriminator": {"name": "adam", "minimum": 1e-5}}; what is
            # left out is as above.
            "groups": {},
            "clip_norm": 0.0,  # largest norm of all gradients, with groups of each group's own; 0: no clipping
            "layer_decay": 1.0,  # learning-rate factor per block from the top down
            "no_decay": ("vectors",),  # names without weight decay; `vectors` stands for every bias and scale
        },
        "mesh": {
            # -1: the devices that the other axes leave. Parameters are split over fsdp and tensor; `slice` is for TPU slices joined by an
            # ordinary network, and is their number.
            "slice": 1,
            "data": -1,
            "fsdp": 1,
            "tensor": 1,
        },
        "checkpoint": {
            **duration(every_percent=10.0),
            "keep_last": 2,
            "keep_every_steps": 0,  # also keep the checkpoints of these steps for good; 0: none
            "resume": "auto",  # auto: the newest whole checkpoint or a fresh start; must: fail without one; never: fail if there is one
        },
        "log": {
            "every_steps": 50,
            "tensorboard": True,
            "wandb_project": "",  # empty: no Weights & Biases
            "profile_first_step": 0,  # the profiler's window; 0: none
            "profile_steps": 5,
            "watchdog_factor": 10.0,  # dump all stacks when a step takes so many times the median; 0: off
        },
        "evaluate": {
            **duration(every_percent=100.0),
            "batch_size": 256,
            "max_examples": 0,  # of each split, evenly spaced; 0: all
            "seed": 0,  # of the probes' draws; apart from the run's, so that runs with other seeds are probed alike
            "evaluators": {},  # name -> arguments, see maskae.evaluate.EVALUATORS
            "baselines": True,  # evaluate the untrained encoder and raw pixels too, once
            "maxima": False,  # keep each metric's largest value over all evaluations too, as papers do that choose the epoch by labels
            "map_examples": 0,  # validation records in a map of the features (two principal components, coloured by label); 0: none
            "panels": 8,  # images in the reconstruction panel; 0: none
            "pictures": "all",  # all | last: pictures of every evaluation, or of the first and the last one
            "finetune": "",  # a config file to fine-tune with at the end, e.g. configs/mae_finetune.py:tiny
        },
    })


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The locked config of `configs/mae.py:base` with `a.b=value` overrides applied and checked.

    Raises UserError for a missing file or variant, an unknown key, a value of another type, two suffixes of one duration.
    """
    path_text, _, variant = spec.partition(":")
    path = Path(path_text)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path("configs")
        raise UserError(f"--config: no file {path}{nearest(str(path), [str(folder / p.name) for p in sorted(folder.glob('*.py'))])}")
    module = load_module(path)
    variants = tuple(getattr(module, "VARIANTS", ()))
    if variant and variant not in variants:
        has = f"it has {', '.join(variants)}" if variants else "it has no variants"
        raise UserError(f"--config: {path} has no variant '{variant}'{nearest(variant, variants)}; {has}")
    config = module.get_config(variant) if variant else module.get_config()
    config.lock()
    apply_overrides(config, overrides)
    check(config)
    return config


def load_module(path: Path) -> ModuleType:
    """The config file `path` as a module, also for a config that builds on another: `load_module(Path(__file__).with_name("mae.py"))`."""
    spec = importlib.util.spec_from_file_location(f"maskae_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Sets `a.b=value` pairs on the locked config. Raises UserError that names the key, and the nearest one where it is unknown."""
    given = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--config.{key} needs a value: --config.{key}=...")
        _set(config, key, value)
        given.append(key)
    for key in given:
        _clear_other_suffixes(config, key, given)
        _clear_downloads(config, key, given)


def _open_stage_key(config: ConfigDict, key: str) -> None:
    """Makes `stage.NAME.a.b` settable where it is a key of that stage's config which the recipe leaves as it is above. Raises UserError."""
    _, name, *parts = key.split(".")
    if name not in config.stage:
        raise UserError(f"--config.{key}: no stage '{name}'{nearest(name, config.stage)}; there are {', '.join(config.stage) or 'none'}")
    stage = stage_config(config, name)
    _open_argument(stage, key, parts)
    whole: Any = stage
    partial: Any = config.stage[name]
    with config.unlocked():
        for depth, part in enumerate(parts):
            if not isinstance(whole, ConfigDict) or part not in whole:
                raise UserError(f"--config.{key}: no key '{'.'.join(parts[:depth + 1])}'{nearest('.'.join(parts), all_keys(stage))}")
            parent, whole = whole, whole[part]
            # A number of examples is no duration where its other suffixes are no keys.
            for each in (part, *siblings(part)) if is_duration(part) else (part,):
                if each in parent and each not in partial:
                    partial[each] = ConfigDict() if isinstance(whole, ConfigDict) else parent[each]
            partial = partial[part]


def _open_argument(config: ConfigDict, key: str, parts: Sequence[str]) -> None:
    """Makes `model.a`, given as its parts, settable where it is an argument of the system that the recipe leaves at its default.

    Raises UserError, with the nearest right one, where the system has no such argument.
    """
    if len(parts) != 2 or parts[0] != "model" or parts[1] in config.model:
        return
    from maskae.systems import SYSTEMS  # brings jax, which most runs do not need so early

    fields = dataclasses.fields(SYSTEMS[config.system]) if config.system in SYSTEMS else ()
    defaults = {field.name: field.default for field in fields if field.init and field.default is not dataclasses.MISSING}
    if parts[1] not in defaults:
        known = [f"model.{name}" for name in (*config.model, *defaults)]
        raise UserError(f"--config.{key}: no key 'model.{parts[1]}'{nearest(f'model.{parts[1]}', known)}")
    with config.unlocked():
        config.model[parts[1]] = defaults[parts[1]]


def _set(config: ConfigDict, key: str, text: str) -> None:
    if key.startswith("stage.") and key.count(".") > 1:
        _open_stage_key(config, key)
    if not config.stages:
        _open_argument(config, key, key.split("."))
    *groups, name = key.split(".")
    group: Any = config
    for depth, part in enumerate(groups):
        if not isinstance(group, ConfigDict) or part not in group:
            raise _unknown(key, ".".join(key.split(".")[: depth + 1]), config)
        group = group[part]
    if not isinstance(group, ConfigDict) or name not in group:
        raise _unknown(key, key, config)
    old = group[name]
    value = _parse(text, old)
    if (key in OPEN_GROUPS or ".".join(key.split(".")[2:]) in OPEN_GROUPS) and isinstance(value, dict):
        with config.unlocked():
            group[name] = value
        return
    if isinstance(old, ConfigDict):
        raise UserError(f"--config.{key} is a group; set one of its keys: {', '.join(f'{key}.{k}' for k in old)}")
    wrong = UserError(f"--config.{key}={text}: expected {_type_name(old)}, as in {old!r}, got {_type_name(value)}")
    if old is not None and value is None and not is_duration(name):
        raise wrong
    if isinstance(old, bool) != isinstance(value, bool) and old is not None:
        raise wrong
    if is_duration(name) and not (value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))):
        raise UserError(f"--config.{key}={text}: expected a number, got {_type_name(value)}")
    try:
        group[name] = value
    except (TypeError, ValueError) as error:
        raise wrong from error


def _unknown(key: str, missing: str, config: ConfigDict) -> UserError:
    return UserError(f"--config.{key}: no key '{missing}'{nearest(key, all_keys(config))}")


def _parse(text: str, old: Any) -> Any:
    if isinstance(old, str):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _type_name(value: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a tuple", list: "a list"}
    return names.get(type(value), "None" if value is None else type(value).__name__)


def _group(config: ConfigDict, name: str) -> ConfigDict:
    """The group of a dotted name; the whole config for ""."""
    for part in name.split(".") if name else []:
        config = config[part]
    return config


def _clear_other_suffixes(config: ConfigDict, key: str, given: Iterable[str]) -> None:
    """An override in one suffix replaces the recipe's in another; two suffixes on one command line contradict each other."""
    group_name, _, name = key.rpartition(".")
    if not is_duration(name):
        return
    group = _group(config, group_name)
    if not any(sibling in group for sibling in siblings(name)) or group[name] is None:
        return
    for sibling in siblings(key):
        if sibling in given and group[sibling.rpartition(".")[2]] is not None:
            raise UserError(f"--config.{key} and --config.{sibling}: one duration with two suffixes; give one of them")
        group[sibling.rpartition(".")[2]] = None


def _clear_downloads(config: ConfigDict, key: str, given: Iterable[str]) -> None:
    """The files that a recipe fetches are for its source: an override with another one needs others, or none."""
    group_name, _, name = key.rpartition(".")
    if name != "source" or group_name.rpartition(".")[2] != "data" or f"{group_name}.downloads" in given:
        return
    group = _group(config, group_name)
    if "downloads" in group:  # a stage has only the keys that it changes, see `stage_config`
        group.downloads = ()


def check(config: ConfigDict) -> None:
    """The checks that need neither data nor devices. Raises UserError."""
    for key in all_keys(config):
        group, _, name = key.rpartition(".")
        node = _group(config, group)
        if is_duration(name) and all(sibling in node for sibling in siblings(name)):
            stem = name.rpartition("_")[0]
            set_keys = [f"{group}.{stem}_{s}" for s in SUFFIXES if node[f"{stem}_{s}"] is not None]
            if len(set_keys) != 1:
                what = " and ".join(set_keys) if set_keys else f"none of {group}.{stem}_{{{','.join(SUFFIXES)}}}"
                raise UserError(f"{what}: a duration has exactly one suffix")
    parse_downloads(config.data.downloads, Path())
    modes = ("auto", "must", "never")
    if config.checkpoint.resume not in modes:
        value = config.checkpoint.resume
        raise UserError(f"checkpoint.resume={value}: one of {', '.join(modes)}{nearest(value, modes)}")
    for key, value in (("train.batch_size", config.train.batch_size), ("train.accumulate", config.train.accumulate),
                       ("log.every_steps", config.log.every_steps), ("data.image_size", config.data.image_size)):
        if value < 1:
            raise UserError(f"{key}={value}: must be at least 1")
    if config.evaluate.pictures not in (choices := ("all", "last")):
        given = config.evaluate.pictures
        raise UserError(f"evaluate.pictures={given}: one of {', '.join(choices)}{nearest(given, choices)}")
    for name in config.stages:
        check(stage_config(config, name))
    if config.train.batch_size % config.train.accumulate:
        raise UserError(f"train.batch_size={config.train.batch_size} does not divide by train.accumulate={config.train.accumulate}")


def build_from(table: dict[str, type], name: str, arguments: dict[str, Any], key: str) -> Any:
    """`table[name](**arguments)`. Raises UserError for an unknown name or argument, with the nearest right one."""
    if name not in table:
        raise UserError(f"{key}={name}: unknown{nearest(name, table)}; one of {', '.join(sorted(table))}")
    check_arguments(f"{key} '{name}'", arguments, table[name])
    try:
        return table[name](**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key} '{name}': {error}") from error


def to_json(config: ConfigDict) -> str:
    """The resolved config as JSON text with sorted keys."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True, default=list)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two nested dicts differ."""
    lines: list[str] = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif json.dumps(a, default=list) != json.dumps(b, default=list):
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command-line words -> (plain words, config overrides as `a.b=value`)."""
    plain, overrides = [], []
    words = list(argv)
    while words:
        word = words.pop(0)
        name = word.lstrip("-")
        if word.startswith("-") and name.startswith("config."):
            if "=" not in name and words and not words[0].startswith("--"):
                name += "=" + words.pop(0)
            overrides.append(name.removeprefix("config."))
        else:
            plain.append(word)
    return plain, overrides

