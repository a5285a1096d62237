"""Which of several equally good matchings the released evaluation codes find: Munkres' algorithm in the order of scans of their package.

Accuracy is the same for all of them, an F1 per class is not. Without a record to compare with, any matching will do.
"""

from __future__ import annotations

import numpy as np


def munkres_matching(agreement: np.ndarray) -> np.ndarray:
    """The column of each row, int [n], in a one-to-one matching of the largest sum over `agreement`, int [n, n]."""
    cost = agreement.max(1, keepdims=True) - agreement
    starred = np.zeros(cost.shape, bool)
    for row, column in np.argwhere(cost == 0):
        starred[row, column] = not starred[row].any() and not starred[:, column].any()
    while not starred.any(0).all():
        _augment(cost, starred)
    return starred.argmax(1)


def _augment(cost: np.ndarray, starred: np.ndarray) -> None:
    """One more starred zero; `cost` and `starred` [n, n] are changed in place."""
    rows, columns = np.zeros(len(cost), bool), np.asarray(starred.any(0))  # the covered ones
    primed = np.zeros(cost.shape, bool)
    row = column = 0
    while True:
        found = _uncovered_zero((cost == 0) & ~rows[:, None] & ~columns, row, column)
        if found is None:
            smallest = cost[~rows][:, ~columns].min()
            cost[rows] += smallest
            cost[:, ~columns] -= smallest
            row = column = 0
            continue
        row, column = found
        primed[row, column] = True
        if not starred[row].any():
            break
        rows[row], column = True, int(np.argmax(starred[row]))
        columns[column] = False
    path = [(row, column)]
    while starred[:, column].any():
        row = int(np.argmax(starred[:, column]))
        path.append((row, column))
        column = int(np.argmax(primed[row]))
        path.append((row, column))
    for place in path:
        starred[place] = not starred[place]


def _uncovered_zero(zeros: np.ndarray, row: int, column: int) -> tuple[int, int] | None:
    """Of the first row from `row` on (going round) that has any, the last one counted from `column` on (going round)."""
    size = len(zeros)
    for each in np.roll(np.arange(size), -row):
        found = np.flatnonzero(zeros[each])
        if len(found):
            return int(each), int(found[np.argmax((found - column) % size)])
    return None
