"""A run's folder: files written whole in a thread, nothing lost to another run, pictures that nobody waits for."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tiny_runs import HANG, small
from torch import Tensor, nn

import trainer
from models import CheckpointError, read_checkpoint
from training import checkpoints
from training.checkpoints import BackgroundWriter, RunFolder, epoch_files, newest_usable, save, snapshot, write_epoch


def content(epoch: int = 1, **more: object) -> dict:
    return {"epoch": epoch, "config": {}, "model": {"weights": torch.arange(1000) / 7 + epoch}, **more}


def run(weights: Tensor, step: int = 0) -> SimpleNamespace:
    """What a folder asks of a run."""
    checkpoint = {"epoch": 1, "config": {}, "step": step, "model": {"weights": weights}}
    return SimpleNamespace(checkpoint=lambda partial_metrics=None: checkpoint)


def weights(path: Path) -> list[float]:
    return read_checkpoint(path)["model"]["weights"].tolist()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    save(content(1), path)
    monkeypatch.setattr(torch, "save", Mock(side_effect=RuntimeError("pos 1\n2")))  # as PyTorch's writer of zip files
    with pytest.raises(CheckpointError, match=f"^{path} cannot be written: pos 1$"):
        save(content(2), path)
    assert read_checkpoint(path)["epoch"] == 1


def test_a_snapshot_stays_as_it_was_taken():
    model = nn.BatchNorm2d(4)
    whole = content(model=model.state_dict(), history=[{"iou": 0.5}], partial_metrics=[{"losses": torch.ones(3)}])
    before = snapshot(whole)
    model.running_var.mul_(2)
    whole["partial_metrics"][0]["losses"].add_(1)
    whole["history"][0]["iou"] = 0.6
    whole["history"].append({"iou": 0.7})
    assert (before["model"]["running_var"] == 1).all()
    assert (before["partial_metrics"][0]["losses"] == 1).all()
    assert before["history"] == [{"iou": 0.5}]
    assert before["model"]._metadata == model.state_dict()._metadata
    with pytest.raises(TypeError, match="a checkpoint cannot hold float64"):  # which could not be read again
        snapshot({"history": [{"val_iou": np.float64(0.5)}]})


@pytest.mark.parametrize(("keep", "kept"), [(1, [2]), (2, [10000, 2]), (0, [10000, 9999, 9998, 2])])
def test_the_newest_epochs_and_a_users_copy_are_kept_and_last_is_the_newest(keep, kept, tmp_path):
    (tmp_path / "epoch_0003_good.pth").touch()
    for epoch in (9998, 9999, 10000, 2):  # the last one as after going back: the one just written stays
        write_epoch(tmp_path, content(epoch), keep)
        assert (tmp_path / "last.pth").samefile(tmp_path / f"epoch_{epoch:04d}.pth")
    assert epoch_files(tmp_path) == [tmp_path / f"epoch_{epoch:04d}.pth" for epoch in kept]
    assert (tmp_path / "epoch_0003_good.pth").exists()


def test_last_is_a_copy_where_there_are_no_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(1, "Operation not permitted")))
    for epoch in (1, 2):
        write_epoch(tmp_path, content(epoch), 1)
    assert read_checkpoint(tmp_path / "last.pth")["epoch"] == 2
    assert names(tmp_path) == ["epoch_0002.pth", "last.pth", "previous.pth"]  # of a copy it is kept needlessly


def test_newest_usable_names_and_skips_damaged_checkpoints(tmp_path, capsys):
    for epoch in (1, 2, 3):
        write_epoch(tmp_path, content(epoch), 0)
    checkpoints.write_last(tmp_path, content(3, step=2))
    save(content(3, step=1), tmp_path / "previous.pth")
    order = ["last.pth", "previous.pth", "epoch_0003.pth", "epoch_0002.pth", "epoch_0001.pth"]
    for name in order:
        assert newest_usable(tmp_path)[0].name == name
        assert capsys.readouterr().out.count(" is damaged or no checkpoint") == order.index(name)
        (tmp_path / name).write_bytes(b"cut")
    assert newest_usable(tmp_path) is newest_usable(tmp_path / "absent") is None
    save(content(2), tmp_path / "last.pth")
    save(content(3), tmp_path / "epoch_0003.pth")  # killed between two renames
    assert newest_usable(tmp_path)[0].name == "epoch_0003.pth"


OF_A_RUN = ["best_model.pth", "curves.png", "epoch_0001.pth", "epoch_12345.pth", "history.csv", "last.pth",
            "preview.png", "run.log", "tensorboard"]  # fmt: skip
EVALUATIONS = ["best_model_on_coco_val2017", "epoch_0001_on_a_val_at_512", "epoch_0007_on_a_val", "last_on_a_b_val"]
OF_THE_USER = [".gitkeep", "epoch_0003_good.pth", "epoch_notes.txt", "my_best_model.pth", "best_model_on_paper.txt"]


def archive(folder: Path) -> Path | None:
    """What a new run does with an earlier one's files."""
    return checkpoints.archive_files(folder, checkpoints.files_to_archive(folder, None, 0, False))


