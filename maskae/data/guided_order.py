"""Batches of records from different groups: an order of the data in which no batch holds two records of one group (G-SimCLR).

The groups may be pseudo labels of any clustering, or labels. The order is a function of the groups, the seed and the position alone, so
every host computes the same one and reads its rows of every batch: nothing is exchanged, and a run resumes with nothing but its step.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np

from maskae.errors import UserError, check_choice

BATCHINGS = ("strict", "even", "official")
EPOCHS_KEPT = 3  # plans in memory: threads that read ahead may stand in two epochs at once


def ranks_in_groups(groups: np.ndarray, order: np.ndarray) -> np.ndarray:
    """How many rows of the same group stand before each row in `order`, a permutation of the rows; int64 [N]. groups: int [N]."""
    by_group = order[np.argsort(groups[order], kind="stable")]
    ordered = groups[by_group]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    ranks = np.empty(len(groups), np.int64)
    ranks[by_group] = np.arange(len(ordered)) - np.repeat(starts, np.diff(np.r_[starts, len(ordered)]))
    return ranks


def largest(holds: Callable[[int], bool], limit: int) -> int:
    """The largest of 0..limit for which `holds` is true, as it is for 0 and for all below it."""
    return bisect_left(range(1, limit + 1), True, key=lambda number: not holds(number))


def full_batches(sizes: np.ndarray, batch_size: int) -> int:
    """The largest T with sum_c min(n_c, T) >= batch_size * T: so many batches of different groups can be made, no record twice."""
    return largest(lambda batches: bool(np.minimum(sizes, batches).sum() >= batch_size * batches), int(sizes.sum()) // batch_size)


def visits_with_reuse(sizes: np.ndarray, batch_size: int) -> np.ndarray:
    """How often an epoch that shows every record at least once takes from each group, int [K]: their sum divides by `batch_size`.

    Batches are as few as can be. What they need beyond all records comes from the smallest groups, whose records then repeat.
    """
    batches = max(int(sizes.max()), -(-int(sizes.sum()) // batch_size))
    visits = sizes.astype(np.int64).copy()
    lacking = batches * batch_size - int(visits.sum())
    # To which the smallest groups can be filled.
    level = largest(lambda level: bool(np.maximum(level - sizes, 0).sum() <= lacking), batches)
    visits = np.maximum(visits, level)
    rest = batches * batch_size - int(visits.sum())
    visits[np.flatnonzero(visits == level)[:rest]] += 1
    return visits


def greedy_batches(visits: np.ndarray, batch_size: int, draws: np.random.Generator) -> np.ndarray:
    """Groups int64 [batches, batch_size] in which a row holds no group twice and group c stands at most `visits[c]` times.

    Every row takes the groups with most visits left (ties at random) until fewer than `batch_size` have any; no other choice gives more
    rows. The rows then come in random order: the largest groups would stand in front.
    """
    left = visits.astype(np.float64)
    rows = []
    while np.count_nonzero(left > 0) >= batch_size:
        # Less than one visit, so it decides between equals only.
        ties = draws.random(len(left))
        chosen = np.argpartition(-(left + ties * (left > 0) * 0.5), batch_size - 1)[:batch_size]
        left[chosen] -= 1
        rows.append(chosen)
    return draws.permutation(np.stack(rows))


def even_batches(visits: np.ndarray, batch_size: int, batches: int, draws: np.random.Generator) -> np.ndarray:
    """Groups int64 [batches, batch_size] as `greedy_batches` gives them, but every row of the same composition in expectation.

    The visits of each group, at most `batches`, are dealt to consecutive rows, starting again at the first one (McNaughton 1959): no row
    gets a group twice. What is more than the rows hold is left out at random.
    """
    left = np.minimum(visits, batches)
    slots = np.repeat(np.arange(len(left)), left)
    surplus = draws.permutation(slots)[: len(slots) - batches * batch_size]
    left = left - np.bincount(surplus, minlength=len(left))
    turn = draws.permutation(len(left))
    return draws.permutation(np.repeat(turn, left[turn]).reshape(batch_size, batches).T)


class GuidedOrder:
    """The endless order [j] -> record of batches of `batch_size` records from as many groups.

    "strict": every epoch anew, records are shuffled within their groups, and batches take from the groups with most records left, until
    there are too few for another batch; what is left over has its chance in the next epoch. With `reuse` an epoch shows every record, and
    small groups start again. While the largest groups are worked down, batches are of few classes.
    "even": the same number of batches of different groups, each with the groups in their proportions.
    "official" (the released code): one fixed order by the rank within the group, cut into batches. Only while every group has records left
    does a batch hold each group once; later ones repeat groups, and the last are of the largest groups alone. Ranks follow the order of the
    records: where that is by class, as in folders, batches hold one class more often than random ones.
    """

    def __init__(self, groups: np.ndarray, batch_size: int, *, batching: str = "strict", reuse: bool = False, seed: int = 0):
        """`groups` int [N], below 0 for records that are left out. Raises UserError where there are too few groups for a batch."""
        check_choice("batching", batching, BATCHINGS)
        self.batch_size, self.batching, self.reuse, self.seed = batch_size, batching, reuse, seed
        self._records = np.flatnonzero(groups >= 0)
        _, self._groups, self._sizes = np.unique(groups[self._records], return_inverse=True, return_counts=True)
        enough = len(self._records) if batching == "official" else len(self._sizes)
        if enough < batch_size:
            what = "records" if batching == "official" else "groups of records to take one from each"
            raise UserError(f"guided batches of {batch_size} need as many {what}, and there are {enough}")
        self._visits = visits_with_reuse(self._sizes, batch_size) if reuse else self._sizes
        official = batching == "official"
        # Full batches before the order starts anew.
        self.batches_per_epoch = len(self._records) // batch_size if official else full_batches(self._visits, batch_size)
        self._plans: dict[int, np.ndarray] = {}

    def epoch(self, number: int) -> np.ndarray:
        """The records of one epoch, int64 [batches, batch_size]."""
        if self.batching == "official":
            ranks = ranks_in_groups(self._groups, np.arange(len(self._groups)))
            kept = np.argsort(ranks, kind="stable")[: self.batches_per_epoch * self.batch_size]
            return self._records[kept].reshape(-1, self.batch_size)
        draws = np.random.default_rng([self.seed, zlib.crc32(b"guided order"), number])
        shuffled = draws.permutation(len(self._groups))
        members = shuffled[np.argsort(self._groups[shuffled], kind="stable")]  # group after group
        firsts = np.cumsum(self._sizes) - self._sizes
        if self.batching == "even":
            chosen = even_batches(self._visits, self.batch_size, self.batches_per_epoch, draws)  # [batches, batch_size]
        else:
            chosen = greedy_batches(self._visits, self.batch_size, draws)  # [batches, batch_size]
        turn = ranks_in_groups(chosen.reshape(-1), np.arange(chosen.size)).reshape(chosen.shape)
        return self._records[members[firsts[chosen] + turn % self._sizes[chosen]]]

    def __getitem__(self, j: int) -> int:
        """The record of element `j`."""
        number, place = divmod(int(j), self.batches_per_epoch * self.batch_size)
        number = 0 if self.batching == "official" else number
        plan = self._plans.get(number)
        if plan is None:
            plan = self.epoch(number).reshape(-1)
            # A new dictionary in one assignment: threads read the old or the new one, never one that changes.
            self._plans = {**dict(list(self._plans.items())[1 - EPOCHS_KEPT :]), number: plan}
        return int(plan[place])

    def __getstate__(self) -> dict[str, Any]:
        """Without the plans, which worker processes make themselves."""
        return {**self.__dict__, "_plans": {}}
