"""Runs that are stopped, killed, damaged or short of disk: they go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import errno
import gc
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny_runs
from helpers import edit, write_split
from tiny_runs import HANG, assert_same_run, command_error, contents, flags, history, position, same, small

import trainer
from models import read_checkpoint
from training import launching
from training.interruptions import SIGNALS, Stopped

pytestmark = pytest.mark.usefixtures("tiny", "signals")
STEPS, BATCHES = 3, 5  # an epoch's steps, and with the batches of validation: 10 and 5 photos by 4
TWO = {"num_epochs": 2, "restart_period": 2}
OFTEN = {"save_every_minutes": 1e-9}


@pytest.fixture
def signals():
    """Restores the handlers: a run that was stopped ignores signals until its process ends, which goes on here."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Callable[..., Path]:
    """Returns the folder of an undisturbed run of two epochs, on the photos that `coco_root` has."""
    root = tmp_path_factory.mktemp("straight")
    for split, count, first_id in (("train2017", 10, 1), ("val2017", 5, 101)):
        write_split(root / "coco", split, count, first_id)

    def straight(**settings: object) -> Path:
        folder = root / f"run{settings}"
        if not folder.exists():
            with pytest.MonkeyPatch.context() as patch:
                tiny_runs.make_tiny(patch.setattr)
                trainer.main(small(root / "coco", folder, keep_checkpoints=0, **TWO, **settings))
        return folder

    return straight


class Killed(BaseException):
    """Stands in for SIGKILL: nothing of the program answers to it."""


def interrupt(config: trainer.Config, batch: int, kill: bool = False) -> None:
    """Trains until so many batches are computed, then kills the run or sends SIGTERM."""
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stopped, Killed):
        act = Mock(side_effect=Killed) if kill else lambda: signal.raise_signal(signal.SIGTERM)
        tiny_runs.at_batch(patch, batch, act)
        trainer.main(config)
    gc.collect()  # the error's frames would keep the folder claimed


def resume(folder: Path, *arguments: str) -> None:
    """Goes on with nothing said but where the run is, on which device, and this."""
    command = ["trainer.py", "--resume", f"--checkpoint-dir={folder}", "--device=cpu", *arguments]
    assert trainer.run_command(command) == 0


@pytest.mark.parametrize(
    ("batch", "settings", "saved"),
    [(1, {}, [(0, 1), (0, 2)]),  # the first step, and the first one after that
     (3, {"batch_size": 2, "grad_accum_steps": 2, "num_workers": 2}, [(0, 2)]),  # in the middle of the second step
     (4, {}, [(0, STEPS)]),  # in the validation
     (BATCHES, {}, [(1, 1)])],  # the validation's last batch: the next step is the one after it
)  # fmt: skip
def test_after_a_signal_a_run_ends_with_the_same_bits(batch, settings, saved, straight, coco_root, tmp_path, capfd):
    run = tmp_path / "run"
    for epoch, step in saved:
        interrupt(small(coco_root, run, resume="newest", **TWO, **settings), batch)
        out = capfd.readouterr().out
        assert f"stopped by SIGTERM after epoch {epoch}, step {step}: --resume goes on from there" in out
        assert position(run / "last.pth") == (epoch, step)
    resume(run, "--num-workers=0")
    assert "not bit for bit" not in capfd.readouterr().out
    assert_same_run(run, straight(**settings))


