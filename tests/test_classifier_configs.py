"""The recipes of fine-tuning and probing: every variant builds, and its numbers are the paper's table."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest

from maskae.config import build_from, load_config
from maskae.data.transforms import STEPS, make_step
from maskae.evaluate import make_evaluators
from maskae.optim import layer_decay_scales, make_optimizer
from maskae.paths import flatten_paths
from maskae.schedules import scaled_learning_rate, warmup_constant
from maskae.systems import SYSTEMS

CONFIGS = Path(__file__).parent.parent / "configs"
VARIANTS = ("tiny", "base", "large", "huge")


def abstract(config: Any) -> tuple[Any, Any]:
    system = build_from(SYSTEMS, config.system, config.model.to_dict(), "system")
    return system, jax.eval_shape(system.init, jax.random.key(0), {})


@pytest.mark.parametrize("name", ["mae_finetune", "mae_probe"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_builds(name: str, variant: str) -> None:
    config = load_config(f"{CONFIGS / name}.py:{variant}")
    system, variables = abstract(config)
    group = config.optimizer
    optimizer = make_optimizer(
        group.name,
        schedule=warmup_constant(1.0, 0),
        no_decay=tuple(group.no_decay),
        layer_decay=group.layer_decay if group.layer_decay != 1.0 else None,
        **group.arguments.to_dict(),
    )
    jax.eval_shape(optimizer.init, variables.params)
    for step, arguments in (*config.data.train_transform, *config.data.val_transform):
        size = {"size": config.data.image_size} if "size" in {field.name for field in dataclasses.fields(STEPS[step])} else {}
        make_step(step, size | dict(arguments))
    assert list(make_evaluators(config.evaluate.evaluators.to_dict())) == ["accuracy"]
    assert system.grid[0] * config.model.patch_size == config.data.image_size


@pytest.mark.parametrize(
    ("variant", "rate", "decay", "drop_path", "epochs", "parameters"),
    [
        ("base", 2e-3, 0.65, 0.1, 100, 86_567_656),
        ("large", 4e-3, 0.75, 0.2, 50, 304_326_632),
        ("huge", 4e-3, 0.75, 0.3, 50, 632_045_800),
    ],
)
def test_fine_tuning_of_the_released_code(variant: str, rate: float, decay: float, drop_path: float, epochs: int, parameters: int) -> None:
    config = load_config(f"{CONFIGS}/mae_finetune.py:{variant}")
    group = config.optimizer
    assert scaled_learning_rate(group.base_learning_rate, config.train.batch_size) == pytest.approx(rate)
    assert (group.layer_decay, config.model.drop_path, config.train.total_epochs) == (decay, drop_path, epochs)
    assert (config.data.mixup_alpha, config.data.cutmix_alpha, config.data.erasing, config.model.label_smoothing) == (0.8, 1.0, 0.25, 0.1)
    _, variables = abstract(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables.params)) == parameters
    scales = flatten_paths(layer_decay_scales(variables.params, decay))
    assert scales["encoder/position"] == pytest.approx(decay ** (config.model.depth + 1))


def test_probing_of_the_paper() -> None:
    config = load_config(f"{CONFIGS}/mae_probe.py:base")
    assert scaled_learning_rate(config.optimizer.base_learning_rate, config.train.batch_size) == pytest.approx(6.4)
    assert config.optimizer.arguments.to_dict() == {"momentum": 0.9, "trust": 0.001, "weight_decay": 0.0}
    assert (config.train.total_epochs, config.optimizer.warmup_epochs, config.optimizer.minimum) == (90, 10, 0)


def test_another_resolution_reaches_the_model() -> None:
    config = load_config(f"{CONFIGS}/mae_finetune.py:huge", ["data.image_size=448"])
    system, variables = abstract(config)
    assert system.grid == (32, 32) and variables.params["encoder"]["position"].shape == (1, 1025, 1280)
