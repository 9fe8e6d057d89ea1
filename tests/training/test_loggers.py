"""Where metrics go: the history, the console's table, TensorBoard, and the progress bar by a clock of our own."""

from __future__ import annotations

import io
import sys
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from tiny_runs import history

from training import loggers
from training.loggers import ConsoleLogger, CsvLogger, Progress, build_loggers, clock, log_all
from utils import UserError

SETTINGS = {"tensorboard": False, "num_epochs": 12, "best_metric": "iou", "encoder": "resnet18"}
STEP = {"step/loss": 0.5, "step/colour": 0.25, "step/learning_rate": 1e-4}


def row(epoch: int = 1, loss: float = 0.5, score: float = 0.5, **more: float) -> dict[str, float]:
    """An epoch's row as a training makes it."""
    metrics = {"loss": loss, "iou": score, "dice": score, "colour_loss": 0.25, "global_iou": score}
    speed = {"learning_rate": 1e-4, "decoder_learning_rate": 1e-3, "seconds": 7.5, "images_per_second": 9.5,
             "data_wait": score, "skipped_steps": 0}  # fmt: skip
    unreadable = {"train_unreadable": 0, "val_unreadable": 0}
    return loggers.history_row(epoch, metrics | speed, metrics, unreadable) | {"best": 0} | more


def test_a_failing_logger_is_named_and_removed_unless_a_disk_is_full(capsys):
    bad, full, good = Mock(), Mock(spec=CsvLogger), Mock()
    bad.log.side_effect = ValueError("no account\nmore")
    full.log.side_effect = OSError(28, "No space left on device", "history.csv")
    run_loggers = [bad, full, good]
    for step in (1, 2):
        log_all(run_loggers, {"a": 1.0}, step)
    assert run_loggers == [full, good]
    assert [call.args for call in good.log.mock_calls] == [({"a": 1.0}, 1), ({"a": 1.0}, 2)]
    full_line = "history.csv cannot be written: No space left on device: the training goes on"
    bad_line = "Mock cannot be written: no account: the training goes on"
    assert capsys.readouterr().out.splitlines() == [bad_line, full_line, full_line]


def test_the_history_has_the_columns_that_others_rely_on():
    columns = [*row(unreadable=3)]
    assert columns[:9] == ["epoch", "train_loss", "train_iou", "train_dice", "val_loss", "val_iou", "val_dice",
                           "learning_rate", "seconds"]  # fmt: skip
    assert {"train_global_iou", "val_global_iou", "val_colour_loss", "skipped_steps", "val_unreadable"} < {*columns}