def evaluate(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir()
        (folder / name / "metrics.json").touch()


def test_all_of_a_run_is_archived_and_nothing_else(tmp_path, monkeypatch):
    noon = SimpleNamespace(now=lambda: datetime(2026, 1, 2, 12))
    monkeypatch.setattr(checkpoints, "datetime", noon)  # a second run within the same second overwrites nothing
    assert archive(tmp_path) is None
    for text in ("first", "second"):
        for name in OF_A_RUN + OF_THE_USER:
            (tmp_path / name).write_text(text)
        evaluate(tmp_path, *EVALUATIONS)
        folder = archive(tmp_path)
        assert names(folder) == sorted([*OF_A_RUN, *EVALUATIONS])
        assert {(folder / name).read_text() for name in OF_A_RUN} == {text}
    assert len(names(tmp_path)) == len(OF_THE_USER) + 2
    evaluate(tmp_path, "my_model_on_coco")
    (tmp_path / "last_on_tuesday").mkdir()  # a run by --run-name
    assert archive(tmp_path) is None


@pytest.mark.parametrize(
    ("source", "epoch", "went_back", "archived"),
    [("previous.pth", 3, True, ["last.pth"]),  # a link to it would replace the one that is whole
     ("epoch_0002.pth", 2, False, ["epoch_0003.pth", "last.pth"]),
     ("epoch_0002.pth", 2, True, ["epoch_0003.pth", "history.csv", "last.pth", "previous.pth", *EVALUATIONS[::2],
                                  EVALUATIONS[3]]),
     ("../elsewhere.pth", 2, True, ["epoch_0001.pth", "epoch_0002.pth", "epoch_0003.pth", "history.csv", "last.pth",
                                    "previous.pth", *EVALUATIONS])],
)  # fmt: skip
def test_what_a_run_would_overwrite_is_archived(source, epoch, went_back, archived, tmp_path):
    save(content(2, step=1), tmp_path / "previous.pth")
    for name in ("epoch_0001.pth", "epoch_0002.pth", "epoch_0003.pth", "history.csv"):
        (tmp_path / name).touch()
    (tmp_path / "last.pth").write_bytes(b"damaged")
    evaluate(tmp_path, *EVALUATIONS)
    files = checkpoints.files_to_archive(tmp_path, tmp_path / source, epoch, went_back)
    assert sorted(path.name for path in files) == sorted(archived)


@pytest.mark.parametrize(("keep", "num_epochs"), [(1, 4), (0, 3), (5, 2)])
def test_disk_needed_is_what_real_files_take(keep, num_epochs, tmp_path, monkeypatch):
    model, used, replace = {"weights": torch.zeros(200_000)}, [], os.replace
    monkeypatch.setattr(os, "replace", lambda *args: (
        used.append(sum({path.stat().st_ino: path.stat().st_size for path in tmp_path.iterdir()}.values())),
        replace(*args)))  # fmt: skip
    save({"model": model}, tmp_path / "best_model.pth")
    for epoch in range(1, num_epochs + 1):
        whole = {"epoch": epoch, "config": {}, "model": model, "moments": torch.zeros(2, 200_000)}
        for _ in range(2):
            checkpoints.write_last(tmp_path, whole)
        write_epoch(tmp_path, whole, keep)
    assert checkpoints.disk_needed(4 * 200_000, 3, keep, num_epochs) == pytest.approx(max(used), rel=0.1)


def test_works_are_done_in_order_and_a_failure_is_reported_once(capsys):
    done, writer, event = [], BackgroundWriter(), threading.Event()
    writer.submit(lambda: done.append(event.wait(HANG)))
    writer.submit(Mock(side_effect=OSError(errno.ENOSPC, "No space left on device", "a.pth")))
    writer.submit(lambda: done.append(threading.current_thread() is threading.main_thread()))
    assert writer.collect()  # what is not done yet is reported later
    assert not writer.is_idle()
    event.set()
    writer.wait()
    assert capsys.readouterr().out == ""  # a line of another thread would tear the progress bar
    assert (writer.collect(), writer.collect(), done) == (False, True, [True, False])
    line = "a.pth cannot be written: No space left on device: the training goes on, and it will be tried again\n"
    assert capsys.readouterr().out == line
    writer.submit(lambda: 1 / 0)  # a bug is raised where it is asked for, and once
    with pytest.raises(ZeroDivisionError):
        writer.close()
    assert writer.collect()


def in_a_child(work: Callable[[], object]) -> bool:
    """Returns whether `work` is true in a forked process."""
    if not (child := os.fork()):
        os._exit(0 if work() else 1)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_is_forked_only_while_nothing_is_being_written():
    lock, begun, writer = threading.Lock(), threading.Event(), BackgroundWriter()
    writer.submit(lambda: (lock.acquire(), begun.set(), time.sleep(0.3), lock.release()))
    assert begun.wait(HANG)
    assert in_a_child(lambda: lock.acquire(timeout=HANG))
    writer.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_worker_that_outlives_its_run_does_not_keep_the_folder(tmp_path):
    with checkpoints.claim(tmp_path) as held:
        with pytest.raises(CheckpointError, match="another run"):
            checkpoints.claim(tmp_path)
        assert in_a_child(lambda: held.closed)
    checkpoints.claim(tmp_path).close()


def test_the_state_at_the_time_of_the_save_is_written(tmp_path, monkeypatch):
    values, copy, save, held, saved = torch.zeros(3), checkpoints.snapshot, checkpoints.save, threading.Event(), []
    monkeypatch.setattr(checkpoints, "save", lambda content, path: (
        held.wait(HANG), save(content, path), saved.append(path.name)))  # fmt: skip
    with RunFolder(tmp_path, 0) as folder:
        folder.save_epoch(run(values), {"epoch": 1, "config": {}, "model": {"weights": values}})
        values.add_(1)  # as an optimiser does it
        meanwhile = folder.collect(), names(tmp_path)
        threading.Timer(0.2, held.set).start()
        monkeypatch.setattr(checkpoints, "snapshot", lambda it: (weights(tmp_path / "last.pth"), copy(it))[1])
        folder.save_mid_epoch(run(values), [])  # a second copy is made when the first is written
    assert meanwhile == (True, [])
    assert saved == ["best_model.pth", "epoch_0001.pth", "last.pth"]  # killed in between, it makes the best one again
    assert [weights(tmp_path / name) for name in saved] == [[0] * 3, [0] * 3, [1] * 3]


@pytest.mark.parametrize(
    ("outcomes", "seconds"), [([CheckpointError("no room")] * 2 + [None], 120), (CheckpointError("no room"), 3660)]
)
def test_the_final_save_is_tried_for_an_hour(outcomes, seconds, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(checkpoints, "write_epoch", Mock(side_effect=outcomes))
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append))
    line = pytest.raises(CheckpointError, match=f"the last epoch cannot be written to {tmp_path}")
    with RunFolder(tmp_path, 0) as folder, contextlib.nullcontext() if seconds == 120 else line:
        folder.save_epoch(run(torch.zeros(3)), None)
        folder.retry_final_save(run(torch.zeros(3)))
    assert sum(slept) == seconds


