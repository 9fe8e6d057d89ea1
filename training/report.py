"""What a run tells: the banner, the progress bar, a line an epoch, history.csv and preview.png."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from loading.index import describe_left_out
from training.checkpoints import disk_needed
from utils import atomic_write

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

    from trainer import Config, Run
    from utils import Processes

TABLE_HEAD = "  epoch | train loss   IoU  Dice | val loss   IoU  Dice |      lr    time wait"  # and a star


def banner(facts: dict[str, str]) -> str:
    """The facts of a run under one another, wrapped to the terminal: `{"data": "252 photos ...", ...}`."""
    margin, columns = max(map(len, facts)) + 2, min(shutil.get_terminal_size((100, 24)).columns, 100)
    layout = {"width": columns, "subsequent_indent": " " * margin, "break_on_hyphens": False, "break_long_words": False}
    return "\n".join(textwrap.fill(f"{name:>{margin - 2}}  {text}", **layout) for name, text in facts.items())


def describe(run: Run, config: Config, processes: Processes, train_loader: DataLoader, val_loader: DataLoader) -> str:
    """The start banner: the settings, the data found, the device, the processes, the model, the disk."""
    train, val = train_loader.dataset.dataset, val_loader.dataset.dataset
    folder = Path(config.checkpoint_dir)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    disk = disk_needed(4 * parameters, config.keep_checkpoints, config.num_epochs)
    kept = f"the {config.keep_checkpoints} newest epochs are kept" if config.keep_checkpoints else "all epochs are kept"
    settings = " ".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items())
    facts = {
        "settings": settings,
        "data": f"{len(train)} photos to train on, {len(val)} to validate, in {config.data_root}",
        "samples": f"letterboxed once, in {train.cache.path.parent}" if config.cache else "from the photos every time",
        "left out": "; ".join(f"{part.photos.name}: {describe_left_out(part.index.left_out)}" for part in (train, val)
                              if part.index.left_out),
        "device": f"{processes.device}, {precision(run.amp_dtype)}, {processes.world_size} process"
                  f"{'es' if processes.world_size > 1 else ''}, {train_loader.num_workers} workers each",
        "note": "; ".join(filter(None, [processes.note, unfinished_cycle(run.scheduler, config.num_epochs)])),
        "batch": f"{config.batch_size * config.accumulate * processes.world_size} photos a step, "
                 f"{math.ceil(len(train_loader) / config.accumulate)} steps an epoch",
        "memory": f"{config.batch_size} photos at once do not fit in the free memory of {processes.device}: "
                  f"each batch is computed in {run.parts} parts" if run.parts > 1 else "",
        "model": f"{config.encoder}, {parameters / 1e6:.1f} million parameters",
        "disk": f"up to {readable_size(disk)} of checkpoints in {folder} ({kept}), "
                f"{readable_size(shutil.disk_usage(folder).free)} free",
    }  # fmt: skip
    return banner({name: text for name, text in facts.items() if text}) + "\n" + TABLE_HEAD


def precision(dtype: torch.dtype | None) -> str:
    return str(dtype or torch.float32).removeprefix("torch.")


def unfinished_cycle(scheduler: CosineAnnealingWarmRestarts, num_epochs: int) -> str:
    """A warning where the run ends in the middle of a cosine cycle, with a learning rate that is still high."""
    end = length = scheduler.T_0
    while end < num_epochs:
        length *= scheduler.T_mult
        end += length
    if end == num_epochs:
        return ""
    ends = f"{end - length} and {end}" if end > length else end
    return f"{num_epochs} epochs end within a cosine cycle (cycles end after {ends})"


def table_line(row: dict, num_epochs: int, is_best: bool) -> str:
    """An epoch's row of history.csv as a line under `TABLE_HEAD`; a star marks the best epoch so far."""
    counter = f"{row['epoch']}/{num_epochs}"
    return (
        f"{counter:>7} |   {short(row['train_loss'])} {row['train_iou']:.3f} {row['train_dice']:.3f} "
        f"| {short(row['val_loss'])} {row['val_iou']:.3f} {row['val_dice']:.3f} | {row['learning_rate']:.1e} "
        f"{clock(row['seconds']):>7} {row['data_wait']:4.0%}{' *' if is_best else ''}"
    )


def bad_photos_line(row: dict, path: Path) -> str:
    """What an epoch's row says about photos that could not be read, as a line under it; "" if there were none."""
    said = {"train_bad_photos": "replaced", "val_bad_photos": "left out of the validation"}
    counts = [f"{row[name]} {what}" for name, what in said.items() if row[name]]
    return f"{'':7} | unreadable photos: {', '.join(counts)} ({path})" if counts else ""


def short(loss: float) -> str:
    """A loss in eight characters, whatever became of it."""
    return f"{loss:8.4f}" if abs(loss) < 1000 else f"{loss:8.1e}"


def clock(seconds: float) -> str:
    """A duration as people say it: 42 s, 3:05, 2:03:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"


def readable_size(size: float) -> str:
    """Bytes as people say them."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