@pytest.mark.parametrize(
    ("batch", "damaged", "used"),
    [(2, [], "last.pth, after epoch 0, step 1"), (BATCHES + 3, ["last.pth"], "previous.pth, after epoch 1, step 1"),
     (BATCHES + 3, ["last.pth", "previous.pth"], "epoch_0001.pth, after epoch 1;"),
     (BATCHES + 1, ["last.pth", "epoch_0001.pth"], f"previous.pth, after epoch 0, step {STEPS}")],
)  # fmt: skip
def test_a_killed_run_goes_on_from_the_newest_whole_file(batch, damaged, used, straight, coco_root, tmp_path, capsys):
    run = tmp_path / "run"
    interrupt(small(coco_root, run, **OFTEN, **TWO), batch, kill=True)
    for path in (run / name for name in damaged):
        half = path.read_bytes()[:1000]
        path.unlink()  # hard links to it stay whole
        path.write_bytes(half)
    resume(run)
    out = capsys.readouterr().out
    assert all(f"the checkpoint {run / name} is damaged" in out for name in damaged), out
    assert f"going on from {run / used}" in out
    assert {path.name for path in run.glob("earlier_*/*")} == {*damaged}
    for archive in run.glob("earlier_*"):
        shutil.rmtree(archive)
    assert_same_run(run, straight())


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda root: edit(root, lambda content: content["annotations"].reverse()),
      r"coco/annotations/instances_train2017.json: 10 photos of checksum (\w{8}) and cannot go on with 10 photos of "
      r"checksum (?!\1)"),
     (lambda root: write_split(root.parent / "more", "val2017", 3, first_id=201),
      r"more/annotations/instances_val2017.json: (5 photos of checksum \w{8}) and cannot go on with \1, 3 photos"),
     (lambda root: write_split(root, "train2017", 11, first_id=1), "photos: 10 and cannot go on with 11")],
)  # fmt: skip
def test_other_data_are_refused_with_what_they_were(change, said, coco_root, tmp_path, capsys):
    run = tmp_path / "run"
    trainer.main(small(coco_root, run, num_epochs=1))
    before = contents(run)
    change(coco_root)
    roots = ",".join(str(root) for root in (coco_root, tmp_path / "more") if root.exists())
    error = command_error(capsys, *flags(small(roots, run, num_epochs=2, resume="newest")))
    assert re.search(f"trained with .*{said}.*: restore it, or begin a new run", error), error
    assert contents(run) == before


def test_resume_needs_no_flag_of_the_run_again_but_where_moved_data_are(straight, coco_root, tmp_path, capsys):
    run = tmp_path / "run"
    interrupt(small(coco_root, run, keep_checkpoints=1, **TWO), 2)
    edit(coco_root, lambda content: content.update(info="written anew"))
    coco_root.rename(tmp_path / "moved")
    error = command_error(capsys, "--resume", f"--checkpoint-dir={run}", "--device=cpu")
    assert str(coco_root) in error
    assert "--data-root names another folder" in error
    resume(run, f"--data-root={tmp_path / 'moved'}")
    assert "image_size 32 (384)" in capsys.readouterr().out  # the file has another one, and does not count
    assert_same_run(run, straight())
    assert not (run / "epoch_0001.pth").exists()  # one checkpoint is kept
    settings = [read_checkpoint(folder / "last.pth")["config"] for folder in (run, straight())]
    changed = {name for name in settings[0] if settings[0][name] != settings[1][name]}
    assert changed == {"checkpoint_dir", "resume", "keep_checkpoints", "data_root"}


def test_all_of_the_optimiser_follows_other_learning_rates_and_epochs(coco_root, tmp_path, learning_rates):
    interrupt(small(coco_root, tmp_path, pretrained=True, num_epochs=2), 2)
    learning_rates.clear()
    resume(tmp_path, "--num-epochs=3", "--learning-rate=0.002", "--decoder-lr-mult=5", "--weight-decay=0.25")
    steps = range(2, 3 * STEPS)  # of one cosine cycle over all
    assert learning_rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / STEPS / 3)) for step in steps])
    last = read_checkpoint(tmp_path / "last.pth")
    encoder, decoder = last["optimizer"]["param_groups"]
    assert encoder["weight_decay"] == decoder["weight_decay"] == 0.25
    assert decoder["lr"] == pytest.approx(5 * encoder["lr"])
    assert last["history"][-1]["decoder_learning_rate"] == pytest.approx(5 * last["history"][-1]["learning_rate"])


