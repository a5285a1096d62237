"""The comparison itself: what agrees, what does not, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from maskae.errors import UserError
from maskae.interop.case import Case, Reproduced, after_steps, exact
from maskae.interop.parity import compare, compare_case, replay_of, table

RECORDED = np.asarray([1.0, -4.0, 2.0])


def test_difference_is_relative_to_the_largest_recorded_value() -> None:
    row = compare("x", RECORDED, Reproduced(RECORDED + [0, 0, 3e-5]))
    assert row.difference == pytest.approx(3e-5 / 4)
    assert row.agrees
    assert not compare("x", RECORDED, Reproduced(RECORDED + [0, 0, 5e-5])).agrees


def test_parameters_after_steps_are_compared_with_the_learning_rates() -> None:
    assert compare("x", RECORDED, after_steps(RECORDED + 9e-6, [0.05, 0.05])).agrees
    assert not compare("x", RECORDED, after_steps(RECORDED + 2e-5, [0.05, 0.05])).agrees


def test_left_out_entries_are_counted_and_the_rest_is_compared() -> None:
    skip = np.asarray([False, True, False])
    row = compare("x", RECORDED, Reproduced(RECORDED + [0, 100, 0], skip=skip, note="why"))
    assert row.agrees
    assert row.note == "1 of 3 entries left out: why"
    assert not compare("x", RECORDED, Reproduced(RECORDED + [1, 0, 0], skip=skip)).agrees
    assert not compare("x", RECORDED, Reproduced(RECORDED, skip=np.ones(3, bool))).agrees


def test_slack_is_of_each_entry() -> None:
    slack = np.asarray([0, 0.5, 0])
    row = compare("x", RECORDED, Reproduced(RECORDED + [0, 0.4, 0], slack=slack))
    assert row.agrees and row.difference == 0
    assert not compare("x", RECORDED, Reproduced(RECORDED + [0, 0.6, 0], slack=slack)).agrees
    assert not compare("x", RECORDED, Reproduced(RECORDED + [0.4, 0, 0], slack=slack)).agrees
    assert not compare("x", RECORDED, Reproduced(RECORDED * np.nan, slack=slack)).agrees


@pytest.mark.parametrize("value", [None, Reproduced(RECORDED[:2]), Reproduced(RECORDED * np.nan), exact(RECORDED + 1e-9)])
def test_missing_misshapen_infinite_and_inexact_values_disagree(value: Reproduced | None) -> None:
    assert not compare("x", RECORDED, value).agrees


def test_zeros_are_compared_absolutely() -> None:
    assert compare("x", np.zeros(2), Reproduced(np.full(2, 1e-6))).agrees
    assert not compare("x", np.zeros(2), Reproduced(np.full(2, 1e-3))).agrees


def test_unknown_systems_are_named() -> None:
    with pytest.raises(UserError, match="no replay for the system 'mea' \\(did you mean 'mae'"):
        replay_of("mea")
    with pytest.raises(UserError, match="no replay for the system '../x'"):
        replay_of("../x")


def tiny_case(folder: Path, outputs: dict[str, np.ndarray], listed: list[str]) -> Case:
    record: dict = {"system": "mae", "case": "t"}
    record |= {"tensors": {"outputs.safetensors": [{"name": name, "meaning": f"about {name}"} for name in listed]}}
    (folder / "case.json").write_text(json.dumps(record))
    for part in ("weights", "inputs"):
        save_file({"x": np.zeros(1)}, folder / f"{part}.safetensors")
    save_file(outputs, folder / "outputs.safetensors")
    return Case.read(folder)


def test_every_recorded_and_every_listed_tensor_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny_case(tmp_path, {"good": RECORDED, "bad": RECORDED, "extra": RECORDED}, ["good", "bad", "absent", "family/<name>"])
    replayed = {"good": Reproduced(RECORDED), "bad": Reproduced(-RECORDED)}
    monkeypatch.setattr("maskae.interop.parity.replay_of", lambda system: lambda case: replayed)
    rows = compare_case(case)
    assert {row.name: row.agrees for row in rows} == {"good": True, "bad": False, "extra": False, "absent": False}
    lines = table(case, rows).splitlines()
    assert lines[-1] == "1 of 4 recorded tensors agree; not: bad, extra, absent"
    assert case.meaning("bad") == "about bad"
    assert case.wants("go")
    assert not case.wants("zz")


def test_every_recorded_case_can_be_read(shared: Path) -> None:
    for folder in sorted((shared / "goldens").glob("*/a")):
        case = Case.read(folder)
        assert {name for name in case.meanings if "<" not in name} <= set(case.outputs), folder
        assert any(case.meanings.values()), folder


def test_folders_without_a_case_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has no case.json"):
        Case.read(tmp_path)
    (tmp_path / "case.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        Case.read(tmp_path)
