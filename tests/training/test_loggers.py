"""Where metrics go: the history, the console's table, TensorBoard, and the progress bar by a clock of our own."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from tiny_runs import history

from training import loggers
from training.loggers import ConsoleLogger, CsvLogger, Progress, build_loggers, log_all
from utils import UserError

SETTINGS = {"tensorboard": False, "num_epochs": 12, "best_metric": "iou", "encoder": "resnet18"}
STEP = {"step/loss": 0.5, "step/colour": 0.25, "step/learning_rate": 1e-4}


def row(epoch: int = 1, loss: float = 0.5, score: float = 0.5, **more: float) -> dict[str, float]:
    metrics = {"loss": loss, "iou": score, "dice": score, "colour_loss": 0.25, "global_iou": score}
    run = dict.fromkeys(loggers.RUN_COLUMNS, 0) | {"learning_rate": 1e-4, "seconds": 7.5, "data_wait": score}
    unreadable = {"train_unreadable": 0, "val_unreadable": 0}
    return loggers.history_row(epoch, metrics | run, metrics, unreadable) | {"best": 0} | more


def test_a_failing_logger_is_named_and_removed_unless_a_disk_is_full(capsys):
    bad, full, good = Mock(), Mock(spec=CsvLogger), Mock()
    bad.log.side_effect = ValueError("no account\nmore")
    full.log.side_effect = OSError(28, "No space left on device", "history.csv")
    run_loggers = [bad, full, good]
    log_all(run_loggers, {"a": 1.0}, 1)
    assert run_loggers == [full, good]
    good.log.assert_called_once_with({"a": 1.0}, 1)
    said = ("Mock cannot be written: no account", "history.csv cannot be written: No space left on device")
    assert capsys.readouterr().out.splitlines() == [f"{line}: the training goes on" for line in said]


def test_a_resumed_history_goes_on_after_the_checkpoints_epochs_in_the_usual_columns(tmp_path):
    (tmp_path / "history.csv").write_text("of a run that had done three epochs")
    resumed = CsvLogger(tmp_path / "history.csv", [row(1), row(2)])
    resumed.log(row(3, score=0.75), 3)
    resumed.log(STEP, 4)
    rows = history(tmp_path)
    assert [(line["epoch"], line["val_iou"]) for line in rows] == [("1", "0.5"), ("2", "0.5"), ("3", "0.75")]
    assert {name: float(value) for name, value in rows[0].items()} == pytest.approx(row(1), rel=1e-5)
    assert [*rows[0]][:9] == ["epoch", "train_loss", "train_iou", "train_dice", "val_loss", "val_iou", "val_dice",
                              "learning_rate", "seconds"]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "num_epochs", "time"),
    [(row(7, float("nan"), seconds=59.4), 100, "59 s"), (row(1, float("inf"), 0.0, seconds=59.6), 9, "1:00"),
     (row(999, 999.99994, 1.0, learning_rate=10.0, seconds=35999), 999, "9:59:59"),
     (row(999, 3e38, 1.0, learning_rate=9.99e-10, seconds=3599.6), 999, "1:00:00")],
)  # fmt: skip
def test_a_line_stands_under_its_head(values, num_epochs, time):
    line, head = loggers.table_line(values, num_epochs), ConsoleLogger.HEAD
    assert [i for i, sign in enumerate(line) if sign == "|"] == [i for i, sign in enumerate(head) if sign == "|"]
    assert len(line) == len(head)
    for word, value in (("IoU", f"{values['val_iou']:.3f}"), ("Dice", f"{values['val_dice']:.3f}"), ("time", time)):
        assert line[: head.rindex(word) + len(word)].endswith(f" {value}")


def test_the_console_says_how_many_steps_were_skipped(tmp_path, capsys):
    console = ConsoleLogger(tmp_path, SETTINGS)
    console.log(STEP, 1)
    console.log(row(skipped_steps=1), 2)
    assert [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()[1:]] == ["1"]


def test_without_tensorboard_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"--tensorboard .* pip install tensorboard$"):
        loggers.check_tensorboard()


def test_tensorboard_reads_steps_epochs_settings_and_the_preview(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
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


@pytest.fixture
def time(monkeypatch) -> SimpleNamespace:
    """A clock that goes on only when `now` is told to."""
    clock = SimpleNamespace(now=1000.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(loggers, "time", clock)
    return clock


def slow_batches(time: SimpleNamespace, count: int, seconds: float, images: int = 8):
    for _ in range(count):
        time.now += seconds
        yield torch.zeros(images, 1)


def test_what_a_gpu_waits_for_is_not_what_the_cpu_waits_for(time, monkeypatch):
    free_at = [0.0]  # the GPU works off what it is given, beside the CPU

    class Event:
        def record(self) -> None:
            self.at = max(time.now, free_at[0])

        def query(self) -> bool:
            return time.now >= self.at

        def elapsed_time(self, later: Event) -> float:
            assert later.query()  # PyTorch refuses it before
            return 1000 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    # Five batches, a second of the CPU for each step and 4 s of the GPU. Where loading takes 2 s it waits for the first
    # alone, and the CPU for 10 of the 22 s; where it takes 5 s, for the first 5 s and then for 2 after each.
    for device, loading, seconds, waited in (("cuda:0", 2.0, 22, 2), ("cuda:0", 5.0, 33, 13), ("cpu", 5.0, 33, 25)):
        progress = Progress([None] * 5, "epoch", visible=False, device=device)
        for _ in progress.track(slow_batches(time, 5, loading)):
            free_at[0] = max(time.now, free_at[0]) + 4
            time.now += 1.0
            assert 0 <= progress.speed()["data_wait"] <= 1  # asked for in between it counts nothing twice
        time.now = max(time.now, free_at[0])  # as the epoch's metrics are fetched
        speed = {"seconds": seconds, "images_per_second": 3 * 40 / seconds, "data_wait": waited / seconds}
        assert progress.speed(processes=3) == pytest.approx(speed)


@pytest.mark.parametrize("visible", [True, False])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_rank_0_gives_a_terminal_a_bar_and_a_file_a_line_a_minute(is_terminal, visible, time, capsys, monkeypatch):
    stderr = io.StringIO()
    stderr.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    progress = Progress([None] * 32, "epoch 2/9", visible, first=2)
    for _ in progress.track(slow_batches(time, 30, 10.0, images=20)):
        progress.log(STEP, 1)
    assert ("epoch 2/9" in stderr.getvalue()) == (visible and is_terminal)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (4 if visible and not is_terminal else 0)
    assert lines[:1] in ([], ["epoch 2/9 step 9/32 loss 0.5 colour 0.25 lr 1.0e-04 2 img/s wait 100%"])
