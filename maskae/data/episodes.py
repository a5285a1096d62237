"""A data order for episodes over domains: every batch holds some domains to train on and others to test on, with all classes of each.

Row p of a batch belongs to group p % G of its G domains and to class (p // G) % K, so that a reshape to [B / G, G, ...] parts the domains
and every device holds rows of all of them. Which domains a batch has is drawn from (seed, number of the batch): all hosts agree on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from maskae.data.pipeline import Order, generator, make_order
from maskae.errors import UserError


@dataclass(frozen=True)
class EpisodeOrder:
    """An `Order` over records that lie in one run per domain and class.

    Within a domain and class the records come in a new permutation whenever they are used up. Over many batches every domain is in each of
    the groups equally often.

    Args:
        runs: int [domains, classes, 2], the first record and the number of records of each; domains without records take no part.
        batch_size: of the global batch, a multiple of groups * classes.
        groups: domains per batch.
        seed: of the draws.

    Raises:
        UserError: where the batch does not divide, there are too few domains, or a domain lacks a class.
    """

    runs: np.ndarray
    batch_size: int
    groups: int
    seed: int

    def __post_init__(self) -> None:
        """Refuse what cannot work before training starts."""
        classes = self.runs.shape[1]
        if self.batch_size % (self.groups * classes):
            multiple = f"{self.groups} domains x {classes} classes"
            raise UserError(f"train.batch_size={self.batch_size} is not a multiple of an episode's {multiple}")
        if len(self.domains) < self.groups:
            raise UserError(f"an episode has {self.groups} domains; the training data has {len(self.domains)}")
        for domain in self.domains:
            if (self.runs[domain, :, 1] == 0).any():
                raise UserError(f"domain {domain} of the training data has no records of class {int(np.argmin(self.runs[domain, :, 1]))}")

    @property
    def domains(self) -> np.ndarray:
        """The domains that have records."""
        return np.flatnonzero(self.runs[:, :, 1].sum(1))

    def chosen(self, batch: int) -> np.ndarray:
        """The domain of each group of a batch, int [groups]."""
        return generator(self.seed, batch, "episode").permutation(self.domains)[: self.groups]

    @cached_property
    def _orders(self) -> dict[tuple[int, int], Order]:
        classes = self.runs.shape[1]
        orders = {}
        for domain in map(int, self.domains):
            for label in range(classes):
                seed = int(generator(self.seed, domain * classes + label, "stratum").integers(2**31))
                orders[domain, label] = make_order(int(self.runs[domain, label, 1]), seed, shuffle=True)
        return orders

    def __getitem__(self, j: int, /) -> Any:
        """The record of element j."""
        batch, row = divmod(int(j), self.batch_size)
        classes = self.runs.shape[1]
        domain, stratum_row = int(self.chosen(batch)[row % self.groups]), row // self.groups
        label, place = stratum_row % classes, stratum_row // classes
        of_stratum = self.batch_size // (self.groups * classes)
        return int(self.runs[domain, label, 0]) + int(self._orders[domain, label][batch * of_stratum + place])