def test_a_resumed_history_goes_on_after_the_checkpoints_epochs(tmp_path):
    path = tmp_path / "history.csv"
    first = CsvLogger(path, [])
    for epoch in (1, 2, 3):
        first.log(row(epoch), epoch)
        first.log(STEP, epoch)
    resumed = CsvLogger(path, [row(1), row(2)])
    resumed.log(row(3, score=0.75), 3)
    rows = history(tmp_path)
    assert [(line["epoch"], line["val_iou"]) for line in rows] == [("1", "0.5"), ("2", "0.5"), ("3", "0.75")]
    assert {name: float(value) for name, value in rows[0].items()} == pytest.approx(row(1), rel=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == ["history.csv"]


@pytest.mark.parametrize(
    ("values", "num_epochs"),
    [
        (row(1, 0.0, 0.0, seconds=3), 12), (row(100, 1.23456, 0.987654, learning_rate=1e-12, seconds=3599), 100),
        (row(999, 999.99994, 1.0, learning_rate=10.0, seconds=35999), 999), (row(7, float("nan"), seconds=59.7), 100),
        (row(999, 3e38, 1.0, learning_rate=9.99e-10, seconds=35999), 999), (row(1, float("inf")), 9),
    ],
)  # fmt: skip
def test_a_line_stands_under_its_head(values, num_epochs):
    line, head = loggers.table_line(values, num_epochs), ConsoleLogger.HEAD
    assert [i for i, sign in enumerate(line) if sign == "|"] == [i for i, sign in enumerate(head) if sign == "|"]
    assert len(line) == len(head)
    for word, value in (("IoU", f"{values['val_iou']:.3f}"), ("Dice", f"{values['val_dice']:.3f}")):
        assert line[head.rindex(word) - 2 :].split()[0] == value


def test_the_console_marks_the_best_epochs_and_says_what_went_wrong(tmp_path, capsys):
    console = ConsoleLogger(tmp_path, SETTINGS)
    console.log(STEP, 1)
    for epoch, best in ((2, 0), (3, 1), (4, 0)):
        console.log(row(epoch, best=best), epoch)
    assert [line.endswith(" *") for line in capsys.readouterr().out.splitlines()] == [False, True, False]
    console.log(row(5, skipped_steps=1, train_unreadable=2, val_unreadable=1), 5)
    said = capsys.readouterr().out
    assert f"2 replaced, 1 left out of the validation ({tmp_path / loggers.SKIPPED})" in said
    assert said.endswith("gradient, skipped: 1\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (185, "3:05"), (3599.6, "1:00:00"), (360000, "100:00:00")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_without_tensorboard_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"--tensorboard .* pip install tensorboard$"):
        loggers.check_tensorboard()


def test_tensorboard_reads_steps_epochs_settings_and_the_preview(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert len(build_loggers(tmp_path, SETTINGS, [], 0)) == 2
    preview = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "preview.png"), preview)
    for done, steps in ((0, (12, 24)), (12, (13,))):  # killed after step 24, and resumed from a checkpoint of step 12
        board = build_loggers(tmp_path, SETTINGS | {"tensorboard": True}, [], done)[-1]
        for step in steps:
            board.log(STEP, step)
    board.log({"epoch": 1, "val_iou": 0.5, "train_iou": 0.25, "seconds": 9.0}, 13)
    board.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for tag, values in (("step/loss", [(12, 0.5), (13, 0.5)]), ("iou/val", [(1, 0.5)]), ("iou/train", [(1, 0.25)]),
                        ("run/seconds", [(1, 9.0)])):  # fmt: skip
        assert [(event.step, event.value) for event in events.Scalars(tag)] == values
    (image,) = events.Images("preview")
    assert np.array_equal(cv2.imdecode(np.frombuffer(image.encoded_image_string, np.uint8), cv2.IMREAD_COLOR), preview)
    assert b"| encoder | resnet18 |" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


class Clock:
    """A clock that goes on only when told."""

    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(loggers, "time", clock)
    return clock


def slow_batches(time: Clock, count: int, seconds: float, images: int = 8):
    for _ in range(count):
        time.now += seconds
        yield torch.zeros(images, 1)


def test_speed_and_waiting_go_by_the_clock(time):
    progress = Progress([None] * 5, "epoch", visible=False)
    for _ in progress.track(slow_batches(time, 5, 3.0)):
        time.now += 1.0
    assert progress.speed() == {"seconds": 20, "images_per_second": 2, "data_wait": 0.75}
    assert progress.speed(processes=3)["images_per_second"] == 6


def test_what_a_gpu_waits_for_is_not_what_the_cpu_waits_for(time, monkeypatch):
    free_at = [0.0]  # the GPU works off what it is given, beside the CPU

    class Event:
        def __init__(self, enable_timing: bool):
            pass

        def record(self) -> None:
            self.at = max(time.now, free_at[0])

        def query(self) -> bool:
            return time.now >= self.at

        def elapsed_time(self, later: Event) -> float:
            assert later.query()  # PyTorch refuses it before
            return 1000 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    # Five batches, a second of the CPU for each step and 4 s of the GPU. Where loading takes 2 s it waits for the first
    # alone, and the CPU for 10 of the 22 s; where it takes 5 s, for the first 5 s and then for 2 after each.
    for loading, seconds, waited in ((2.0, 22, 2.0), (5.0, 33, 13.0)):
        progress = Progress([None] * 5, "epoch", visible=False, device="cuda:0")
        for _ in progress.track(slow_batches(time, 5, loading)):
            free_at[0] = max(time.now, free_at[0]) + 4
            time.now += 1.0
            assert 0 <= progress.speed()["data_wait"] <= 1  # asked for in between it counts nothing twice
        time.now = max(time.now, free_at[0])  # as the epoch's metrics are fetched
        assert progress.speed()["seconds"] == seconds
        assert progress.speed()["data_wait"] == pytest.approx(waited / seconds)


def five_minutes(time: Clock, visible: bool) -> None:
    progress = Progress([None] * 32, "epoch 2/9", visible, first=2)
    for _ in progress.track(slow_batches(time, 30, 10.0, images=20)):
        progress.log(STEP, 1)
    progress.close()


def test_a_file_gets_a_line_a_minute_at_most_and_of_rank_0_alone(time, capsys):
    five_minutes(time, visible=True)
    lines = capsys.readouterr().out.splitlines()
    assert 3 <= len(lines) <= 5
    assert lines[0] == "epoch 2/9 step 9/32 loss 0.5 colour 0.25 lr 1.0e-04 2 img/s wait 100%"
    five_minutes(time, visible=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("visible", [True, False])
def test_a_terminal_gets_a_bar_and_no_lines(visible, time, capsys, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    five_minutes(time, visible)
    assert capsys.readouterr().out == ""
    assert ("epoch 2/9" in terminal.getvalue()) == visible
