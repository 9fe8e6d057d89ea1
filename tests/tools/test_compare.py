"""Runs compared: the tables, the picture, mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import pytest
from helpers import mistake

from tools import compare
from utils import write_csv


def finished_run(folder: Path, *ious: float, **settings: object) -> Path:
    folder.mkdir(parents=True)
    rows = [{"epoch": epoch, "val_loss": 1 - iou, "val_iou": iou, "val_dice": iou / 2, "learning_rate": 1e-4}
            for epoch, iou in enumerate(ious, 1)]  # fmt: skip
    write_csv(rows, folder / "history.csv")
    settings = {"encoder": "resnet34"} | settings
    (folder / "run.json").write_text(json.dumps({"settings": settings, "data": {"val.json": "5 photos"}}))
    return folder


def test_best_epochs_and_differing_settings_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    long = "_$" + 98 * "x"  # no two of such names fit beside one another below the curves
    finished_run(tmp_path / "one", 0.1, 0.5, 0.4, learning_rate=1e-4, seed=0)
    finished_run(tmp_path / long, 0.625, learning_rate=1e-3, seed=0, tensorboard=True)
    assert compare.run_command(["compare.py", "one", long, "--output=all.png"]) == 0
    assert [re.split("  +", line) for line in capsys.readouterr().out.splitlines()] == [
        ["", "one", long],
        ["epochs", "3", "1"],
        ["best epoch", "2", "1"],
        ["IoU", "0.500", "0.625"],
        ["Dice", "0.250", "0.312"],
        ["learning_rate", "0.0001", "0.001"],
        ["tensorboard", "-", "True"],
        ["written to all.png"],
    ]
    assert cv2.imread("all.png").shape == (1125, 1650, 3)


@pytest.mark.parametrize(
    ("file", "content"),
    [("history.csv", "epoch,val_iou,val_dice\n"), ("history.csv", "epoch,val_iou\n1,2,3\n"), ("run.json", "{}")],
)
def test_a_damaged_run_is_named(tmp_path, capsys, file, content):
    (finished_run(tmp_path / "bad", 0.5) / file).write_text(content)
    assert "bad/history.csv or run.json is damaged" in mistake(capsys, compare, tmp_path / "bad")


def test_files_that_cannot_be_read_or_written_are_named(tmp_path, capsys):
    run, no = finished_run(tmp_path / "run", 0.5), tmp_path / "no"
    assert mistake(capsys, compare, no).startswith(f"{no}/history.csv cannot be read: No such file")
    assert mistake(capsys, compare, run, "--output", no / "a.png").startswith(f"{no}/a.png cannot be written: No such")
