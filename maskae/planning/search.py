"""The lightest rematerialisation and the largest batch per chip that fit."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

from ml_collections import ConfigDict

from maskae.errors import UserError
from maskae.planning.chips import Topology
from maskae.planning.plan import plan, set_rematerialisation
from maskae.planning.report import Report

POLICIES = ("none", "dots", "full")  # from the fastest to the one that keeps least
LARGEST = 4096  # examples per chip
Planner = Callable[[str, int], Report]


def search(name: str, config: ConfigDict, topology: Topology, *, formula: bool = False) -> list[Report]:
    """All plans that were made, the chosen one last; each is also told on standard error.

    First the lightest policy with which the config's own batch fits; then, with it, the largest power-of-two multiple of the smallest
    batch that the mesh divides. Where no policy lets the config's batch fit, the largest batch with the heaviest policy.
    Raises UserError for a system without the argument `remat`.
    """
    if "remat" not in config.model:
        raise UserError(f"--search: the system '{config.system}' of {name} has no model.remat to choose")
    made: dict[tuple[str, int], Report] = {}

    def planned(policy: str, batch: int) -> Report:
        if (policy, batch) not in made:
            changed = copy.deepcopy(config)
            set_rematerialisation(changed, policy)
            changed.train.batch_size = batch
            made[policy, batch] = report = plan(name, changed, topology, formula=formula)
            answer = "fits" if report.fits else "does not fit"
            print(f"{policy:5s} {batch / topology.size:8g} per chip: {answer}", file=sys.stderr, flush=True)
        return made[policy, batch]

    own = config.train.batch_size
    policies = ("none", "full") if isinstance(config.model.remat, bool) else POLICIES
    policy = next((policy for policy in policies if planned(policy, own).fits), policies[-1])
    best = largest_batch(planned, policy, own, topology.size * config.train.accumulate)
    chosen = made[policy, best] if best else made[policy, own]
    return [*(report for report in made.values() if report is not chosen), chosen]


def largest_batch(planned: Planner, policy: str, start: int, smallest: int) -> int:
    """The largest batch `start` * 2^k that fits and is a multiple of `smallest`; 0 where none fits."""
    batch = start
    if planned(policy, batch).fits:
        while 2 * batch <= LARGEST * smallest and planned(policy, 2 * batch).fits:
            batch *= 2
        return batch
    while batch % (2 * smallest) == 0:
        batch //= 2
        if planned(policy, batch).fits:
            return batch
    return 0
