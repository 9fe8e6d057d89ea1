"""What a run shows: a few photos with their true mask, the predicted alpha and the cutout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from loading.unreadable import TolerantDataset
from training.run import Run
from training.step import autocast, to_device
from utils import atomic_write

PREVIEW_PHOTOS = 6
CAPTIONS = ("photo", "truth", "prediction", "cutout")
CAPTION_HEIGHT = 24  # pixels
GAP = 4  # pixels between two pictures


@torch.inference_mode()
def preview(run: Run, dataset: TolerantDataset) -> tuple[Tensor, Tensor]:
    """The same few validation photos every time, or the next ones that can be read: what `save_sheet` shows of them.

    Returns:
        targets, predictions: float (N, 4, S, S) on the CPU.
    """
    chosen = np.linspace(0, len(dataset) - 1, min(PREVIEW_PHOTOS, len(dataset)), dtype=int)
    images, target = to_device(torch.stack([dataset[int(index)] for index in chosen]), run.device)
    model = run.evaluated.eval()
    with autocast(run.device, run.amp_dtype):  # one at a time: they may be more than the memory holds at once
        return target.cpu(), torch.cat([model.predict(image) for image in images.split(1)]).cpu()


def save_sheet(targets: Tensor, predictions: Tensor, path: Path, labels: Sequence[str] = ()) -> None:
    """Writes a picture with a row a photo: the photo, its true mask, the predicted alpha, the cutout.

    Args:
        targets, predictions: float (N, 4, S, S) in [0, 1]: RGBA, predictions after the sigmoid.
        path: of the PNG.
        labels: a line of text above each row, or none.
    """
    targets, predictions = (_to_pixels(pictures) for pictures in (targets, predictions))
    rows = [_row(target, prediction) for target, prediction in zip(targets, predictions, strict=True)]
    width, step = rows[0].shape[1], targets.shape[1] + GAP
    captions = _text({column * step: caption for column, caption in enumerate(CAPTIONS)}, width)
    if labels:
        rows = [part for row, label in zip(rows, labels, strict=True) for part in (_text({0: label}, width), row)]
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
