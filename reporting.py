"""What a run tells: the banner, the progress bar, a line an epoch, history.csv and preview.png."""

from __future__ import annotations

import csv
import io
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpointing import atomic_write

TABLE_HEAD = "  epoch | train loss   IoU  Dice | val loss   IoU  Dice |      lr    time wait"  # and a star


def banner(facts: dict[str, str]) -> str:
    """The facts of a run under one another, wrapped to the terminal: `{"data": "252 photos ...", ...}`."""
    margin, columns = max(map(len, facts)) + 2, min(shutil.get_terminal_size((100, 24)).columns, 100)
    layout = {"width": columns, "subsequent_indent": " " * margin, "break_on_hyphens": False, "break_long_words": False}
    return "\n".join(textwrap.fill(f"{name:>{margin - 2}}  {text}", **layout) for name, text in facts.items())


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
    """

    SILENT_SECONDS = 60  # between two lines where the output is a file, which a bar would fill

    def __init__(self, loader: DataLoader, label: str, visible: bool, log_every: int):
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=len(loader), desc=label, disable=not (visible and is_terminal), leave=False, dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {remaining}{postfix}",
        )  # fmt: skip
        self._label, self._log_every, self._steps = label, log_every, len(loader)
        self._visible, self._prints_lines = visible, not is_terminal
        self._start = self._last_line = time.perf_counter()
        self._waited, self._images, self._step = 0.0, 0, 0

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
