"""Runs compared: the tables, the picture, mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import pytest

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


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """Runs the command in `tmp_path`. Returns its exit code, its lines and its errors."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> tuple[int, list[str], list[str]]:
        code = compare.run_command(["compare.py", *map(str, arguments)])
        return code, *(text.splitlines() for text in capsys.readouterr())

    return command


def test_best_epochs_and_differing_settings_are_printed(tmp_path, command):
    finished_run(tmp_path / "one", 0.1, 0.5, 0.4, learning_rate=1e-4, seed=0)
    finished_run(tmp_path / "_$two", 0.625, learning_rate=1e-3, seed=0, tensorboard=True)
    code, lines, errors = command("one", "_$two")
    assert (code, errors) == (0, [])
    assert [re.split("  +", line) for line in lines] == [
        ["", "one", "_$two"],
        ["epochs", "3", "1"],
        ["best epoch", "2", "1"],
        ["IoU", "0.500", "0.625"],
        ["Dice", "0.250", "0.312"],
        ["learning_rate", "0.0001", "0.001"],
        ["tensorboard", "-", "True"],
        ["written to compare.png"],
    ]


def test_many_long_runs_of_the_same_name_are_one_picture(tmp_path, command):
    runs = [finished_run(tmp_path / f"with_a_long_name_{n}" / "run", *[n / 20] * 40, seed=n) for n in range(9)]
    code, lines, _ = command(*runs, "--output", "all.png")
    assert (code, lines[0].split()) == (0, [str(run) for run in runs])
    assert cv2.imread("all.png").shape == (1125, 1650, 3)


@pytest.mark.parametrize(("file", "content"), [
    ("history.csv", "epoch,val_iou,val_dice\n"), ("history.csv", "epoch,val_iou,val_dice\none,2,3\n"),
    ("history.csv", "epoch,val_iou,val_dice\n1,2,3,4\n"), ("run.json", "{}"),
])  # fmt: skip
def test_a_damaged_run_is_named(tmp_path, command, file, content):
    (finished_run(tmp_path / "bad", 0.5) / file).write_text(content)
    code, _, (error,) = command("bad")
    assert code == 2
    assert "bad/history.csv or run.json is damaged" in error


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "required: RUN"), (["no"], "no/history.csv cannot be read: No such file"), (["good", "--out=a"], "--output"),
    (["good", "--output", "no/a.png"], "no/a.png cannot be written: No such file"),
])  # fmt: skip
def test_a_mistake_gets_one_line(tmp_path, command, arguments, words):
    finished_run(tmp_path / "good", 0.5)
    code, _, (error,) = command(*arguments)
    assert code == 2
    assert words in error
