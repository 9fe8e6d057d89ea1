"""What a run tells: figures against a clock and numbers of our own, pictures pixel by pixel."""

from __future__ import annotations

import csv
import io
import sys
from types import SimpleNamespace

import pytest
import torch

from training import report
from training.report import TABLE_HEAD, Progress, clock, readable_size, table_line
from utils import write_csv

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
    write_csv(rows[:1], tmp_path / "history.csv")
    write_csv(rows, tmp_path / "history.csv")
    back = read_csv(tmp_path / "history.csv")
    assert [row["epoch"] for row in back] == ["1", "2"]
    for row, written in zip(back, rows, strict=True):
        assert {name: float(value) for name, value in row.items()} == pytest.approx(written, rel=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]


def test_history_has_the_columns_others_rely_on(tmp_path):
    metrics = ["loss", "iou", "dice", "colour_loss", "bce_loss", "dice_loss", "global_iou", "precision", "recall"]
    training = {name: 0.5 + place / 64 for place, name in enumerate(metrics)}
    speed = {"learning_rate": 0.001, "decoder_learning_rate": 0.01, "seconds": 7.5, "images_per_second": 9.5,
             "data_wait": 0.25, "skipped_steps": 0}  # fmt: skip
    validation = {name: value / 8 for name, value in training.items()}
    bad = {"train_bad_photos": 1, "val_bad_photos": 0}
    write_csv([report.history_row(3, training | speed, validation, bad)], tmp_path / "history.csv")
    row = read_csv(tmp_path / "history.csv")[0]
    assert list(row)[: len(CONTRACT)] == CONTRACT
    expected = {"epoch": 3, **speed, **{f"train_{name}": training[name] for name in metrics}}
    expected |= {f"val_{name}": validation[name] for name in metrics} | bad
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


@pytest.mark.parametrize(
    ("device", "dtype", "convolutions", "capability", "told"),
    [("cpu", None, "tf32", (8, 0), "float32"), ("mps", None, "tf32", (8, 0), "float32"),
     ("cuda:0", torch.bfloat16, "tf32", (8, 0), "bfloat16"),
     ("cuda:0", None, "tf32", (9, 0), "float32 (convolutions in TF32)"),
     ("cuda:0", None, "tf32", (7, 5), "float32 (no TF32)"), ("cuda:0", None, "ieee", (9, 0), "float32 (no TF32)")],
)  # fmt: skip
def test_the_banner_says_what_a_cuda_gpu_makes_of_float32(device, dtype, convolutions, capability, told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision=convolutions))
    assert report.computed_in(SimpleNamespace(device=torch.device(device), amp_dtype=dtype)) == told


def test_by_itself_pytorch_computes_convolutions_in_tf32():
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"  # where the GPU has it


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
    for batch in progress.over(slow_batches(time, 5, 3.0)):
        time.now += 1.0
        seen += len(batch)
    assert seen == 40
    assert progress.speed() == {"seconds": 20, "images_per_second": 2, "data_wait": 0.75}
    assert progress.speed(processes=3)["images_per_second"] == 6


class Gpu:
    """A GPU that works off what it is given, in turn, beside the CPU; its events stand for torch.cuda.Event."""

    def __init__(self, clock: Clock):
        self.clock, self.free_at = clock, 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool = False):
                assert enable_timing

            def record(self) -> None:
                self.at = max(gpu.clock.now, gpu.free_at)

            def query(self) -> bool:
                return gpu.clock.now >= self.at

            def elapsed_time(self, later: Event) -> float:
                assert later.query()  # PyTorch refuses it before
                return 1000 * (later.at - self.at)

        self.Event = Event

    def work(self, seconds: float) -> None:
        self.free_at = max(self.clock.now, self.free_at) + seconds


@pytest.mark.parametrize(
    ("loading", "working", "seconds", "waited"),
    # Five batches, a second of the CPU for each step. Loaded in 2 s, worked on in 4: the GPU waits for the first alone.
    # The CPU waits for 10 of the 22 s. Loaded in 5 and worked on in 4: for the first 5 s, and then for 2 after each.
    [(2.0, 4.0, 2 + 5 * 4, 2.0), (5.0, 4.0, 5 * 6 - 1 + 4, 5.0 + 4 * 2)],
)
def test_what_a_gpu_waits_for_is_not_what_the_cpu_waits_for(loading, working, seconds, waited, time, monkeypatch):
    gpu = Gpu(time)
    monkeypatch.setattr(torch.cuda, "Event", gpu.Event)
    progress = Progress([None] * 5, "epoch", False, device="cuda:0")
    for _ in progress.over(slow_batches(time, 5, loading)):
        gpu.work(working)
        time.now += 1.0
        assert 0 <= progress.speed()["data_wait"] <= 1  # asked for in between it counts nothing twice
    time.now = max(time.now, gpu.free_at)  # as the epoch's figures are fetched
    assert progress.speed()["seconds"] == seconds
    assert progress.speed()["data_wait"] == pytest.approx(waited / seconds)


TERMS = {"colour": torch.tensor(0.25), "bce": torch.tensor(0.125)}
LOSS = torch.tensor(0.5)


@pytest.fixture
def fetched(monkeypatch) -> list:
    """What Python asks tensors for: on a GPU it would wait for each."""
    asked, real = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: asked.append(1) or real(tensor))
    return asked


def test_the_loss_is_fetched_every_log_every_steps_only(time, fetched):
    progress, counts = Progress([None] * 9, "epoch", True, 3), []
    for _ in progress.over(slow_batches(time, 9, 0.1)):
        progress.show(LOSS, TERMS, 1e-4)
        counts.append(len(fetched))
    assert counts == [0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_the_loss_is_not_fetched_where_nothing_is_shown(time, fetched):
    progress = Progress([None] * 9, "epoch", False, 3)
    for _ in progress.over(slow_batches(time, 9, 0.1)):
        progress.show(LOSS, TERMS, 1e-4)
    assert fetched == []


def lines_of_five_minutes(time, visible: bool, capsys) -> list[str]:
    progress = Progress([None] * 30, "epoch 2/9", visible, 1)
    for _ in progress.over(slow_batches(time, 30, 10.0)):
        progress.show(LOSS, TERMS, 1e-4)
    return capsys.readouterr().out.splitlines()


def test_into_a_file_goes_a_line_a_minute_at_most(time, capsys):
    lines = lines_of_five_minutes(time, True, capsys)
    assert 3 <= len(lines) <= 5
    assert all("epoch 2/9" in line and "/30 " in line and "loss 0.5 colour 0.25 bce 0.125" in line for line in lines)


def test_other_processes_are_silent(time, capsys):
    assert lines_of_five_minutes(time, False, capsys) == []
    assert capsys.readouterr().err == ""


def test_a_line_counts_the_step_it_tells_of(time, capsys):
    progress = Progress([None] * 2, "epoch", True, 1)
    for _ in progress.over(slow_batches(time, 2, 70.0, images=70)):
        progress.show(LOSS, TERMS, 1e-4)
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


# --- the banner -----------------------------------------------------------------------------------------


def test_the_banner_lines_up_its_facts():
    lines = report.banner({"data": "10 photos", "device": "cpu"}).splitlines()
    assert [line.index(text) for line, text in zip(lines, ("10 photos", "cpu"), strict=True)] == [8, 8]
