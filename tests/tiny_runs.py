"""Trainings of seconds on the photos of `coco_root`: their settings, the model they train, what they leave.

    python tests/tiny_runs.py --num-epochs 2 ...   # as trainer.py, with the small model
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Container
from pathlib import Path

import pytest
import torch
from helpers import mistake
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

import trainer
from models import read_checkpoint
from trainer import Config
from training.checkpoints import BEST, HISTORY, LAST, RunFolder
from training.command_line import flag
from training.epoch_metrics import EpochMetrics
from training.interruptions import Watch
from training.run import Run
from utils import LossCalculator, Processes

ALONE = Processes(torch.device("cpu"))
HANG = 600  # seconds: only what hangs takes so long, also on a busy machine
TIMES = {"seconds", "images_per_second", "data_wait"}  # columns of the history in which equal runs differ


class Tiny(nn.Sequential):
    """Stands in for the U-Net where the model does not matter: fast, with BatchNorm and dropout."""

    def __init__(self, *_):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 4, 1)
        )

    @property
    def encoder(self) -> nn.Module:
        return self[0]

    def predict(self, images: Tensor) -> Tensor:
        return torch.sigmoid(self(images))


def make_tiny(set_attribute: Callable = setattr) -> None:
    """Has trainings train `Tiny`, have two loader workers at most, and draw no curves, which take most of the time."""
    set_attribute(trainer, "UNetAutoencoder", Tiny)
    set_attribute(trainer, "usable_cores", lambda: 2)
    set_attribute(trainer.pictures, "save_curves", lambda *_: None)


def small(coco_root: Path | str, folder: Path | str, **changes: object) -> Config:
    """Returns the settings of a run of seconds: 10 training photos in batches of 4, 5 for the validation."""
    settings = dict(image_size=32, batch_size=4, num_workers=0, encoder="resnet18", pretrained=False, device="cpu")
    return Config(**{"data_root": str(coco_root), "checkpoint_dir": str(folder), **settings, **changes})


def flags(config: Config) -> list[str]:
    """Returns the command line that says the same as the settings."""
    arguments = []
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, bool):
            arguments.append(flag(name if value else f"no_{name}"))
        elif name == "resume":
            arguments += {"": [], "newest": ["--resume"]}.get(value, [f"--resume={value}"])
        else:
            arguments.append(f"{flag(name)}={value}")
    return arguments


def command_error(capsys, *arguments: str) -> str:
    """Returns the one line by which trainer.py refuses a command line."""
    return mistake(capsys, trainer, *arguments)


def run_of(model: nn.Module, micro_batches: int = 1) -> Run:
    """Returns a run of plain gradient descent at a learning rate of 1: the weights move by the gradient."""
    optimizer = torch.optim.SGD(model.parameters(), 1.0, fused=True)
    return Run(
        ALONE, dataclasses.asdict(Config()), model, model, LossCalculator(), optimizer,
        CosineAnnealingWarmRestarts(optimizer, 10**6), torch.amp.GradScaler("cpu", enabled=False),
        micro_batches=micro_batches, steps_per_epoch=10**6,
    )  # fmt: skip


def script(monkeypatch, values: list[float], metric: str = "iou", before: Callable[[int], None] = lambda epoch: None):
    """Lets the validations to come return these values of a metric; calls `before` with the number of each."""
    coming, validate = iter(enumerate(values, start=1)), trainer.validate

    def scripted(*args):
        epoch, value = next(coming)
        before(epoch)
        return {**validate(*args), metric: value}

    monkeypatch.setattr(trainer, "validate", scripted)


def at_batch(patch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    """Calls `action` once so many batches, of training and validation, are computed."""
    counted, update = itertools.count(1), EpochMetrics.update
    patch.setattr(EpochMetrics, "update", lambda *args: (update(*args), action() if next(counted) == number else None))


def spoil_losses(patch: pytest.MonkeyPatch, numbers: Container[int]) -> None:
    """Makes the losses of these batches, counted from 1, infinite; their gradients stay finite."""
    counted, forward = itertools.count(1), LossCalculator.forward

    def spoiled(*args: object) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = forward(*args)
        return loss + (math.inf if next(counted) in numbers else 0), terms

    patch.setattr(LossCalculator, "forward", spoiled)


def unwatched(run: Run) -> Watch:
    """Returns a watch that no signal and no clock wakes."""
    return Watch(run, RunFolder("unused", 0), 0)


def wait_for(path: Path, *processes: subprocess.Popen) -> None:
    """Waits for a file; fails with what a process has printed if that ends before."""
    end = time.monotonic() + HANG
    while not path.exists():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"there is no {path}"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def history(run: Path) -> list[dict[str, str]]:
    """Returns the rows of a run's history.csv."""
    with open(run / HISTORY, newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the files of a run, but for the lock and those that are being written."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def position(path: Path) -> tuple[int, int]:
    """Returns the epochs that a checkpoint has done, and the steps of the next one."""
    content = read_checkpoint(path)
    return content["epoch"], content["step"]


def without_times(rows: list[dict]) -> list[dict]:
    """Returns rows of a history without what a clock has measured."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def same(one: object, other: object) -> bool:
    """Returns whether two trees of dictionaries, lists, tensors and numbers agree bit for bit."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def last_state(run: Path) -> dict:
    """Returns all that last.pth holds, but for the settings and the times."""
    content = read_checkpoint(run / LAST)
    return {**content, "history": without_times(content["history"]), "config": None}


def assert_same_run(one: Path, other: Path) -> None:
    """Asserts that two runs left the same bits, and that the first has archived nothing."""
    assert same(last_state(one), last_state(other))
    best = [{**read_checkpoint(folder / BEST), "config": None} for folder in (one, other)]
    assert same(*best)
    assert without_times(history(one)) == without_times(history(other))
    assert not list(one.glob("earlier_*"))


def assert_measured_alone(run: Path, root: Path, model: nn.Module) -> None:
    """Asserts that a run's best model, which is loaded into this one, has the metrics that one process measures."""
    best, one = read_checkpoint(run / BEST), run_of(model)
    model.load_state_dict(best["model"])
    loader = trainer.make_loader(trainer.COCOPersonDataset(root, "val2017", 32), 2, 0, training=False)
    metrics = trainer.validate(one, loader, unwatched(one))
    assert metrics["images"] == 5
    assert best["metrics"] == pytest.approx(metrics, abs=1e-6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_tiny()
    sys.exit(trainer.run_command(["trainer.py", *sys.argv[1:]]))
