"""The pictures of a run: curves of any history, and photos pixel by pixel."""

from __future__ import annotations

import math
from pathlib import Path
from unittest.mock import Mock

import cv2
import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from training import pictures
from utils import UserError


def history(*ious: float, lrs: tuple[float, ...] = (), loss: float = 1.0, **more: float) -> list[dict]:
    """Returns an epoch for each value of the validation's IoU; its global IoU is the opposite."""
    same = {f"{split}_{name}": loss for split in ("train", "val") for name in ("loss", "colour_loss", "bce_loss")}
    same |= {"train_iou": 0.5, "train_dice": 0.5, "decoder_learning_rate": 1e-3}
    scores = [{"val_iou": iou, "val_dice": iou, "val_global_iou": 1 - iou} for iou in ious]
    rates = lrs or [1e-4] * len(ious)
    return [{"epoch": n + 1, **same, **scores[n], "learning_rate": rates[n], **more} for n in range(len(ious))]


@pytest.mark.parametrize(
    "rows",
    [history(0.1, math.nan, 0.3, lrs=(1e-4, 0.0, 1e-4)), history(math.nan, math.nan, loss=math.inf),
     history(0.0, loss=0.0) + history(0.2, 0.2, val_new_loss=0.1)[1:]],  # a term added later
)  # fmt: skip
def test_any_history_becomes_a_picture_without_the_users_configuration(rows, tmp_path, recwarn):
    with matplotlib.rc_context({"figure.facecolor": "red"}):
        pictures.save_curves(rows, tmp_path / "curves.png")
        assert matplotlib.rcParams["figure.facecolor"] == "red"
    picture = cv2.imread(str(tmp_path / "curves.png"))
    assert picture.shape == (1125, 1650, 3)
    assert (picture[0, 0] == 255).all()
    assert len({tuple(colour) for colour in picture[::5, ::5].reshape(-1, 3).tolist()}) > 10
    assert not recwarn


@pytest.mark.parametrize(
    ("metric", "best", "title"),
    [("iou", (2, 0.4), "best epoch by validation IoU: 2 of 5 (IoU 0.400, Dice 0.400)"),
     ("global_iou", (3, 0.9), "best epoch by validation global IoU: 3 of 5 (IoU 0.100, Dice 0.100, global IoU 0.900)")],
)  # fmt: skip
def test_the_best_epoch_by_a_metric_and_restarts_are_marked(metric, best, title):
    rows = history(math.nan, 0.4, 0.1, 0.4, 0.2, lrs=(3e-4, 1e-4, 3e-4, 2e-4, 2e-4))
    figure = Figure()
    pictures.draw_curves(figure, rows, metric)
    assert pictures.best_row(rows, metric)["epoch"] == best[0]
    assert figure.get_suptitle() == title
    lines = figure.axes[1].get_lines()
    assert [line.get_xydata().tolist() for line in lines if line.get_marker() == "*"] == [[[*best]]]
    assert [line.get_xdata()[0] for line in lines if len(line.get_xdata()) == 2] == [best[0], 2]  # after which it rose


def test_curves_that_cannot_be_drawn_leave_the_picture_before(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"before")
    monkeypatch.setattr(pictures, "draw_curves", Mock(side_effect=[OSError, RuntimeError("no such font\nat all")]))
    with pytest.raises(OSError, match=r"^$"):
        pictures.save_curves(history(0.5), path)
    with pytest.raises(UserError, match=r"curves.png cannot be drawn: no such font$"):
        pictures.save_curves(history(0.5), path)
    assert path.read_bytes() == b"before"


SIDE, GAP, HEAD = 32, 4, 24  # pixels


def cell(path: Path, row: int, column: int) -> np.ndarray:
    top, left = HEAD + row * (SIDE + GAP), column * (SIDE + GAP)
    return cv2.imread(str(path))[top : top + SIDE, left : left + SIDE, ::-1]


def test_a_sheet_shows_photo_truth_alpha_and_cutout_on_a_checkerboard_in_rows(tmp_path):
    targets, predictions = torch.zeros(2, 2, 4, SIDE, SIDE)
    targets[0, 0] = predictions[1, 0] = 1  # red
    targets[0, 3, 5:20, 8:11] = 1
    targets[1, 2] = 1
    predictions[1, 3] = torch.linspace(0, 1, SIDE)  # neither stretched nor thresholded
    path = tmp_path / "sheet.png"
    pictures.save_sheet(targets, predictions, path)
    assert cv2.imread(str(path)).shape == (HEAD + 2 * (SIDE + GAP), 4 * (SIDE + GAP), 3)
    assert (cell(path, 1, 0) == (0, 0, 255)).all()
    assert np.array_equal(cell(path, 0, 1), targets[0, [3, 3, 3]].permute(1, 2, 0) * 255)
    alpha, ground, cutout = cell(path, 1, 2), cell(path, 0, 3), cell(path, 1, 3)
    assert np.abs(alpha[..., 0] - np.linspace(0, 255, SIDE)).max() <= 0.51
    for row, column in np.ndindex(4, 4):  # nothing but the checkerboard
        assert (ground[8 * row :, 8 * column :][:8, :8] == (204 if (row + column) % 2 else 255)).all()
    by_hand = (alpha / 255) * (255, 0, 0) + (1 - alpha / 255) * ground  # the prediction's colours
    assert np.abs(cutout - by_hand).max() <= 0.51
    pictures.save_sheet(targets, targets, path, ("first", "second"))
    assert (cv2.imread(str(path))[2 * HEAD :][:SIDE, :SIDE] == (0, 0, 255)).all()  # the first photo, BGR


def test_a_preview_is_of_the_same_few_photos_and_in_eval_mode():
    class Inverted(torch.nn.Module):
        def predict(self, images: torch.Tensor) -> torch.Tensor:
            assert not self.training
            return torch.cat([1 - images, images[:, :1]], dim=1)

    class Photos(list):
        shown = staticmethod(int)
        own_pixels = staticmethod(lambda indices: (torch.arange(32) < 30).expand(len(indices), 32, 32))

    photos = Photos(torch.full((4, 32, 32), number, dtype=torch.uint8) for number in range(51))
    targets, predictions = pictures.preview(Inverted(), photos, torch.device("cpu"), None)
    assert not (targets + predictions)[..., 30:].any()  # bars
    assert (targets[:, :, 0, 29] * 255).tolist() == [[number] * 4 for number in (0, 10, 20, 30, 40, 50)]
    assert torch.equal(predictions[:, :3, :, :30], 1 - targets[:, :3, :, :30])
    assert len(pictures.preview(Inverted(), Photos(photos[:2]), torch.device("cpu"), None)[0]) == 2
