"""Where metrics, pictures and texts go: one protocol of four methods, and its writers.

`metrics.jsonl`, `metrics.csv` and `panels/*.png` are always written. TensorBoard and Weights & Biases are optional: when one fails it is
named in the log once and left out, and the run goes on.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from maskae.errors import UserError
from maskae.monitor.tables import CsvWriter, JsonlWriter

logger = logging.getLogger(__name__)


class Writer(Protocol):
    """Takes what a run has to show. `step` is the number of optimizer steps taken."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row of numbers."""

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes pictures, each uint8 [H, W, C] with C = 1 or 3."""

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text."""

    def close(self) -> None:
        """Brings everything to its place; nothing may be written afterwards."""


class PngWriter:
    """Pictures as `<folder>/<step, eight digits>_<name>.png`; numbers and texts are not kept.

    Args:
        folder: made with the first picture.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers are not kept here."""

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes each picture, uint8 [H, W, C] with C = 1 or 3, to its own file."""
        from PIL import Image

        self._folder.mkdir(parents=True, exist_ok=True)
        for name, image in images.items():
            picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
            picture.save(self._folder / f"{step:08d}_{name.replace('/', '_')}.png")

    def text(self, step: int, name: str, text: str) -> None:
        """Texts are not kept here."""

    def close(self) -> None:
        """Nothing is held open."""


class TensorBoardWriter:
    """TensorBoard events through tensorboardX, without TensorFlow.

    Args:
        folder: the run's folder; the events lie in `<folder>/tensorboard`.
        resume_step: TensorBoard hides what earlier events of this run hold beyond this step; None hides nothing.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        # Imported here, because it takes a good part of a second and not every run wants it.
        from tensorboardX import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point to each curve."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Adds pictures, uint8 [H, W, C]."""
        for name, image in images.items():
            self._events.add_image(name, image, step, dataformats="HWC")

    def text(self, step: int, name: str, text: str) -> None:
        """Adds a text, shown as Markdown."""
        self._events.add_text(name, text, step)

    def close(self) -> None:
        """Writes what is still in memory."""
        self._events.close()


class WandbWriter:
    """Weights & Biases. The run's identifier is kept in `<folder>/wandb_id.txt`, so that a resumed run continues the same curves.

    Args:
        project: the W&B project.
        folder: the run's folder.
        settings: the resolved config, shown by W&B.

    Raises:
        UserError: the package `wandb` is not installed.
    """

    def __init__(self, *, project: str, folder: Path, settings: Mapping[str, Any] | None = None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("no package `wandb` here: pip install 'maskae[wandb]', or leave the W&B project empty") from error
        self._wandb = wandb
        id_file = folder / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4) + "\n")
        self._run = wandb.init(
            project=project,
            name=folder.name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(folder),
            config=dict(settings or {}),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point to each curve."""
        self._run.log(dict(values), step=step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Adds pictures, uint8 [H, W, C]."""
        self._run.log({name: self._wandb.Image(image) for name, image in images.items()}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """Sets a text of the run's summary."""
        self._run.summary[name] = text

    def close(self) -> None:
        """Uploads what is left."""
        self._run.finish()


class MultiWriter:
    """Several writers as one.

    Args:
        required: their failures stop the run.
        optional: one that fails is named in the log once and not called again.
    """

    def __init__(self, required: Sequence[Writer], optional: Sequence[Writer] = ()) -> None:
        self._required = list(required)
        self._optional = list(optional)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row of numbers everywhere."""
        self._each(lambda writer: writer.scalars(step, values))

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes pictures, uint8 [H, W, C] with C = 1 or 3, everywhere."""
        for name, image in images.items():
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
                raise ValueError(f"picture '{name}' must be uint8 [H, W, 1 or 3], it is {image.dtype} {list(image.shape)}")
        self._each(lambda writer: writer.images(step, images))

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text everywhere."""
        self._each(lambda writer: writer.text(step, name, text))

    def close(self) -> None:
        """Closes all writers."""
        self._each(lambda writer: writer.close())

    def _each(self, call: Callable[[Writer], None]) -> None:
        for writer in self._required:
            call(writer)
        for writer in list(self._optional):
            try:
                call(writer)
            except Exception as error:
                # An outside service must not be able to stop a run of days, whatever it raises.
                logger.warning("%s failed and is left out from here on: %s", type(writer).__name__, error)
                self._optional.remove(writer)


def open_writers(
    workdir: Path,
    *,
    resume_step: int | None,
    tensorboard: bool = True,
    wandb_project: str = "",
    settings: Mapping[str, Any] | None = None,
) -> MultiWriter:
    """The writers of one run; only the first process of a run may open them (the others use `MultiWriter([])`).

    Args:
        workdir: the run's folder; made if it is not there.
        resume_step: the step of the restored checkpoint: rows beyond it are dropped. None is a fresh start with empty files.
        tensorboard: also write TensorBoard events.
        wandb_project: also log to this W&B project; empty for none.
        settings: the resolved config, for W&B.

    Raises:
        UserError: W&B is asked for and not installed.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    required: list[Writer] = [
        JsonlWriter(workdir / "metrics.jsonl", resume_step=resume_step),
        CsvWriter(workdir / "metrics.csv", resume_step=resume_step),
        PngWriter(workdir / "panels"),
    ]
    wanted: dict[str, Callable[[], Writer]] = {}
    if tensorboard:
        wanted["TensorBoard"] = lambda: TensorBoardWriter(workdir, resume_step=resume_step)
    if wandb_project:
        wanted["Weights & Biases"] = lambda: WandbWriter(project=wandb_project, folder=workdir, settings=settings)
    optional = []
    for name, make in wanted.items():
        try:
            optional.append(make())
        except UserError:
            raise
        except Exception as error:
            # As in `MultiWriter`: no network or a bad login is no reason not to train.
            logger.warning("%s could not be opened and is left out: %s", name, error)
    return MultiWriter(required, optional)
