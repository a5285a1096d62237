"""The matching of the released evaluation codes: a best one, and of equals theirs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from maskae.interop.munkres import munkres_matching


# What the munkres package (1.1.4) answers; scipy finds other matchings of the same sums.
@pytest.mark.parametrize(
    ("agreement", "columns"),
    [
        ([[0, 2, 1, 1], [0, 1, 0, 2], [1, 0, 0, 2], [1, 1, 0, 0]], [1, 3, 2, 0]),
        ([[0, 2, 0, 2], [2, 2, 0, 2], [2, 2, 2, 0], [1, 1, 2, 1]], [3, 0, 1, 2]),
        ([[2, 2, 1, 0], [2, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 2]], [2, 0, 1, 3]),
        ([[2, 0, 2, 1], [2, 2, 0, 2], [2, 2, 0, 0], [1, 1, 0, 2]], [2, 1, 0, 3]),
    ],
)
def test_of_equal_matchings_it_finds_that_of_the_package(agreement, columns):
    assert munkres_matching(np.asarray(agreement)).tolist() == columns


def test_no_matching_is_better():
    generator = np.random.default_rng(0)
    for size in (1, 2, 3, 5, 9):
        agreement = generator.integers(0, 12, (size, size))
        columns = munkres_matching(agreement)
        assert sorted(columns) == list(range(size))
        assert agreement[np.arange(size), columns].sum() == agreement[linear_sum_assignment(agreement, maximize=True)].sum()