def test_restarted_by_torchrun_it_does_not_go_back_to_a_named_file(straight, coco_root, tmp_path, monkeypatch, capsys):
    first, run = tmp_path / "first", tmp_path / "run"
    trainer.main(small(coco_root, first, **{**TWO, "num_epochs": 1}))
    settings = small(coco_root, run, resume=str(first / "last.pth"), **OFTEN, **TWO)
    interrupt(settings, 3, kill=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    trainer.main(settings)
    assert f"going on from {run / 'last.pth'}, after epoch 1, step 2" in capsys.readouterr().out
    ours, expected = tiny_runs.last_state(run), tiny_runs.last_state(straight())
    assert all(same(ours[name], expected[name]) for name in ("model", "optimizer", "ema"))


def test_a_new_launch_by_torchrun_does_not_take_an_earlier_ones_run_for_its_own(coco_root, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what every plain torchrun calls itself
    for name, archives in (("the first", 0), ("the second", 1)):
        monkeypatch.setenv(launching.LAUNCHER, name)
        trainer.main(small(coco_root, tmp_path / "run", num_epochs=1))
        assert len([*(tmp_path / "run").glob("earlier_*/last.pth")]) == archives


def test_ten_skipped_steps_in_a_row_end_a_run_whatever_lies_between_them(coco_root, tmp_path, monkeypatch, capsys):
    tiny_runs.spoil_losses(monkeypatch, range(BATCHES + 2, 99))
    settings = {"num_epochs": 9, "restart_period": 9, "keep_checkpoints": 0}
    trainer.main(small(coco_root, tmp_path, **{**settings, "num_epochs": 3}))
    error = command_error(capsys, *flags(small(coco_root, tmp_path, resume="newest", **settings)))
    assert "10 steps in a row had no finite loss or gradient" in error
    assert f"{tmp_path / 'last.pth'} is the last good checkpoint" in error
    assert [row["skipped_steps"] for row in history(tmp_path)] == ["0", "2", "3", "3"]  # and two of the fifth epoch
    models = [read_checkpoint(tmp_path / f"epoch_{epoch:04d}.pth")["model"] for epoch in (2, 4)]
    assert same(*({name: value for name, value in model.items() if "num" not in name} for model in models))


def test_with_a_full_disk_it_goes_on_and_has_the_right_best_model_afterwards(coco_root, tmp_path, monkeypatch, capsys):
    save_epoch, fsync, written = trainer.save_epoch, os.fsync, {}
    # Each epoch waits until all of it is written, or is not.
    monkeypatch.setattr(trainer, "save_epoch", lambda *args: (save_epoch(*args), args[-1]._checkpoints.wait()))
    no_space = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def before(epoch: int) -> None:
        monkeypatch.setattr(os, "fsync", no_space if epoch in (2, 3) else fsync)
        written.update(contents(tmp_path) if epoch == 2 else {})
        assert epoch < 4 or written.items() <= contents(tmp_path).items()

    tiny_runs.script(monkeypatch, [0.5, 0.9, 0.3, 0.4], before=before)
    trainer.main(small(coco_root, tmp_path, num_epochs=4))
    assert "No space left on device: the training goes on, and it will be tried again" in capsys.readouterr().out
    best = read_checkpoint(tmp_path / "best_model.pth")
    assert (best["epoch"], best["metrics"]["iou"]) == (2, 0.9)
    assert len(history(tmp_path)) == 4
    assert position(tmp_path / "last.pth") == (4, 0)


@pytest.mark.slow
def test_without_a_reader_of_its_output_a_run_goes_on_and_saves_at_ctrl_c(coco_root, tmp_path, start_process):
    settings = small(coco_root, tmp_path, num_epochs=1000, save_every_minutes=0, keep_checkpoints=0)
    process = start_process("tests/tiny_runs.py", *flags(settings))
    tiny_runs.wait_for(tmp_path / "last.pth")
    process.stdout.close()
    epoch, _ = position(tmp_path / "last.pth")
    tiny_runs.wait_for(tmp_path / f"epoch_{epoch + 2:04d}.pth")
    process.send_signal(signal.SIGINT)
    assert process.wait(HANG) == 128 + signal.SIGINT
    assert position(tmp_path / "last.pth")[1] > 0
