"""What a run tells: figures against a clock and numbers of our own, pictures pixel by pixel."""

from __future__ import annotations

import csv
import io
import sys

import cv2
import numpy as np
import pytest
import torch

import trainer
from training import report
from training.report import TABLE_HEAD, Progress, clock, on_checkerboard, readable_size, save_preview, table_line

CONTRACT = [
    *("epoch", "train_loss", "train_iou", "train_dice", "val_loss", "val_iou", "val_dice"),
    *("learning_rate", "seconds"),
]


# --- figures in writing -----------------------------------------------------------------------------------


def read_csv(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_history_reads_back_equal(tmp_path):
    rows = [
        {"epoch": 1, "val_iou": 0.5, "learning_rate": 1e-4, "seconds": 12.25},
        {"epoch": 2, "val_iou": 1 / 3, "learning_rate": 1.23456e-17, "seconds": 1e7},
    ]
    report.write_history(rows[:1], tmp_path / "history.csv")
    report.write_history(rows, tmp_path / "history.csv")
    back = read_csv(tmp_path / "history.csv")
    assert [row["epoch"] for row in back] == ["1", "2"]
    for row, written in zip(back, rows, strict=True):
        assert {name: float(value) for name, value in row.items()} == pytest.approx(written, rel=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]


def test_history_has_the_columns_others_rely_on(tmp_path):
    metrics = ["loss", "iou", "dice", "colour_loss", "bce_loss", "dice_loss", "global_iou", "precision", "recall"]
    training = {name: 0.5 + place / 64 for place, name in enumerate(metrics)}
    speed = {"learning_rate": 0.001, "seconds": 7.5, "images_per_second": 9.5, "data_wait": 0.25, "skipped_steps": 0}
    validation = {name: value / 8 for name, value in training.items()}
    report.write_history([trainer.history_row(3, training | speed, validation)], tmp_path / "history.csv")
    row = read_csv(tmp_path / "history.csv")[0]
    assert list(row)[: len(CONTRACT)] == CONTRACT
    expected = {"epoch": 3, **speed, **{f"train_{name}": training[name] for name in metrics}}
    expected |= {f"val_{name}": validation[name] for name in metrics}
    assert {name: float(value) for name, value in row.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (42.4, "42 s"), (59.4, "59 s"), (59.6, "1:00"), (185, "3:05"), (3599.4, "59:59"),
        (3599.6, "1:00:00"), (7385, "2:03:05"), (360000, "100:00:00"),
    ],
)  # fmt: skip
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"), (999, "999 bytes"), (1000, "1 KB"), (1500, "1.5 KB"), (168_027_175, "168 MB"),
        (1.062e9, "1.06 GB"), (68.8e9, "68.8 GB"), (1.5e12, "1.5 TB"), (999_400, "999 KB"), (999_999, "1 MB"),
    ],
)  # fmt: skip
def test_readable_size(size, text):
    assert readable_size(size) == text


def row(epoch: int, loss: float, share: float, rate: float, seconds: float) -> dict:
    figures = {f"{part}_{name}": share for part in ("train", "val") for name in ("iou", "dice")}
    losses = {"train_loss": loss, "val_loss": loss}
    return {"epoch": epoch, **figures, **losses, "learning_rate": rate, "seconds": seconds, "data_wait": share}


@pytest.mark.parametrize(
    ("line", "num_epochs"),
    [
        (row(1, 0.0, 0.0, 1e-4, 3), 12),
        (row(100, 1.23456, 0.987654, 1e-12, 3599), 100),
        (row(999, 999.99994, 1.0, 10.0, 35999), 999),
        (row(7, float("nan"), 0.5, 0.0, 59.7), 100),
    ],
)
def test_a_line_stands_under_its_head(line, num_epochs):
    text = table_line(line, num_epochs, False)
    bars = [place for place, sign in enumerate(TABLE_HEAD) if sign == "|"]
    assert [place for place, sign in enumerate(text) if sign == "|"] == bars
    assert len(text) == len(TABLE_HEAD)
    for word, value in (("IoU", f"{line['val_iou']:.3f}"), ("Dice", f"{line['val_dice']:.3f}")):
        assert text[TABLE_HEAD.rindex(word) - 2 :].split()[0] == value
    assert table_line(line, num_epochs, True).endswith(" *")


