"""The config: overrides, and one clear line for each kind of mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskae.config import apply_overrides, build_from, default_config, differences, load_config, set_duration, split_arguments, to_json
from maskae.errors import UserError
from maskae.systems import SYSTEMS

ROOT = Path(__file__).parent.parent
MAE = str(ROOT / "configs" / "mae.py")


def message(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.batch_sise=3", ["train.batch_sise", "did you mean 'train.batch_size'"]),
        ("trian.batch_size=3", ["trian", "did you mean 'train.batch_size'"]),
        ("train.batch_size=abc", ["train.batch_size=abc", "whole number"]),
        ("train.batch_size=1.5", ["train.batch_size=1.5", "whole number"]),
        ("train.batch_size=True", ["train.batch_size=True", "whole number"]),
        ("data.flip=3", ["data.flip=3", "true or false"]),
        ("train.total_epochs=long", ["train.total_epochs", "a number"]),
        ("train.batch_size", ["train.batch_size", "needs a value"]),
        ("train=3", ["train", "is a group", "train.batch_size"]),
        ("train.batch_size=0", ["train.batch_size=0", "at least 1"]),
        ("train.accumulate=3", ["batch_size=64", "accumulate=3"]),
        ("checkpoint.resume=atuo", ["checkpoint.resume=atuo", "did you mean 'auto'"]),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_key(override, parts):
    text = message(lambda: load_config(f"{MAE}:tiny", [override]))
    for part in parts:
        assert part in text


def test_two_suffixes_on_one_command_line_are_refused_and_one_replaces_the_recipes():
    text = message(lambda: load_config(f"{MAE}:tiny", ["train.total_steps=5", "train.total_epochs=2"]))
    assert "train.total_steps" in text and "train.total_epochs" in text
    config = load_config(f"{MAE}:tiny", ["train.total_epochs=2"])
    assert config.train.total_epochs == 2 and config.train.total_steps is None


def test_two_suffixes_in_a_config_file_are_refused(tmp_path):
    path = tmp_path / "two.py"
    path.write_text(
        "from maskae.config import default_config\n"
        "def get_config():\n    config = default_config()\n    config.train.total_steps = 5\n    return config\n"
    )
    text = message(lambda: load_config(str(path)))
    assert "train.total_steps" in text and "train.total_epochs" in text


def test_missing_file_and_variant_name_the_nearest():
    assert "did you mean" in message(lambda: load_config(str(ROOT / "configs" / "mea.py")))
    assert "did you mean 'large'" in message(lambda: load_config(f"{MAE}:larg"))


def test_values_arrive_with_their_types():
    config = load_config(f"{MAE}:tiny", ["data.flip=true", "optimizer.minimum=1", "data.source=folder:/a", "model.patch_size=4"])
    assert config.data.flip is True and config.optimizer.minimum == 1.0 and isinstance(config.optimizer.minimum, float)
    assert config.data.source == "folder:/a" and config.model.patch_size == 4


def test_an_argument_that_the_recipe_leaves_at_its_default_can_be_set():
    recipe = str(ROOT / "configs" / "spark_medical.py:tiny")
    assert "dtype" not in load_config(recipe).model
    assert load_config(recipe, ["model.dtype=bfloat16"]).model.dtype == "bfloat16"
    assert "did you mean 'model.dtype'" in message(lambda: load_config(recipe, ["model.dtyp=bfloat16"]))
    staged = str(ROOT / "configs" / "mask_align.py:tiny")
    assert load_config(staged, ["stage.student.model.scan=true"]).stage.student.model.scan is True
    # Each stage has a system of its own there, which a key above them all would not reach.
    assert "no key 'model.scan'" in message(lambda: load_config(staged, ["model.scan=true"]))


def test_an_open_group_is_replaced_as_a_whole():
    config = load_config(f"{MAE}:tiny", ["evaluate.evaluators={'knn': {'ks': (5,)}}"])
    assert config.evaluate.evaluators.to_dict() == {"knn": {"ks": (5,)}}
    with pytest.raises((AttributeError, KeyError)):
        config.evaluate.evaluators.rnak = {}


def test_image_size_of_the_data_reaches_the_model():
    config = load_config(f"{MAE}:base", ["data.image_size=64"])
    assert config.model.image_size == 64


def test_a_config_cannot_be_extended_by_a_misspelt_assignment():
    config = load_config(f"{MAE}:tiny")
    with pytest.raises((AttributeError, KeyError)):
        config.train.batchsize = 3


def test_split_arguments_takes_both_spellings_of_an_override():
    plain, overrides = split_arguments(["--config", "a.py", "--config.seed=3", "--config.train.batch_size", "8", "--dry_run"])
    assert plain == ["--config", "a.py", "--dry_run"]
    assert overrides == ["seed=3", "train.batch_size=8"]


def test_an_unknown_system_or_argument_names_the_nearest():
    assert "did you mean 'mae'" in message(lambda: build_from(SYSTEMS, "mea", {}, "system"))
    config = load_config(f"{MAE}:tiny")
    arguments = config.model.to_dict()
    arguments["widht"] = arguments.pop("width")
    assert "did you mean 'width'" in message(lambda: build_from(SYSTEMS, "mae", arguments, "system"))


def test_differences_name_the_leaves():
    a, b = default_config(), default_config()
    apply_overrides(b, ["seed=3", "train.batch_size=8"])
    assert differences(a.to_dict(), b.to_dict()) == ["seed: 0 -> 3", "train.batch_size: 64 -> 8"]
    set_duration(b.train, total_steps=5)
    assert "total_steps" in to_json(b)
