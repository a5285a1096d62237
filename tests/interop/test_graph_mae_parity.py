"""GraphMAE's recorded case, every tensor of it."""

from __future__ import annotations

from maskae.interop.case import Case
from maskae.interop.parity import compare_case


def test_the_reference_case_is_reproduced(shared):
    rows = compare_case(Case.read(shared / "goldens" / "graph_mae" / "a"))
    assert len(rows) == 171
    assert [row.name for row in rows if not row.agrees] == []