class Progress:
    """Hands out a loader's batches and shows, on the main process, how fast they go.

    Args:
        loader: its length is the bar's.
        label: what the bar is of.
        visible: whether to show anything: on the main process.
        log_every: steps between two updates of the figures; each waits for the device once.
        first: batches that were done before.
    """

    SILENT_SECONDS = 60  # between two lines where the output is a file, which a bar would fill

    def __init__(self, loader: DataLoader, label: str, visible: bool, log_every: int, first: int = 0):
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=len(loader), initial=first, desc=label, disable=not (visible and is_terminal), leave=False,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {remaining}{postfix}",
        )  # fmt: skip
        self._label, self._log_every, self._steps = label, log_every, len(loader)
        self._visible, self._prints_lines = visible, not is_terminal
        self._start = self._last_line = time.perf_counter()
        self._waited, self._images, self._step = 0.0, 0, first

    def watch(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """The batches, with the time counted for which the training waits for each."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                self._bar.close()
                return
            self._step += 1
            self._images += len(batch)
            yield batch
            self._bar.update()

    def show(self, loss: Tensor, learning_rate: float) -> None:
        """Shows the figures every `log_every` steps: only then is the loss fetched from the device."""
        if not self._visible or self._step % self._log_every:
            return
        speed = f"{self.images_per_second:.3g} img/s wait {self.data_wait:.0%}"
        figures = f"loss {loss.item():.4f} lr {learning_rate:.1e} {speed}"
        self._bar.set_postfix_str(figures, refresh=False)
        if self._prints_lines and time.perf_counter() - self._last_line > self.SILENT_SECONDS:
            self._last_line = time.perf_counter()
            print(f"{self._label} step {self._step}/{self._steps} {figures}", flush=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def images_per_second(self) -> float:
        """Of this process."""
        return self._images / max(self.seconds, 1e-9)

    @property
    def data_wait(self) -> float:
        """The share of the time that went by waiting for data, 0 to 1."""
        return self._waited / max(self.seconds, 1e-9)


def history_row(epoch: int, training: dict[str, float], validation: dict[str, float]) -> dict[str, float]:
    names = ("loss", "iou", "dice")
    row = {"epoch": epoch, **{f"train_{name}": training[name] for name in names}}
    row |= {f"val_{name}": validation[name] for name in names}
    of_training = ("learning_rate", "seconds", "images_per_second", "data_wait", "skipped_steps")
    row |= {name: training[name] for name in of_training}
    terms = ("colour_loss", "bce_loss", "dice_loss", "global_iou", "precision", "recall")
    row |= {f"train_{name}": training[name] for name in terms}
    return row | {f"val_{name}": validation[name] for name in terms}


def write_history(rows: list[dict], path: Path) -> None:
    """All epochs so far as CSV, a row an epoch."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


# --- pictures ---------------------------------------------------------------------------------------------

CAPTIONS = ("photo", "truth", "prediction", "cutout")
CAPTION_HEIGHT = 24  # pixels
GAP = 4  # pixels between two pictures


def save_preview(targets: Tensor, predictions: Tensor, path: Path, labels: Sequence[str] = ()) -> None:
    """Writes a picture with a row a photo: the photo, its true mask, the predicted alpha, the cutout.

    Args:
        targets, predictions: float (N, 4, S, S) in [0, 1]: RGBA, predictions after the sigmoid.
        path: of the PNG.
        labels: a line of text under each row, or none.
    """
    targets, predictions = (_to_pixels(pictures) for pictures in (targets, predictions))
    rows = [_row(target, prediction) for target, prediction in zip(targets, predictions, strict=True)]
    width, step = rows[0].shape[1], targets.shape[1] + GAP
    captions = _text({column * step: caption for column, caption in enumerate(CAPTIONS)}, width)
    if labels:
        rows = [part for row, label in zip(rows, labels, strict=True) for part in (row, _text({0: label}, width))]
    sheet = np.vstack([captions, *rows])
    with atomic_write(path) as file:
        file.write(cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))[1].tobytes())


def _to_pixels(pictures: Tensor) -> np.ndarray:
    return (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _row(target: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    grey = [cv2.cvtColor(np.ascontiguousarray(rgba[..., 3]), cv2.COLOR_GRAY2RGB) for rgba in (target, prediction)]
    cells = [np.ascontiguousarray(target[..., :3]), *grey, on_checkerboard(prediction)]
    white = {"borderType": cv2.BORDER_CONSTANT, "value": (255, 255, 255)}
    return np.hstack([cv2.copyMakeBorder(cell, 0, GAP, 0, GAP, **white) for cell in cells])


def on_checkerboard(rgba: np.ndarray, side: int = 8) -> np.ndarray:
    """Straight RGBA, uint8 (H, W, 4), over a grey checkerboard: uint8 RGB (H, W, 3)."""
    rows, columns = np.indices(rgba.shape[:2]) // side
    ground = np.where((rows + columns) % 2, 204, 255)[..., None]
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return (rgba[..., :3] * alpha + ground * (1 - alpha)).round().astype(np.uint8)


def _text(texts: dict[int, str], width: int) -> np.ndarray:
    """A strip with a text at each of these columns."""
    strip = np.full((CAPTION_HEIGHT, width, 3), 255, np.uint8)
    for column, text in texts.items():
        origin = (column + 4, CAPTION_HEIGHT - 7)
        cv2.putText(strip, text, origin, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (40, 40, 40), 1, cv2.LINE_AA)
    return strip
