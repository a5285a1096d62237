"""What the start of a stage may look at: the training records through this stage's eyes, and the stages before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from ml_collections import ConfigDict

from maskae import start
from maskae.config import build_from
from maskae.errors import UserError, nearest
from maskae.systems import SYSTEMS
from maskae.systems.contract import System, Variables

if TYPE_CHECKING:
    from maskae.data.spec import DataSpec
    from maskae.experiment import Experiment


Finished = Mapping[str, tuple[ConfigDict, Path]]  # stage -> (its config, its run folder)


@dataclass(frozen=True)
class StageData:
    """Given to a system's `begin(variables, stage)`.

    Attributes:
        experiment: of the stage that begins.
        finished: name -> (config, run folder) of every stage before it.
    """

    experiment: Experiment
    finished: Finished = field(default_factory=dict)

    @property
    def spec(self) -> DataSpec:
        """What the data is."""
        return self.experiment.spec

    def __len__(self) -> int:
        """Training records."""
        return len(self.experiment.train_source)

    def batches(self) -> Iterator[dict[str, jax.Array]]:
        """Every training record once, in order: prepared as for evaluation, on the devices; padding rows have `valid` False."""
        experiment = self.experiment
        prepare = jax.jit(experiment.prepare_evaluation)
        return (prepare(experiment.put(batch)) for batch in experiment.batches_of(experiment.train_source))

    def earlier(self, name: str) -> tuple[System, Variables]:
        """The system and the last variables (averaged where the run kept an average; numpy arrays) of the finished stage `name`.

        Raises UserError where there is no such stage before this one.
        """
        if name not in self.finished:
            hint = nearest(name, self.finished)
            raise UserError(f"no stage '{name}' before this one{hint}; {self.experiment.config.system} runs as a stage of its config")
        config, folder = self.finished[name]
        system: Any = build_from(SYSTEMS, config.system, config.model.to_dict(), "system")
        pretrained = start.read_run(folder)
        return system, Variables(pretrained.params, pretrained.state)
