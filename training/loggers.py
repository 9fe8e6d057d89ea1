"""Where metrics go: history.csv, the console, TensorBoard; and the progress bar.

A logger has `log(values, step)` and `close()`. It is given the row of each epoch (`values` has "epoch"), and every
`log_every` steps a step's values ("step/loss" and so on), and ignores what it has no use for; `step` counts optimiser
steps from the run's beginning. Another logger is a class here and a line in `build_loggers`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from loading.unreadable import SKIPPED
from utils import UserError, reason, write_csv

HISTORY, PREVIEW, TENSORBOARD = "history.csv", "preview.png", "tensorboard"  # in a run's folder


class Logger(Protocol):
    """Anything that metrics can be logged to."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None:
        """Does nothing, unless a logger has something to end."""
        return


def build_loggers(folder: Path, settings: dict, history: list[dict], step: int) -> list[Logger]:
    """Returns the loggers of a run in `folder`, with the history's rows and the steps that are done."""
    loggers: list[Logger] = [CsvLogger(folder / HISTORY, history), ConsoleLogger(folder, settings)]
    if settings["tensorboard"]:
        try:
            loggers.append(TensorBoardLogger(folder, settings, step))
        except Exception as error:  # whatever TensorBoard raises
            print(f"{folder / TENSORBOARD} cannot be written: {reason(error)}: the training goes on", flush=True)
    return loggers


def log_all(loggers: list[Logger], values: dict[str, float], step: int) -> None:
    """Gives values to all loggers. One that cannot be written is named, and ends no training."""
    for logger in [*loggers]:
        try:
            logger.log(values, step)
        except Exception as error:  # whatever a logger's library raises
            what = getattr(error, "filename", None) or type(logger).__name__
            print(f"{what} cannot be written: {reason(error)}: the training goes on", flush=True)
            if not isinstance(logger, CsvLogger):  # which writes all rows the next time; the disk may have room then
                loggers.remove(logger)


FIRST_COLUMNS = ("loss", "iou", "dice")  # of an epoch's row: of the training, then of the validation
RUN_COLUMNS = ["learning_rate", "seconds", "decoder_learning_rate", "images_per_second", "data_wait", "skipped_steps"]


def history_row(epoch: int, training: dict, validation: dict, unreadable: dict[str, int]) -> dict[str, float]:
    """Returns a row of the history: all metrics of an epoch, those that are looked at most first."""
    both = {"train": {k: v for k, v in training.items() if k not in RUN_COLUMNS}, "val": validation}
    row = {"epoch": epoch, **{f"{split}_{name}": both[split][name] for split in both for name in FIRST_COLUMNS}}
    row |= {name: training[name] for name in RUN_COLUMNS}
    row |= {f"{split}_{name}": value for split, metrics in both.items() for name, value in metrics.items()}
    return row | unreadable


class CsvLogger(Logger):
    """Keeps history.csv: a row an epoch, written as a whole, so that rows of a failed attempt do not get lost."""

    def __init__(self, path: Path, history: list[dict]):
        self._path, self._rows = path, [*history]

    def log(self, values: dict[str, float], step: int) -> None:
        if "epoch" in values:
            self._rows.append(values)
            write_csv(self._rows, self._path)


class ConsoleLogger(Logger):
    """Prints a line of the table an epoch, and what went wrong in it; a star marks the best epoch so far."""

    HEAD = "  epoch | train loss   IoU  Dice | val loss   IoU  Dice |      lr    time wait"

    def __init__(self, folder: Path, settings: dict):
        self._skipped_photos, self._num_epochs = folder / SKIPPED, settings["num_epochs"]

    def log(self, values: dict[str, float], step: int) -> None:
        if "epoch" not in values:
            return
        print(table_line(values, self._num_epochs), flush=True)
        if values["train_unreadable"] or values["val_unreadable"]:
            print(f"{'':7} | unreadable photos: {values['train_unreadable']} replaced, {values['val_unreadable']} left "
                  f"out of the validation ({self._skipped_photos})", flush=True)  # fmt: skip
        if values["skipped_steps"]:
            print(f"{'':7} | steps without finite loss or gradient, skipped: {values['skipped_steps']}", flush=True)


def table_line(row: dict, num_epochs: int) -> str:
    """Returns an epoch's row of the history as a line under `ConsoleLogger.HEAD`."""
    counter = f"{row['epoch']}/{num_epochs}"
    return (
        f"{counter:>7} |   {short(row['train_loss'])} {row['train_iou']:.3f} {row['train_dice']:.3f} "
        f"| {short(row['val_loss'])} {row['val_iou']:.3f} {row['val_dice']:.3f} | {row['learning_rate']:.1e} "
        f"{clock(row['seconds']):>7} {row['data_wait']:4.0%}{' *' if row['best'] else ''}"
    )