@pytest.mark.parametrize("loss", [99999.0, float("inf"), float("nan"), 3e38])
def test_a_line_fits_the_screen(loss):
    assert len(table_line(row(9999, loss, 1.0, 9.99e-10, 359999), 10000, True)) <= 100


# --- progress ---------------------------------------------------------------------------------------------


class Clock:
    """A clock that goes on only when told."""

    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(report, "time", clock)
    return clock


def slow_batches(time: Clock, count: int, seconds: float, images: int = 8):
    for _ in range(count):
        time.now += seconds
        yield torch.zeros(images, 1)


def test_speed_and_waiting_are_told_by_the_clock(time):
    progress = Progress([None] * 5, "epoch", False, 1)
    seen = 0
    for batch in progress.watch(slow_batches(time, 5, 3.0)):
        time.now += 1.0
        seen += len(batch)
    assert seen == 40
    assert progress.seconds == 20
    assert progress.images_per_second == 2
    assert progress.data_wait == 0.75


class FakeLoss:
    fetched = 0

    def item(self) -> float:
        self.fetched += 1
        return 0.5


def test_the_loss_is_fetched_every_log_every_steps_only(time):
    progress, loss = Progress([None] * 9, "epoch", True, 3), FakeLoss()
    fetched = []
    for _ in progress.watch(slow_batches(time, 9, 0.1)):
        progress.show(loss, 1e-4)
        fetched.append(loss.fetched)
    assert fetched[-1] == 3
    assert np.bincount(fetched)[1:-1].tolist() == [3, 3]  # evenly


def test_the_loss_is_not_fetched_where_nothing_is_shown(time):
    progress, loss = Progress([None] * 9, "epoch", False, 3), FakeLoss()
    for _ in progress.watch(slow_batches(time, 9, 0.1)):
        progress.show(loss, 1e-4)
    assert loss.fetched == 0


def lines_of_five_minutes(time, visible: bool, capsys) -> list[str]:
    progress = Progress([None] * 30, "epoch 2/9", visible, 1)
    for _ in progress.watch(slow_batches(time, 30, 10.0)):
        progress.show(FakeLoss(), 1e-4)
    return capsys.readouterr().out.splitlines()


def test_into_a_file_goes_a_line_a_minute_at_most(time, capsys):
    lines = lines_of_five_minutes(time, True, capsys)
    assert 3 <= len(lines) <= 5
    assert all("epoch 2/9" in line and "/30 " in line and "loss 0.5" in line for line in lines)


def test_other_processes_are_silent(time, capsys):
    assert lines_of_five_minutes(time, False, capsys) == []
    assert capsys.readouterr().err == ""


def test_a_line_counts_the_step_it_tells_of(time, capsys):
    progress = Progress([None] * 2, "epoch", True, 1)
    for _ in progress.watch(slow_batches(time, 2, 70.0, images=70)):
        progress.show(FakeLoss(), 1e-4)
    first, second = capsys.readouterr().out.splitlines()
    assert "step 1/2" in first
    assert "1 img/s" in first
    assert "step 2/2" in second


