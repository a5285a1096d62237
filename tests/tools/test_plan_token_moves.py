"""The tool that compares the ways to move tokens: a line per move, and bad shapes are named."""

from __future__ import annotations

import pytest

from tools.plan_token_moves import main


def test_times_both_moves_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--topology", "cpu", "--shape", "2,8,2,4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines] == ["take", "restore"]
    assert all("one_hot" in line and line.endswith("times") for line in lines)


@pytest.mark.parametrize("shape", ["64,196,49", "2,8,9,4", "2,8,0,4"])
def test_a_shape_that_cannot_be_is_named(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--shape", shape]) == 2
    assert f"--shape {shape}: expected batch,tokens,kept,width" in capsys.readouterr().err