def short(loss: float) -> str:
    """Returns a loss in eight characters, however large it is."""
    return f"{loss:8.4f}" if abs(loss) < 1000 else f"{loss:8.1e}"


def clock(seconds: float) -> str:
    """Returns a duration as people say it: 42 s, 3:05, 2:03:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"


class TensorBoardLogger:
    """Writes TensorBoard's files: the settings, epochs and steps as scalars, and the preview."""

    def __init__(self, folder: Path, settings: dict, step: int):
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter  # takes a second

        self._preview, self._shown = folder / PREVIEW, 0.0
        # What a killed run has logged beyond the checkpoint that this one resumes from is not shown twice.
        self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=step + 1)
        rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
        self._writer.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}", step)

    def log(self, values: dict[str, float], step: int) -> None:
        step = int(values.get("epoch", step))  # the x axis of an epoch's values
        for name in values.keys() - {"epoch"}:
            self._writer.add_scalar(tensorboard_tag(name), values[name], step)
        if "epoch" in values:
            self._add_preview(step)
            self._writer.flush()

    def _add_preview(self, epoch: int) -> None:
        """Adds the newest preview, which may be of an earlier epoch, once."""
        changed = self._preview.stat().st_mtime if self._preview.exists() else self._shown
        if changed != self._shown and (picture := cv2.imread(str(self._preview))) is not None:
            self._writer.add_image("preview", picture[..., ::-1], epoch, dataformats="HWC")
            self._shown = changed

    def close(self) -> None:
        self._writer.close()


def check_tensorboard() -> None:
    """Raises a UserError if TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard")


def tensorboard_tag(name: str) -> str:
    """Returns the tag of a value: training and validation share a chart."""
    split, _, metric = name.partition("_")
    if name.startswith("step/"):
        return name
    return f"{metric}/{split}" if split in ("train", "val") else f"run/{name}"


class DataTimer:
    """Adds up how long the device has waited for data.

    A CPU runs ahead of its GPU, and its own waiting costs nothing while the GPU has work. So a GPU records events at
    the end of a step and at the arrival of the next batch; it is asked for the times, never waited for.
    """

    def __init__(self, device: torch.device):
        self._is_cuda, self._seconds = device.type == "cuda", 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Times a block that waits for a batch and gives the device no work."""
        start = self._now()
        yield
        if self._is_cuda:
            self._events.append((start, self._now()))
        else:
            self._seconds += self._now() - start

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Returns the seconds so far, on a GPU as far as it has come."""
        while self._events and self._events[0][1].query():
            start, end = self._events.popleft()
            self._seconds += start.elapsed_time(end) / 1000
        return self._seconds


class Progress:
    """Iterates over an epoch's batches with a progress bar, and is a logger of the step's values next to it."""

    LINE_SECONDS = 60  # between two lines where the output is a file, which a bar would fill

    def __init__(
        self, loader: DataLoader, label: str, visible: bool, first: int = 0, device: torch.device | str = "cpu"
    ):
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=len(loader), initial=first, desc=label, disable=not (visible and is_terminal), leave=False,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {remaining}{postfix}",
        )  # fmt: skip
        self._label, self._total, self._prints_lines = label, len(loader), visible and not is_terminal
        self._start = self._last_line = time.perf_counter()
        self._timer, self._images, self._batch = DataTimer(torch.device(device)), 0, first

    def track(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """Yields the batches, and times how long each is waited for."""
        while True:
            with self._timer.waiting():
                batch = next(batches, None)
            if batch is None:
                self._bar.close()
                return
            self._batch += 1
            self._images += len(batch)
            yield batch
            self._bar.update()

    def log(self, values: dict[str, float], step: int) -> None:
        named = {name.removeprefix("step/"): value for name, value in values.items()}
        lr = named.pop("learning_rate")
        _, rate, waiting = self.speed().values()
        losses = " ".join(f"{name} {value:.3g}" for name, value in named.items())
        text = f"{losses} lr {lr:.1e} {rate:.3g} img/s wait {waiting:.0%}"
        self._bar.set_postfix_str(text, refresh=False)
        if self._prints_lines and time.perf_counter() - self._last_line > self.LINE_SECONDS:
            self._last_line = time.perf_counter()
            print(f"{self._label} step {self._batch}/{self._total} {text}", flush=True)

    def close(self) -> None:
        self._bar.close()

    def speed(self, processes: int = 1) -> dict[str, float]:
        """Returns seconds so far, images per second of all processes, fraction of the time spent waiting for data."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rate = self._images / seconds * processes
        return {"seconds": seconds, "images_per_second": rate, "data_wait": self._timer.seconds() / seconds}
