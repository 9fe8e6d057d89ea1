"""Runs laid over one another: the table, the settings that differ, the picture, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest

from tools import compare
from utils import write_csv


def left_by_a_run(folder: Path, *ious: float, **settings: object) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {"epoch": epoch, "val_loss": 1 - iou, "val_iou": iou, "val_dice": iou / 2, "learning_rate": 1e-4}
        for epoch, iou in enumerate(ious, 1)
    ]
    write_csv(rows, folder / "history.csv")
    settings = {"checkpoint_dir": str(folder), "resume": "", "encoder": "resnet34"} | settings
    (folder / "run.json").write_text(json.dumps({"settings": settings, "data": {"val.json": "5 photos"}}))
    return folder


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """Runs it in a folder of its own. Returns its exit code, what it said and the errors, line by line."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> tuple[int, list[str], list[str]]:
        code = compare.run_command(["compare.py", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return command


def test_the_best_epochs_and_the_settings_that_differ(tmp_path, command):
    one = left_by_a_run(tmp_path / "one", 0.1, 0.5, 0.4, learning_rate=1e-4, seed=0)
    two = left_by_a_run(tmp_path / "_$two", 0.625, learning_rate=1e-3, seed=0, tensorboard=True)
    code, lines, errors = command(one, two)
    assert (code, errors) == (0, [])
    assert [line.split() for line in lines] == [
        ["run", "epochs", "best", "epoch", "IoU", "Dice"],
        ["one", "3", "2", "0.500", "0.250"],
        ["_$two", "1", "1", "0.625", "0.312"],
        [],
        ["setting", "one", "_$two"],
        ["learning_rate", "0.0001", "0.001"],
        ["tensorboard", "-", "True"],
        [],
        ["written", "to", "compare.png"],
    ]
    assert cv2.imread("compare.png").shape == (1125, 1650, 3)


def test_runs_of_one_name_and_without_settings(tmp_path, command):
    runs = [left_by_a_run(tmp_path / name / "run", 0.5) for name in ("a", "b")]
    code, lines, _ = command(*runs, "--output", "both.png")
    assert (code, lines[1].split()[0], lines[2].split()[0]) == (0, str(runs[0]), str(runs[1]))
    assert lines[4:] == ["no setting differs", "", "written to both.png"]
    (runs[0] / "run.json").write_text("{}")
    assert f"{runs[0]} has no run.json that can be read: its settings are not known" in command(*runs)[1]


def test_many_runs_are_one_picture(tmp_path, command):
    runs = [left_by_a_run(tmp_path / f"run_with_a_long_name_{n}", *[n / 20] * 40, seed=n) for n in range(9)]
    assert command(*runs)[0] == 0
    assert cv2.imread("compare.png").shape == (1125, 1650, 3)


def test_mistakes_get_one_line(tmp_path, command):
    good, empty = left_by_a_run(tmp_path / "good", 0.5), left_by_a_run(tmp_path / "empty", 0.5)
    word, short = left_by_a_run(tmp_path / "word", 0.5), left_by_a_run(tmp_path / "short", 0.5)
    (empty / "history.csv").write_text("epoch,val_iou\n")
    (word / "history.csv").write_text("epoch,val_iou,val_dice,val_loss,learning_rate\none,2,3,4,5\n")
    (short / "history.csv").write_text("epoch,val_iou,val_dice,val_loss,learning_rate\n1,2,3,4,5,6\n")
    for arguments, words in (
        ([], "required: RUN"), ([tmp_path / "no"], "no/history.csv cannot be read: No such file"),
        ([good, empty], "empty/history.csv is no history"), ([word], "is no history"), ([short], "is no history"),
        ([good, "--output", "no/a.png"], "no/a.png cannot be written: No such file"),
        ([good, "--out", "a"], "--output"),
    ):  # fmt: skip
        code, _, errors = command(*arguments)
        assert (code, len(errors)) == (2, 1), arguments
        assert words in errors[0]
