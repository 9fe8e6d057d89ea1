"""Runs that are stopped, killed, damaged or short of disk: they go on as if nothing had happened."""

from __future__ import annotations

import errno
import gc
import itertools
import math
import os
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from helpers import edit, write_split
from tiny_runs import (
    HANG,
    assert_same_run,
    command_error,
    contents,
    flags,
    history,
    last_state,
    make_tiny,
    same,
    script,
    small,
)

import trainer
from models import read_checkpoint
from training import checkpoints, launching
from training.epoch_metrics import EpochMetrics
from training.interruptions import SIGNALS, Stopped
from utils import LossCalculator

pytestmark = pytest.mark.usefixtures("tiny", "signals")
STEPS, BATCHES = 3, 5  # an epoch's steps, and with the batches of validation: 10 and 5 photos by 4
TWO = {"num_epochs": 2, "restart_period": 2}
OFTEN = {"save_every_minutes": 1e-9}
ACCUMULATED = {"batch_size": 2, "grad_accum_steps": 2}


@pytest.fixture
def signals():
    """Restores the handlers: a run that was stopped ignores signals until its process ends, which goes on here."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory):
    """Returns the folder of an undisturbed run of two epochs, on the photos that `coco_root` has."""
    root = tmp_path_factory.mktemp("straight")
    for split, count, first_id in (("train2017", 10, 1), ("val2017", 5, 101)):
        write_split(root / "coco", split, count, first_id)

    def straight(**settings) -> Path:
        folder = root / f"run{settings}"
        if not folder.exists():
            with pytest.MonkeyPatch.context() as patch:
                make_tiny(patch.setattr)
                trainer.main(small(root / "coco", folder, keep_checkpoints=0, **TWO, **settings))
        return folder

    return straight


@pytest.fixture
def straight(straight_run) -> Path:
    return straight_run()


class Killed(BaseException):
    """Stands in for SIGKILL: nothing of the program answers to it."""


def at_batch(monkeypatch, number: int, action) -> None:
    """Calls `action` once so many batches, of training and validation, are computed."""
    counted, update = itertools.count(1), EpochMetrics.update
    monkeypatch.setattr(EpochMetrics, "update", lambda *args: (
        update(*args), action() if next(counted) == number else None))  # fmt: skip


def kill() -> None:
    raise Killed


def interrupt(config: trainer.Config, batch: int, number: int | None = signal.SIGTERM) -> BaseException:
    """Trains until so many batches are computed, then sends a signal, or kills (None). Returns what ended the run."""
    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, batch, (lambda: os.kill(os.getpid(), number)) if number else kill)
        try:
            trainer.main(config)
        except (Stopped, Killed) as error:
            ending = error.with_traceback(None)  # its frames would keep the folder claimed
            ending.__context__ = ending.__cause__ = None
    gc.collect()
    return ending


def position(path: Path) -> tuple[int, int]:
    """Returns the epochs that a checkpoint has done, and the steps of the next one."""
    content = read_checkpoint(path)
    return content["epoch"], content["step"]


def going_on(path: Path, epoch: int, step: int) -> str:
    """Returns how a run says from where it goes on."""
    return f"going on from {path}, after epoch {epoch}" + (f", step {step}" if step else "")


def resume(folder: Path, *arguments: str) -> None:
    """Goes on with nothing said but where the run is, on which device, and this."""
    command = ["trainer.py", "--resume", f"--checkpoint-dir={folder}", "--device=cpu", *arguments]
    assert trainer.run_command(command) == 0


# --- signals and kills ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "settings", "workers", "number", "saved"),
    [
        (1, {}, 0, signal.SIGTERM, [(0, 1), (0, 2)]),  # the first step, and the first one after that
        (3, ACCUMULATED, 0, signal.SIGINT, [(0, 2)]),  # in the middle of the second step
        (4, {}, 2, signal.SIGUSR1, [(0, STEPS)]),  # in the validation
        (BATCHES, {}, 0, signal.SIGTERM, [(1, 1)]),  # the validation's last batch: the next step is the one after it
    ],
    ids=["first step", "mid-epoch", "validation", "between epochs"],
)
def test_stopped_by_a_signal_a_run_ends_with_the_bits_of_a_straight_one(
    batch, settings, workers, number, saved, straight_run, coco_root, tmp_path, capfd
):
    run, name = tmp_path / "run", signal.Signals(number).name
    config = small(coco_root, run, num_workers=workers, resume="newest", **TWO, **settings)
    for epoch, step in saved:
        assert interrupt(config, batch, number).code == 128 + number
        out = capfd.readouterr().out
        assert f"{name}: saving after this step" in out
        assert f"stopped by {name} after epoch {epoch}, step {step}: --resume goes on from there" in out
        assert position(run / "last.pth") == (epoch, step)
    resume(run, "--num-workers=0")
    assert "not bit for bit" not in capfd.readouterr().out
    assert_same_run(run, straight_run(**settings))


@pytest.mark.parametrize(
    ("function", "name", "time"),
    [("replace", "last.pth", 2), ("replace", "best_model.pth", 1), ("replace", "epoch_0001.pth", 1),
     ("link", ".last.pth", 1)],
)  # fmt: skip
def test_killed_within_a_save_a_run_goes_on_from_the_newest(
    function, name, time, straight, coco_root, tmp_path, monkeypatch, capsys
):
    run, real, calls = tmp_path / "run", getattr(os, function), itertools.count(1)

    def killing(source, target):
        if Path(target).name.startswith(name) and next(calls) == time:
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, killing)
        patch.setattr(Path, "unlink", lambda *_args, **_options: None)  # a killed process does not clean up
        interrupt(small(coco_root, run, **OFTEN, **TWO), batch=0)
    newest = max(position(path) for path in run.glob("*.pth") if path.name != "best_model.pth")
    name = "epoch_0001.pth" if newest == (1, 0) else "last.pth"
    capsys.readouterr()
    resume(run)
    assert going_on(run / name, *newest) in capsys.readouterr().out
    assert_same_run(run, straight)


@pytest.mark.parametrize(
    ("batch", "damaged", "used", "saved"),
    [
        (2, [], "last.pth", (0, 1)),
        (BATCHES, [], "last.pth", (0, STEPS)),  # in the validation
        (BATCHES + 1, [], "last.pth", (1, 0)),
        (BATCHES + 3, ["last.pth"], "previous.pth", (1, 1)),
        (BATCHES + 3, ["last.pth", "previous.pth"], "epoch_0001.pth", (1, 0)),
        (BATCHES + 1, ["last.pth"], "epoch_0001.pth", (1, 0)),
        (BATCHES + 1, ["last.pth", "epoch_0001.pth"], "previous.pth", (0, STEPS)),
    ],
)
def test_a_killed_run_goes_on_from_the_newest_checkpoint_that_is_whole(
    batch, damaged, used, saved, straight, coco_root, tmp_path, capsys
):
    run = tmp_path / "run"
    interrupt(small(coco_root, run, **OFTEN, **TWO), batch, None)
    for path in (run / name for name in damaged):
        half = path.read_bytes()[:1000]
        path.unlink()  # hard links to it stay whole
        path.write_bytes(half)
    capsys.readouterr()
    resume(run)
    out = capsys.readouterr().out
    assert all(f"the checkpoint {run / name} is damaged" in out for name in damaged), out
    assert going_on(run / used, *saved) in out
    assert {path.name for path in run.glob("earlier_*/*")} == {*damaged}
    for archive in run.glob("earlier_*"):
        shutil.rmtree(archive)
    assert_same_run(run, straight)


# --- the data and the settings ----------------------------------------------------------------------------


def other_masks(split: str, root: Path) -> str:
    """Returns the same root, of which the annotations of a split have changed."""
    edit(root, lambda content: content["annotations"].reverse(), split=split)
    return str(root)


def another_root(root: Path) -> str:
    """Returns the root and a second one, with photos to validate alone."""
    write_split(root / "more", "val2017", 3, first_id=201)
    return f"{root},{root / 'more'}"


@pytest.mark.parametrize(
    ("change", "split", "photos"),
    [(partial(other_masks, "train2017"), "train2017", 10), (partial(other_masks, "val2017"), "val2017", 5),
     (another_root, "val2017", 5)],
)  # fmt: skip
def test_other_data_are_refused_with_both_checksums(change, split, photos, coco_root, tmp_path, capsys):
    run, path = tmp_path / "run", coco_root / "annotations" / f"instances_{split}.json"
    trainer.main(small(coco_root, run, num_epochs=1))
    before, data = contents(run), read_checkpoint(run / "last.pth")["data"]
    error = command_error(capsys, *flags(small(change(coco_root), run, num_epochs=2, resume="newest")))
    checksum = f"({photos} photos of checksum [0-9a-f]{{8}})"
    said = re.search(f"trained with (.*): {checksum} and cannot go on with {checksum}.*: restore it, or begin a", error)
    assert str(path) in said[1].split(", ")
    assert said[2] == data[f"annotations/{path.name}"]
    assert (said[2] == said[3]) is (change is another_root)  # which comes after it
    assert contents(run) == before


def test_more_photos_are_refused_with_both_numbers(coco_root, tmp_path, capsys):
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=1))
    write_split(coco_root, "train2017", 11, first_id=1)
    more = small(coco_root, tmp_path / "run", num_epochs=2, resume="newest")
    assert "photos: 10 and cannot go on with 11" in command_error(capsys, *flags(more))


@pytest.mark.parametrize("moved", [False, True])
def test_resume_needs_no_flag_of_the_run_again(moved, straight, coco_root, tmp_path, capsys):
    run = tmp_path / "run"
    interrupt(small(coco_root, run, keep_checkpoints=1, **TWO), 2)
    if moved:
        edit(coco_root, lambda content: content.update(info="written anew"))
        coco_root.rename(tmp_path / "moved")
        error = command_error(capsys, "--resume", f"--checkpoint-dir={run}", "--device=cpu")
        assert str(coco_root) in error
        assert "--data-root names another folder" in error
    resume(run, *([f"--data-root={tmp_path / 'moved'}"] if moved else []))
    assert "image_size 32 (384)" in capsys.readouterr().out  # the file has another one, and does not count
    assert_same_run(run, straight)
    assert not (run / "epoch_0001.pth").exists()  # one checkpoint is kept
    settings = [read_checkpoint(folder / "last.pth")["config"] for folder in (run, straight)]
    changed = {name for name in settings[0] if settings[0][name] != settings[1][name]}
    assert changed == {"checkpoint_dir", "resume", "keep_checkpoints", "data_root"}


# --- other learning rates and numbers of epochs -----------------------------------------------------------


def test_other_learning_rates_and_numbers_of_epochs_are_followed_by_all_of_the_optimiser(
    coco_root, tmp_path, learning_rates, capsys
):
    interrupt(small(coco_root, tmp_path, pretrained=True, num_epochs=2), 2)
    learning_rates.clear()
    resume(tmp_path, "--num-epochs=3", "--learning-rate=0.002", "--decoder-lr-mult=5", "--weight-decay=0.25")
    steps = range(2, 3 * STEPS)  # of one cosine cycle over all
    assert learning_rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / STEPS / 3)) for step in steps])
    said = capsys.readouterr().out
    assert "num_epochs 2 is now 3, learning_rate 0.0001 is now 0.002, decoder_lr_mult 10.0 is now 5.0, weight_d" in said
    last = read_checkpoint(tmp_path / "last.pth")
    encoder, decoder = last["optimizer"]["param_groups"]
    assert encoder["weight_decay"] == decoder["weight_decay"] == 0.25
    assert decoder["lr"] == pytest.approx(5 * encoder["lr"])
    assert last["history"][-1]["decoder_learning_rate"] == pytest.approx(5 * last["history"][-1]["learning_rate"])


# --- restarts by torchrun ---------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
def test_a_restart_by_torchrun_goes_on_and_not_back_to_a_file_that_was_named(
    named, straight, coco_root, tmp_path, monkeypatch, capsys
):
    trainer.main(small(coco_root, tmp_path / "first", **{**TWO, "num_epochs": 1}))
    file = str(tmp_path / "first" / "last.pth") if named else ""
    settings = small(coco_root, tmp_path / "run", resume=file, **OFTEN, **TWO)
    interrupt(settings, 3 if named else BATCHES + 3, None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    trainer.main(settings)
    assert going_on(tmp_path / "run" / "last.pth", 1, 2) in capsys.readouterr().out
    ours, expected = last_state(tmp_path / "run"), last_state(straight)
    assert all(same(ours[name], expected[name]) for name in ("model", "optimizer", "ema"))
    ignored = {"best": 0}  # a new folder has a best model of its own
    assert [row | ignored for row in ours["history"]] == [row | ignored for row in expected["history"]]


def test_a_new_launch_by_torchrun_does_not_take_an_earlier_ones_run_for_its_own(coco_root, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what every plain torchrun calls itself
    for name, archives in (("the first", 0), ("the second", 1)):
        monkeypatch.setenv(launching.LAUNCHER, name)
        trainer.main(small(coco_root, tmp_path / "run", num_epochs=1))
        assert len([*(tmp_path / "run").glob("earlier_*/last.pth")]) == archives


# --- numbers that break -----------------------------------------------------------------------------------


def test_ten_skipped_steps_in_a_row_end_a_run_whatever_lies_between_them(coco_root, tmp_path, monkeypatch, capsys):
    forward, batch = LossCalculator.forward, itertools.count(1)

    def broken(*args):
        loss, terms = forward(*args)
        return loss * (math.nan if next(batch) > BATCHES + 1 else 1), terms

    monkeypatch.setattr(LossCalculator, "forward", broken)
    trainer.main(small(coco_root, tmp_path, num_epochs=3, restart_period=9, keep_checkpoints=0))
    settings = small(coco_root, tmp_path, num_epochs=9, restart_period=9, keep_checkpoints=0, resume="newest")
    error = command_error(capsys, *flags(settings))
    assert "10 steps in a row had no finite loss or gradient" in error
    assert f"{tmp_path / 'last.pth'} is the last good checkpoint" in error
    assert [row["skipped_steps"] for row in history(tmp_path)] == ["0", "2", "3", "3"]  # and two of the fifth epoch
    models = [read_checkpoint(tmp_path / f"epoch_{epoch:04d}.pth")["model"] for epoch in (2, 4)]
    assert same(*({name: value for name, value in model.items() if "num" not in name} for model in models))


# --- writing while the training goes on -------------------------------------------------------------------


def test_with_a_full_disk_it_goes_on_and_has_the_right_best_model_afterwards(coco_root, tmp_path, monkeypatch, capsys):
    run, save_epoch, fsync, written = tmp_path / "run", trainer.save_epoch, os.fsync, {}
    # Each epoch waits until all of it is written, or is not.
    monkeypatch.setattr(trainer, "save_epoch", lambda *args: (save_epoch(*args), args[-1]._checkpoints.wait()))

    def no_space(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def before(epoch: int) -> None:
        monkeypatch.setattr(os, "fsync", no_space if epoch in (2, 3) else fsync)
        written.update(contents(run) if epoch == 2 else {})
        assert epoch < 4 or written.items() <= contents(run).items()

    script(monkeypatch, [0.5, 0.9, 0.3, 0.4], before=before)
    trainer.main(small(coco_root, run, num_epochs=4))
    assert "No space left on device: the training goes on, and it will be tried again" in capsys.readouterr().out
    best = read_checkpoint(run / "best_model.pth")
    assert (best["epoch"], best["metrics"]["iou"]) == (2, 0.9)
    assert len(history(run)) == 4
    assert position(run / "last.pth") == (4, 0)


def test_a_signal_is_said_to_have_saved_when_all_is_written(coco_root, tmp_path, monkeypatch, capfd):
    write = checkpoints.write_last
    monkeypatch.setattr(checkpoints, "write_last", lambda *args: (time.sleep(0.3), write(*args), print("written")))
    interrupt(small(coco_root, tmp_path / "run", **TWO), 1)
    out = capfd.readouterr().out
    assert 0 < out.index("written") < out.index("stopped by SIGTERM after epoch 0, step 1: --resume goes on from there")


def test_the_end_of_a_run_waits_and_no_signal_cuts_it_off(coco_root, tmp_path, monkeypatch, capsys):
    write, handlers = checkpoints.write_epoch, []

    def write_slowly(*args: object) -> None:
        time.sleep(0.3)
        handlers.append(signal.getsignal(signal.SIGTERM))
        write(*args)

    monkeypatch.setattr(checkpoints, "write_epoch", write_slowly)
    monkeypatch.setattr(trainer, "finish", lambda *_: print(position(tmp_path / "last.pth")))
    trainer.main(small(coco_root, tmp_path, num_epochs=1))
    assert capsys.readouterr().out.endswith("\n(1, 0)\n")
    assert handlers[0] not in (signal.SIG_DFL, signal.SIG_IGN)  # it leaves a note


# --- in processes of their own ----------------------------------------------------------------------------


def wait_for(path: Path) -> None:
    end = time.monotonic() + HANG
    while not path.exists():
        assert time.monotonic() < end, f"there is no {path}"
        time.sleep(0.05)


# After 30 seconds torchrun kills who is left: on a busy machine they may need more.
PATIENT_TORCHRUN = f"""
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.run import main
PContext.close.__defaults__ = (None, {HANG})
main()
"""


@pytest.mark.slow
def test_a_signal_to_torchrun_ends_all_its_processes_with_everything_saved(coco_root, tmp_path, start_process):
    settings = small(coco_root, tmp_path / "run", num_epochs=1000, batch_size=2, num_workers=1)
    torchrun = ("-c", PATIENT_TORCHRUN, "--standalone", "--nproc-per-node=2")
    process = start_process(*torchrun, "tests/tiny_runs.py", *flags(settings))
    wait_for(tmp_path / "run" / "last.pth")
    pids = process.descendants()
    assert len(pids) >= 5  # torchrun, two ranks, a loader worker each
    process.send_signal(signal.SIGHUP)  # as the end of a terminal; SIGTERM is no other to a run
    out = process.communicate(timeout=2 * HANG)[0]
    assert process.returncode != 0
    assert out.count("stopped by SIGHUP after epoch") == 1, out
    epoch, step = position(tmp_path / "run" / "last.pth")
    assert f"after epoch {epoch}, step {step}: --resume goes on" in out
    assert len(read_checkpoint(tmp_path / "run" / "last.pth")["partial_metrics"]) == 2
    assert not process.descendants()
    memory = os.listdir("/dev/shm")  # of other programs too
    assert not [name for name in memory if any(name.startswith(f"torch_{pid}_") for pid in pids)]


@pytest.mark.slow
def test_without_a_reader_of_its_output_a_run_goes_on_and_saves_at_ctrl_c(coco_root, tmp_path, start_process):
    settings = small(coco_root, tmp_path / "run", num_epochs=1000, save_every_minutes=0, keep_checkpoints=0)
    process = start_process("tests/tiny_runs.py", *flags(settings))
    wait_for(tmp_path / "run" / "last.pth")
    process.stdout.close()
    epoch, _ = position(tmp_path / "run" / "last.pth")
    wait_for(tmp_path / "run" / f"epoch_{epoch + 2:04d}.pth")
    process.send_signal(signal.SIGINT)
    assert process.wait(HANG) == 128 + signal.SIGINT
    assert position(tmp_path / "run" / "last.pth")[1] > 0
