"""TensorBoard's files of a run, where they are asked for: what history.csv, run.json and preview.png hold, live."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import torch
from torch import Tensor

from utils import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Board:
    """Does nothing until it is begun, nor where it is not wanted; what cannot be written ends no training.

    Args:
        wanted: whether there is to be one.

    Raises:
        UserError: it is wanted, and TensorBoard is not installed.
    """

    def __init__(self, wanted: bool = False):
        self._wanted, self._every = wanted, 1
        self._writer: SummaryWriter | None = None
        if wanted and importlib.util.find_spec("tensorboard") is None:
            raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard")

    def begin(self, folder: Path, settings: dict, step: int) -> None:
        """In the main process: makes a file in this folder, for a run that has done so many steps."""
        if not self._wanted:
            return
        self._every = settings["log_every"]
        rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
        self._try(lambda: self._open(folder, step))
        self._write(lambda writer: writer.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}", step))

    def _open(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # only when it is wanted: it takes a second

        # What a killed run has written beyond the checkpoint that this one goes on from is not shown twice.
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def after_step(self, step: int, loss: Tensor, terms: dict[str, Tensor], learning_rate: float) -> None:
        """Writes the figures every `log_every` steps, counted from the run's beginning: only then are they fetched."""
        if self._writer is None or step % self._every:
            return
        values = torch.stack([loss.detach(), *terms.values()]).tolist()
        figures = dict(zip(("loss", *terms), values, strict=True), learning_rate=learning_rate)
        self._write(lambda writer: add_scalars(writer, {f"step/{name}": figures[name] for name in figures}, step))

    def after_epoch(self, row: dict[str, float], preview: Path) -> None:
        """Writes a row of history.csv, and the picture as it is now."""
        epoch, picture = row["epoch"], cv2.imread(str(preview)) if self._writer else None
        figures = {tag(name): value for name, value in row.items() if name != "epoch"}
        self._write(lambda writer: add_scalars(writer, figures, epoch))
        if picture is not None:
            self._write(lambda writer: writer.add_image("preview", picture[..., ::-1], epoch, dataformats="HWC"))
        self._write(lambda writer: writer.flush())

    def _write(self, write: Callable[[SummaryWriter], object]) -> None:
        writer = self._writer  # an epoch's figures are written in another thread, which may give it up now
        if writer is not None:
            self._try(lambda: write(writer))

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever its own thread has met
            reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
            print(f"TensorBoard's files cannot be written: {reason}: the training goes on without them", flush=True)
            self._writer = None


def tag(column: str) -> str:
    """Of a column of history.csv: what is of the training and of the validation stands side by side."""
    part, _, name = column.partition("_")
    return f"{name}/{part}" if part in ("train", "val") else f"run/{column}"


def add_scalars(writer: SummaryWriter, figures: dict[str, float], step: int) -> None:
    for name, value in figures.items():
        writer.add_scalar(name, value, step)