@pytest.mark.parametrize("visible", [True, False])
def test_a_terminal_gets_a_bar_and_no_lines(visible, time, capsys, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert lines_of_five_minutes(time, visible, capsys) == []
    assert ("epoch 2/9" in terminal.getvalue()) == visible


# --- pictures ---------------------------------------------------------------------------------------------

SIDE, GAP, HEAD = 32, 4, 24  # pixels


def preview(tmp_path, targets: torch.Tensor, predictions: torch.Tensor) -> np.ndarray:
    save_preview(targets, predictions, tmp_path / "preview.png")
    return cv2.imread(str(tmp_path / "preview.png"), cv2.IMREAD_UNCHANGED)[..., ::-1]


def cell(sheet: np.ndarray, line: int, column: str) -> np.ndarray:
    left = ["photo", "truth", "prediction", "cutout"].index(column) * (SIDE + GAP)
    top = HEAD + line * (SIDE + GAP)
    return sheet[top : top + SIDE, left : left + SIDE]


def rgba(alpha, colour=(1.0, 0.0, 0.0)) -> torch.Tensor:
    picture = torch.tensor([*colour, 0.0]).view(4, 1, 1).repeat(1, SIDE, SIDE)
    picture[3] = torch.as_tensor(alpha)
    return picture


def test_preview_shows_photo_and_mask_as_they_are(tmp_path):
    mask = torch.zeros(SIDE, SIDE)
    mask[5:20, 8:11] = 1
    targets = torch.stack([rgba(mask), rgba(1.0, (0.0, 0.2, 1.0))])
    sheet = preview(tmp_path, targets, targets.flip(0))
    assert sheet.shape == (HEAD + 2 * (SIDE + GAP), 4 * (SIDE + GAP), 3)
    assert (cell(sheet, 0, "photo") == (255, 0, 0)).all()
    assert (cell(sheet, 1, "photo") == (0, 51, 255)).all()
    assert np.array_equal(cell(sheet, 0, "truth"), np.repeat(mask.numpy()[..., None] * 255, 3, axis=2))
    assert (cell(sheet, 1, "truth") == 255).all()
    assert (cell(sheet, 0, "prediction") == 255).all()


@pytest.mark.parametrize(("alpha", "grey"), [(0.0, {0}), (0.3, {76, 77}), (0.6, {153}), (1.0, {255})])
def test_the_predicted_alpha_is_not_stretched(alpha, grey, tmp_path):
    dark = (0.1, 0.0, 0.0)  # so that nothing but the alpha is bright
    shown = cell(preview(tmp_path, rgba(1.0)[None], rgba(alpha, dark)[None]), 0, "prediction")
    assert set(shown.ravel().tolist()) <= grey


def test_the_predicted_alpha_is_not_thresholded(tmp_path):
    ramp = torch.linspace(0, 1, SIDE).expand(SIDE, SIDE)
    shown = cell(preview(tmp_path, rgba(1.0)[None], rgba(ramp)[None]), 0, "prediction")
    assert np.abs(shown[0, :, 0] - np.linspace(0, 255, SIDE)).max() <= 0.51


def test_the_cutout_lies_on_a_checkerboard(tmp_path):
    picture = np.zeros((16, 16, 4), np.uint8)
    picture[..., :3] = (200, 100, 0)
    # By hand, on white (255) and on grey (204): 128 / 255 of the colour and 127 / 255 of the ground.
    by_hand = {
        0: ((255, 255, 255), (204, 204, 204)),
        255: ((200, 100, 0), (200, 100, 0)),
        128: ((227, 177, 127), (202, 152, 102)),
    }
    for alpha, (on_white, on_grey) in by_hand.items():
        picture[..., 3] = alpha
        shown = on_checkerboard(picture)
        assert (shown[:8, :8] == on_white).all()
        assert (shown[8:, 8:] == on_white).all()
        assert (shown[:8, 8:] == on_grey).all()
        assert (shown[8:, :8] == on_grey).all()
    cutout = cell(preview(tmp_path, rgba(1.0)[None], rgba(0.0)[None]), 0, "cutout")
    assert set(cutout.ravel().tolist()) == {204, 255}
    own = cell(preview(tmp_path, rgba(1.0, (0.0, 0.0, 1.0))[None], rgba(1.0)[None]), 0, "cutout")
    assert (own == (255, 0, 0)).all()  # the prediction's colours


def test_the_banner_lines_up_its_facts():
    lines = report.banner({"data": "10 photos", "device": "cpu"}).splitlines()
    assert [line.index(text) for line, text in zip(lines, ("10 photos", "cpu"), strict=True)] == [8, 8]
