"""Files written in the background: in order, whole, one copy at a time, and nothing that goes wrong is lost."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from training import checkpoints
from training.checkpoints import RunFolder
from training.writing import Writer
from utils import CheckpointError, read_checkpoint

LONG = 30.0  # seconds: a test that waits for so long has failed


def run(weights: Tensor, step: int = 0) -> SimpleNamespace:
    """What a folder asks of a run."""
    content = {"epoch": 1, "config": {}, "step": step, "model": {"weights": weights}}
    return SimpleNamespace(history=[{"epoch": 1}], checkpoint=lambda tallies=None: content)


def weights(path: Path) -> list[float]:
    return read_checkpoint(path)["model"]["weights"].tolist()


@pytest.fixture
def held(monkeypatch) -> threading.Event:
    """No checkpoint is written until it is set."""
    event, save = threading.Event(), checkpoints.save

    def slow(*args):
        assert event.wait(LONG), "nothing goes on while this is written"
        save(*args)

    monkeypatch.setattr(checkpoints, "save", slow)
    return event


def fail_midway(monkeypatch, error: Exception) -> None:
    def write_half(_content, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", write_half)


# --- a thread that writes ---------------------------------------------------------------------------------


def test_works_are_done_in_order_and_what_fails_is_told_once(capsys):
    done, writer = [], Writer()

    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "a.pth")

    writer.submit("first", lambda: done.append(1))
    writer.submit("second", full)
    writer.submit("third", lambda: done.append(threading.current_thread() is threading.main_thread()))
    writer.rest()
    assert capsys.readouterr().out == ""  # a line of another thread would tear the progress bar
    assert writer.collect() == ["second"]
    assert done == [1, False]
    line = "a.pth cannot be written: No space left on device: the training goes on, and it will be tried again\n"
    assert capsys.readouterr().out == line
    assert writer.collect() == []
    writer.close()


@pytest.mark.parametrize("bug", [ZeroDivisionError, KeyError])
def test_a_bug_is_raised_where_it_is_asked_for_and_only_once(bug):
    def broken():
        raise bug

    writer = Writer()
    writer.submit("broken", broken)
    writer.rest()
    with pytest.raises(bug):
        writer.collect()
    writer.close()


def test_what_is_not_done_yet_is_told_later():
    event, writer = threading.Event(), Writer()
    writer.submit("slow", lambda: event.wait(LONG) and (_ for _ in ()).throw(CheckpointError("no room")))
    assert writer.collect() == []
    event.set()
    writer.rest()
    assert writer.collect() == ["slow"]
    writer.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_is_forked_only_while_nothing_is_being_written():
    lock, begun, writer = threading.Lock(), threading.Event(), Writer()

    def slow():
        with lock:
            begun.set()
            threading.Event().wait(0.3)

    writer.submit("slow", slow)
    assert begun.wait(LONG)
    if not (child := os.fork()):
        os._exit(0 if lock.acquire(timeout=5) else 1)
    assert os.waitpid(child, 0)[1] == 0
    writer.close()


# --- a run's folder ---------------------------------------------------------------------------------------


def test_what_is_written_is_the_state_at_the_time_of_the_save(held, tmp_path):
    values = torch.zeros(3)
    with RunFolder(tmp_path, 0) as folder:
        folder.save_epoch(run(values), {"epoch": 1, "config": {}, "model": {"weights": values}})
        values.add_(1)  # as Adam does it
        held.set()
    assert weights(tmp_path / "epoch_0001.pth") == weights(tmp_path / "last.pth") == [0, 0, 0]
    assert weights(tmp_path / "best_model.pth") == [0, 0, 0]


def test_a_second_copy_is_made_only_when_the_first_is_written(held, tmp_path, monkeypatch):
    snapshot, values = checkpoints.snapshot, torch.zeros(3)
    with RunFolder(tmp_path, 0) as folder:
        folder.save_unfinished(run(values), [])
        assert folder.collect()
        assert not (tmp_path / "last.pth").exists()
        threading.Timer(0.2, held.set).start()
        monkeypatch.setattr(checkpoints, "snapshot", lambda it: (weights(tmp_path / "last.pth"), snapshot(it))[1])
        folder.save_unfinished(run(values, step=1), [])
    assert read_checkpoint(tmp_path / "last.pth")["step"] == 1


def test_one_that_fails_midway_leaves_what_was_there_and_the_next_is_tried(tmp_path, monkeypatch, capsys):
    with RunFolder(tmp_path, 0) as folder:
        folder.save_unfinished(run(torch.zeros(3)), [])
        assert folder.collect(wait=True)
        with monkeypatch.context() as patch:
            fail_midway(patch, OSError(errno.ENOSPC, "No space left on device"))
            folder.save_unfinished(run(torch.ones(3), step=1), [])
            assert not folder.collect(wait=True)
        assert "last.pth cannot be written: No space left on device" in capsys.readouterr().out
        assert folder.collect()  # it is told once
        assert weights(tmp_path / "last.pth") == [0, 0, 0]
        folder.save_unfinished(run(torch.ones(3), step=2), [])
        assert folder.collect(wait=True)
    assert weights(tmp_path / "last.pth") == [1, 1, 1]
    assert not list(tmp_path.glob(".*.part"))


def test_the_best_model_is_kept_as_it_was_until_there_is_room_and_copied_once(tmp_path, monkeypatch):
    values, contents, save = torch.zeros(3), [], checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda content, path: (contents.append(content), save(content, path)))
    with RunFolder(tmp_path, 0) as folder:
        with monkeypatch.context() as patch:
            fail_midway(patch, OSError(errno.ENOSPC, "No space left on device"))
            folder.save_epoch(run(values), {"epoch": 1, "config": {}, "model": {"weights": values}})
            assert folder.has_best()
            assert not folder.collect(wait=True)
        values.add_(1)
        folder.save_unfinished(run(values), [])
        assert folder.collect(wait=True)
        assert (weights(tmp_path / "best_model.pth"), weights(tmp_path / "last.pth")) == ([0, 0, 0], [1, 1, 1])
        folder.save_epoch(run(values), {"epoch": 2, "config": {}, "model": {"weights": values}})
    assert contents[0] is contents[1]
    assert contents[-2]["model"]["weights"].data_ptr() == contents[-1]["model"]["weights"].data_ptr()


def test_a_picture_that_fails_is_told_and_no_checkpoint_is_missed(tmp_path, capsys):
    def fail():
        raise CheckpointError("preview.png cannot be drawn")

    with RunFolder(tmp_path, 0) as folder:
        folder.save_epoch(run(torch.zeros(3)), None)
        folder.later(fail)
        assert folder.collect(wait=True)
        assert "preview.png cannot be drawn: the training goes on" in capsys.readouterr().out


def test_an_error_that_ends_the_process_waits_and_hides_no_bug_of_the_thread(held, tmp_path):
    with pytest.raises(ValueError, match="of the training"), RunFolder(tmp_path, 0) as folder:  # noqa: PT012
        folder.save_unfinished(run(torch.zeros(3)), [])
        threading.Timer(0.2, held.set).start()
        raise ValueError("of the training")
    assert weights(tmp_path / "last.pth") == [0, 0, 0]
    with pytest.raises(ZeroDivisionError) as raised, RunFolder(tmp_path, 0) as folder:  # noqa: PT012
        folder.later(lambda: 1 / 0)
        raise ValueError("of the training")
    assert isinstance(raised.value.__context__, ValueError)