def test_a_checkpoint_waits_for_no_drawing_that_hangs_or_fails(tmp_path, capsys):
    released = threading.Event()
    with RunFolder(tmp_path, 0) as folder:
        folder.draw(Mock(side_effect=CheckpointError("curves.png cannot be drawn")))
        folder.draw(lambda: released.wait(HANG))
        for step in (0, 1):
            folder.save_mid_epoch(run(torch.zeros(3), step), [])
        saved = folder.collect(wait=True), read_checkpoint(tmp_path / "last.pth")["step"]
        due = folder.pictures_due()
        released.set()
    assert (saved, due) == ((True, 1), False)
    assert "curves.png cannot be drawn: the training goes on" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_pictures_are_drawn_every_20_seconds_at_most_and_at_the_end(coco_root, tmp_path, monkeypatch):
    clock, drawn, validate, draw = [100.0], [], trainer.validate, RunFolder.draw
    monkeypatch.setattr(trainer, "validate", lambda *args: (clock.append(clock[-1] + 9), validate(*args))[1])
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: clock[-1]))
    monkeypatch.setattr(trainer.pictures, "save_curves", lambda history, *_: drawn.append(len(history)))
    monkeypatch.setattr(trainer.pictures, "save_sheet", lambda *_: drawn.append("sheet"))
    monkeypatch.setattr(RunFolder, "draw", lambda self, work: (draw(self, work), self._pictures.wait()))
    trainer.main(small(coco_root, tmp_path, num_epochs=8, batch_size=10))
    assert drawn == ["sheet", 1, "sheet", 4, "sheet", 7, "sheet", 8]
