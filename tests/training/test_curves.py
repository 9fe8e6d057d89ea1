"""The curves of a run: whole pictures of any history, what is marked in them, and no trace but the picture."""

from __future__ import annotations

import math
import os
from pathlib import Path

import cv2
import pytest
from conftest import fresh_python

from training import curves
from training.report import history_row
from training.writing import tried
from utils import CheckpointError

TERMS = ("colour_loss", "bce_loss", "dice_loss")


def history(*ious: float, rates: tuple[float, ...] = (), loss: float = 1.0, **more: float) -> list[dict]:
    """An epoch a value of the validation's IoU."""
    figures = {name: loss for name in ("loss", *TERMS)}
    rows = []
    for epoch, iou in enumerate(ious, 1):
        rate = rates[epoch - 1] if rates else 1e-4
        speed = {"learning_rate": rate, "decoder_learning_rate": 10 * rate, "seconds": 1, "images_per_second": 1,
                 "data_wait": 0, "skipped_steps": 0}  # fmt: skip
        scores = {"iou": iou, "dice": iou, **more}
        rows.append(history_row(epoch, figures | speed | {"iou": 0.5, "dice": 0.5}, figures | scores, {}))
    return rows


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize(
    "rows",
    [
        history(0.5),
        history(0.1, math.nan, 0.3, rates=(1e-4, 0.0, 1e-4)),
        history(math.nan, math.nan, loss=math.inf),
        history(*[0.0] * 40, loss=0.0),
        [{k: v for k, v in row.items() if not k.startswith("decoder")} for row in history(0.1, 0.2)],  # an older one's
        [history(0.1)[0] | {"epoch": 7}, history(0.2, 0.2, new_loss=0.1)[1] | {"epoch": 8}],  # a term of today
    ],
)
def test_any_history_becomes_one_whole_picture(rows, tmp_path):
    curves.save_curves(rows, tmp_path / "curves.png")
    picture = cv2.imread(str(tmp_path / "curves.png"))
    assert picture.shape == (1125, 1650, 3)
    assert len({tuple(colour) for colour in picture[::5, ::5].reshape(-1, 3).tolist()}) > 10
    assert names(tmp_path) == ["curves.png"]


def test_what_is_marked():
    rows = history(0.1, 0.4, math.nan, 0.4, 0.2, rates=(3e-4, 1e-4, 3e-4, 2e-4, 2e-4))
    assert curves.best_row(rows)["epoch"] == 2
    assert [row["epoch"] for row in curves.restarts(rows)] == [2]


def test_what_cannot_be_drawn_is_one_line_and_leaves_the_picture_before(tmp_path, capsys, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"before")

    def fail(*_):
        raise RuntimeError("no such font\nat all")

    monkeypatch.setattr(curves, "draw_run", fail)
    with pytest.raises(CheckpointError, match=r"cannot be drawn: no such font$"):
        curves.save_curves(history(0.5), path)
    assert not tried(lambda: curves.save_curves(history(0.5), path))
    assert capsys.readouterr().out.count("\n") == 1
    assert path.read_bytes() == b"before"
    assert names(tmp_path) == ["curves.png"]


def test_a_disk_that_is_full_is_named(tmp_path, capsys):
    assert not tried(lambda: curves.save_curves(history(0.5), tmp_path / "absent" / "curves.png"))
    assert "curves.png cannot be written: No such file or directory" in capsys.readouterr().out


def test_matplotlib_is_imported_late_and_leaves_nothing_behind(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("MPLCONFIGDIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME")
    code = f"""if True:
        import os, pathlib, sys, trainer
        sys.stderr = sys.stdout
        from training.curves import save_curves
        print("matplotlib" in sys.modules)
        save_curves({history(0.5)}, pathlib.Path({str(tmp_path / "curves.png")!r}))
        print("matplotlib.pyplot" in sys.modules, "MPLCONFIGDIR" in os.environ)"""
    assert fresh_python(code) == ["False", "False False"]
    assert (tmp_path / "curves.png").exists()
    assert os.listdir(home) == []
