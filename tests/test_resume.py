"""Runs that are stopped, killed, damaged or short of disk: they go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import edit, write_split
from test_runs import ROOT, TIMES, history, same, script, state
from test_trainer import Tiny, flags, quick, refusal, small  # noqa: F401

import trainer
import utils
from training import checkpoints, interruptions, launching, step
from training.interruptions import Stopped
from utils import read_checkpoint

pytestmark = pytest.mark.usefixtures("tiny", "signals")
STEPS, BATCHES = 3, 5  # an epoch's steps of training, and with the batches of validation: 10 and 5 photos by 4
TWO = {"num_epochs": 2, "restart_period": 2}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(trainer, "UNetAutoencoder", Tiny)
    monkeypatch.setattr(trainer, "usable_cores", lambda: 2)


@pytest.fixture
def signals():
    """A run that was stopped ignores further signals until its process ends; the tests go on in it."""
    before = {number: signal.getsignal(number) for number in interruptions.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def straight(coco_root, tmp_path) -> Path:
    trainer.main(small(coco_root, tmp_path / "straight", keep_checkpoints=0, **TWO))
    return tmp_path / "straight"


def after_batch(monkeypatch, number: int, action) -> None:
    """Calls it once so many batches, of training and validation, are computed."""
    counted, update = [], step.Tally.update

    def counting(*args):
        update(*args)
        counted.append(1)
        if len(counted) == number:
            action()

    monkeypatch.setattr(step.Tally, "update", counting)


class Killed(BaseException):
    """Stands in for SIGKILL: nothing of the program answers to it."""


def kill() -> None:
    raise Killed


def run(settings, *endings: type[BaseException]) -> BaseException | None:
    """Trains; returns what ended it, without the frames that would keep the folder claimed."""
    ending = None
    try:
        trainer.main(settings)
    except endings as error:
        ending = error.with_traceback(None)
        ending.__context__ = ending.__cause__ = None
    gc.collect()
    return ending


def assert_the_same(one: Path, other: Path) -> None:
    """Weights, Adam's state, schedule, scores, best model and history.csv, bit for bit, but for the times."""
    assert same(state(one), state(other))
    best = [{**read_checkpoint(folder / "best_model.pth"), "config": None} for folder in (one, other)]
    assert same(*best)
    rows = [[{k: v for k, v in row.items() if k not in TIMES} for row in history(folder)] for folder in (one, other)]
    assert rows[0] == rows[1]
    assert not list(one.glob("earlier_*"))


# --- signals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(1, 2 * BATCHES - 1))
def test_stopped_by_a_signal_at_any_batch_it_ends_with_the_bits_of_the_straight_run(
    number, straight, coco_root, tmp_path, monkeypatch, capfd
):
    which = interruptions.SIGNALS[number % 3]
    with monkeypatch.context() as patch:
        after_batch(patch, number, lambda: os.kill(os.getpid(), which))
        ending = run(small(coco_root, tmp_path / "run", num_workers=2 * (number % 2), **TWO), Stopped)
    if number % BATCHES == 0:  # the last batch of an epoch's validation: the next step is the one after it
        assert read_checkpoint(tmp_path / "run" / "last.pth")["step"] == 1
    assert ending.code == 128 + which
    out = capfd.readouterr().out
    assert f"{which.name}: saving after this step" in out
    assert f"stopped by {which.name} after epoch" in out
    trainer.main(small(coco_root, tmp_path / "run", resume="newest", num_workers=0, **TWO))
    assert "not bit for bit" not in capfd.readouterr().out
    assert_the_same(tmp_path / "run", straight)


def test_stopped_twice_in_an_epoch_it_still_has_the_bits(straight, coco_root, tmp_path, monkeypatch):
    settings = small(coco_root, tmp_path / "run", resume="newest", **TWO)
    for _ in range(2):
        with monkeypatch.context() as patch:
            after_batch(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert run(settings, Stopped)
    assert read_checkpoint(tmp_path / "run" / "last.pth")["step"] == 2
    trainer.main(settings)
    assert_the_same(tmp_path / "run", straight)


def test_with_accumulation_it_goes_on_at_the_right_batch(coco_root, tmp_path, monkeypatch):
    two = {**TWO, "batch_size": 2, "accumulate": 2}
    trainer.main(small(coco_root, tmp_path / "straight", **two))
    with monkeypatch.context() as patch:
        after_batch(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))  # in the middle of the second step
        assert run(small(coco_root, tmp_path / "run", **two), Stopped)
    assert read_checkpoint(tmp_path / "run" / "last.pth")["step"] == 2
    trainer.main(small(coco_root, tmp_path / "run", resume="newest", **two))
    assert_the_same(tmp_path / "run", tmp_path / "straight")


def test_a_signal_is_met_by_an_exit_code(coco_root, tmp_path, monkeypatch):
    after_batch(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    settings = flags(small(coco_root, tmp_path / "run", **TWO))
    assert trainer.run_command(["trainer.py", *settings]) == 130


# --- photos that cannot be read ---------------------------------------------------------------------------

BROKEN = {"max_bad_photos": 0.5, **TWO}


def break_first(coco_root: Path, places: tuple[int, ...]) -> None:
    """Breaks the photos at these places of the first epoch's order."""
    dataset = trainer.COCOPersonDataset(coco_root, "train2017", 32)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    for place in places:
        (coco_root / "train2017" / dataset.index.file_name(order[place])).write_bytes(b"")


@pytest.mark.parametrize("number", [1, 3, 4, BATCHES + 1])  # of training, the last of it, of validation, the next epoch
@pytest.mark.parametrize("workers", [0, 2])
def test_photos_that_were_replaced_before_a_stop_are_counted_after_it(
    number, workers, coco_root, tmp_path, monkeypatch
):
    break_first(coco_root, (1, 3, 8))
    trainer.main(small(coco_root, tmp_path / "straight", **BROKEN))
    with monkeypatch.context() as patch:
        after_batch(patch, number, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(small(coco_root, tmp_path / "run", num_workers=workers, **BROKEN), Stopped)
    trainer.main(small(coco_root, tmp_path / "run", resume="newest", **BROKEN))
    assert [row["train_bad_photos"] for row in history(tmp_path / "run")] == ["3", "3"]
    assert_the_same(tmp_path / "run", tmp_path / "straight")


def test_a_checkpoint_that_does_not_know_them_goes_on(coco_root, tmp_path, monkeypatch):
    break_first(coco_root, (1, 8))
    with monkeypatch.context() as patch:
        after_batch(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(small(coco_root, tmp_path, **BROKEN), Stopped)
    content = read_checkpoint(tmp_path / "last.pth")
    assert len(content["tallies"][0].pop("bad_photos")) == 1
    checkpoints.save(content, tmp_path / "last.pth")
    trainer.main(small(coco_root, tmp_path, resume="newest", **BROKEN))
    assert [row["train_bad_photos"] for row in history(tmp_path)] == ["1", "2"]


# --- kills ------------------------------------------------------------------------------------------------

OFTEN = {"checkpoint_minutes": 1e-9}


@pytest.mark.parametrize("number", range(2, 2 * BATCHES + 1))
def test_killed_at_any_batch_it_loses_nothing_that_was_saved(
    number, straight, coco_root, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        after_batch(patch, number, kill)
        assert run(small(coco_root, tmp_path / "run", **OFTEN, **TWO), Killed)
    last = read_checkpoint(tmp_path / "run" / "last.pth")
    batch = (number - 1) % BATCHES  # of the epoch, those before the one it died in
    expected = ((number - 1) // BATCHES, min(batch, STEPS))
    assert (last["epoch"], last["step"]) == expected
    capsys.readouterr()
    trainer.main(small(coco_root, tmp_path / "run", resume="newest", **OFTEN, **TWO))
    assert f"after epoch {expected[0]}" + (f", step {expected[1]}" if expected[1] else "") in capsys.readouterr().out
    assert_the_same(tmp_path / "run", straight)


def steps_of_a_save(monkeypatch) -> list[str]:
    """What a killed run may have been about to do to the disk: every flush, link, renaming and removal."""
    done = []
    for name in ("fsync", "link", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real, name=name: (done.append(name), check(done), real(*args)))
    return done


def check(done: list[str]) -> None:
    if len(done) == check.last:
        raise Killed


@pytest.mark.parametrize("moment", range(1, 50, 2))
def test_killed_within_a_save_it_goes_on_from_the_newest(moment, straight, coco_root, tmp_path, monkeypatch):
    settings = small(coco_root, tmp_path / "run", resume="newest", keep_checkpoints=0, **OFTEN, **TWO)
    monkeypatch.setattr(check, "last", moment, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_args, **_options: None)  # a killed process does not clear up
        steps_of_a_save(patch)
        killed = run(settings, Killed)
    places = [(c["epoch"], c["step"]) for p in (tmp_path / "run").glob("*.pth")
              if p.name != "best_model.pth" and (c := read_checkpoint(p))]  # fmt: skip
    starts, restore = [], trainer.Run.restore
    monkeypatch.setattr(trainer.Run, "restore", lambda run, path, content: (starts.append(
        (content["epoch"], content["step"])), restore(run, path, content)))  # fmt: skip
    trainer.main(settings)
    assert starts == ([max(places)] if places else [])
    assert killed is not None
    assert_the_same(tmp_path / "run", straight)
    for path in (tmp_path / "run").glob("*.pth"):
        read_checkpoint(path)


# --- damage -----------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()  # damaged is this name, not the inode that it shares
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    weights = read_checkpoint(path)["model"]["0.bias"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(weights) + 1] ^= 16
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize(
    ("batch", "damaged", "used", "place"),
    [
        (BATCHES + 3, ["last.pth"], "previous.pth", "after epoch 1, step 1"),
        (BATCHES + 3, ["last.pth", "previous.pth"], "epoch_0001.pth", "after epoch 1"),
        (BATCHES + 2, ["last.pth"], "epoch_0001.pth", "after epoch 1"),
        (BATCHES + 1, ["last.pth"], "epoch_0001.pth", "after epoch 1"),
        (BATCHES + 1, ["last.pth", "epoch_0001.pth"], "previous.pth", "after epoch 0, step 3"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    damage, batch, damaged, used, place, straight, coco_root, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        after_batch(patch, batch, kill)
        run(small(coco_root, folder, **OFTEN, **TWO), Killed)
    for name in damaged:
        damage(folder / name)
    capsys.readouterr()
    trainer.main(small(coco_root, folder, resume="newest", **OFTEN, **TWO))
    out = capsys.readouterr().out
    assert all(f"the checkpoint {folder / name} is damaged" in out for name in damaged), out
    assert f"going on from {folder / used}, {place}\n" in out
    (aside,) = folder.glob("earlier_*")
    assert sorted(path.name for path in aside.iterdir()) == sorted(damaged)
    shutil.rmtree(aside)
    assert_the_same(folder, straight)


def test_a_damaged_newest_epoch_does_not_cost_the_best_model(coco_root, tmp_path, monkeypatch):
    settings = small(coco_root, tmp_path, num_epochs=3, resume="newest")
    script(monkeypatch, [0.9, 0.2, 0.1, 0.1])
    with monkeypatch.context() as patch:
        after_batch(patch, 2 * BATCHES + 1, kill)
        run(settings, Killed)
    os.truncate(tmp_path / "last.pth", 1000)  # epoch_0002.pth is the same file
    trainer.main(settings)
    best = read_checkpoint(tmp_path / "best_model.pth")
    assert (best["epoch"], best["metrics"]["iou"]) == (1, 0.9)


# --- what may change --------------------------------------------------------------------------------------


def test_other_photos_are_refused_with_both_numbers(coco_root, tmp_path, capsys):
    settings = small(coco_root, tmp_path / "run", num_epochs=1)
    trainer.main(settings)
    write_split(tmp_path / "more", "train2017", 11, first_id=1)
    write_split(tmp_path / "more", "val2017", 5, first_id=101)
    error = refusal(capsys, *flags(small(tmp_path / "more", tmp_path / "run", num_epochs=2, resume="newest")))
    assert "photos: 10 and cannot go on with 11" in error


def mirror(content: dict) -> None:
    """Other masks on the same photos."""
    for annotation in content["annotations"]:
        if isinstance(annotation["segmentation"], list):
            annotation["segmentation"] = [[8 + value for value in polygon] for polygon in annotation["segmentation"]]


def rename(content: dict) -> None:
    """The photo without a person changes places with one that has some."""
    images = {image["id"]: image for image in content["images"]}
    first, last = images[min(images)], images[max(images)]
    first["file_name"], last["file_name"] = last["file_name"], first["file_name"]


def swap(content: dict) -> None:
    """The same photos in another order."""
    content["annotations"].reverse()


@pytest.mark.parametrize("split", ["train2017", "val2017"])
@pytest.mark.parametrize("change", [mirror, rename, swap])
def test_other_data_of_as_many_photos_is_refused_with_both_checksums(change, split, coco_root, tmp_path, capsys):
    settings = small(coco_root, tmp_path / "run", num_epochs=1)
    trainer.main(settings)
    data = read_checkpoint(tmp_path / "run" / "last.pth")["data"]
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    path = edit(coco_root, change, split=split)
    error = refusal(capsys, *flags(dataclasses.replace(settings, num_epochs=2, resume="newest")))
    said = re.search(r"trained with (\S+): (.*) and cannot go on with (.*): restore it, or begin a new run", error)
    photos = 10 if split == "train2017" else 5
    assert said[1] == str(path)
    assert said[2] == data[f"annotations/{path.name}"] != said[3]
    assert all(re.fullmatch(rf"{photos} photos of checksum [0-9a-f]{{8}}", text) for text in said.groups()[1:])
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_the_same_data_at_another_place_and_time_is_no_other_data(straight, coco_root, tmp_path, monkeypatch):
    settings = small(coco_root, tmp_path / "run", **TWO)
    with monkeypatch.context() as patch:
        after_batch(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(settings, Stopped)
    edit(coco_root, lambda content: content.update(info="written anew"))
    coco_root.rename(tmp_path / "moved")
    trainer.main(small(tmp_path / "moved", tmp_path / "run", resume="newest", **TWO))
    assert_the_same(tmp_path / "run", straight)


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_other_data_in_one_of_two_roots_is_refused(split, coco_root, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(coco_root, other)
    edit(other, mirror)
    settings = small(f"{coco_root},{other}", tmp_path / "run", num_epochs=1)
    trainer.main(settings)
    settings = dataclasses.replace(settings, num_epochs=2, resume="newest")
    swapped = refusal(capsys, *flags(dataclasses.replace(settings, data_root=f"{other},{coco_root}")))
    sums = re.findall(r"10 photos of checksum ([0-9a-f]{8})", swapped)
    assert sums[:2] == sums[:1:-1]
    content, path = (other / "annotations" / f"instances_{split}.json").read_text(), edit(other, rename, split=split)
    error = refusal(capsys, *flags(settings))
    assert f"{coco_root / 'annotations' / path.name}, {path}: " in error
    before, after = (re.findall("checksum ([0-9a-f]{8})", part) for part in error.split(" and cannot go on with "))
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False]
    path.write_text(content)
    trainer.main(settings)
    assert read_checkpoint(tmp_path / "run" / "last.pth")["epoch"] == 2


def test_a_second_root_that_brings_photos_to_validate_alone_is_another_run(coco_root, tmp_path, capsys):
    settings = small(coco_root, tmp_path / "run", num_epochs=1)
    trainer.main(settings)
    write_split(tmp_path / "other", "val2017", 3, first_id=201)
    more = dataclasses.replace(settings, data_root=f"{coco_root},{tmp_path / 'other'}", num_epochs=2, resume="newest")
    assert "instances_val2017.json: 5 photos of checksum" in refusal(capsys, *flags(more))


def test_a_checkpoint_that_knows_no_checksum_goes_on(coco_root, tmp_path):
    settings = small(coco_root, tmp_path, num_epochs=1)
    trainer.main(settings)
    content = read_checkpoint(tmp_path / "last.pth")
    data = content.pop("data")
    checkpoints.save(content, tmp_path / "last.pth")
    trainer.main(dataclasses.replace(settings, num_epochs=2, resume="newest"))
    assert read_checkpoint(tmp_path / "last.pth")["data"] == data


def test_what_changed_and_does_no_harm_is_said(coco_root, tmp_path, capsys):
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=1))
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=2, num_workers=1, resume="newest"))
    out = capsys.readouterr().out
    assert "num_workers 0 is now 1" in out
    assert "num_epochs 1 is now 2" in out
    assert "bit for bit" not in out
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=3, batch_size=5, resume="newest"))
    assert "batch_size 4 is now 5" in capsys.readouterr().out


def goes_on(run_folder: Path, *typed: str) -> None:
    """With nothing typed but where the run is, on which device, and this."""
    command = ["trainer.py", "--resume", f"--checkpoint-dir={run_folder}", "--device=cpu", *typed]
    assert trainer.run_command(command) == 0


@pytest.mark.parametrize("moved", [False, True])
def test_resume_needs_no_flag_of_the_run_again(moved, straight, coco_root, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        after_batch(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(small(coco_root, tmp_path / "run", keep_checkpoints=1, **TWO), Stopped)
    if moved:
        coco_root.rename(tmp_path / "moved")
    goes_on(tmp_path / "run", *([f"--data-root={tmp_path / 'moved'}"] if moved else []))
    assert_the_same(tmp_path / "run", straight)
    assert not (tmp_path / "run" / "epoch_0001.pth").exists()  # one checkpoint is kept
    settings = [read_checkpoint(folder / "last.pth")["config"] for folder in (tmp_path / "run", straight)]
    changed = {name for name in settings[0] if settings[0][name] != settings[1][name]}
    assert changed == {"checkpoint_dir", "resume", "keep_checkpoints"} | ({"data_root"} if moved else set())
    assert "image_size 32 (384)" in capsys.readouterr().out  # the file has another one, and does not count


def test_with_nothing_to_resume_the_flags_and_the_file_count(coco_root, tmp_path):
    typed = flags(small(coco_root, tmp_path / "run", num_epochs=1, resume="newest"))
    assert trainer.run_command(["trainer.py", *typed]) == 0
    assert read_checkpoint(tmp_path / "run" / "last.pth")["config"]["image_size"] == 32


def test_data_that_are_not_there_any_more_are_named_with_the_flag_that_says_where_they_are(coco_root, tmp_path, capsys):
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=1))
    coco_root.rename(tmp_path / "moved")
    error = refusal(capsys, "--resume", f"--checkpoint-dir={tmp_path / 'run'}", "--device=cpu")
    assert str(coco_root) in error
    assert "--data-root names another folder" in error


def test_another_process_has_the_settings_of_the_main_ones_checkpoint(coco_root, tmp_path, monkeypatch):
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=1))
    main, other = (trainer.Config(checkpoint_dir=str(tmp_path / name), resume="newest") for name in ("run", "none"))
    on_main, told = utils.on_main, []
    monkeypatch.setattr(utils, "on_main", lambda *args: told.append(on_main(*args)) or told[0])
    with trainer.RunFolder(tmp_path / "run", 0) as folder:
        config, found = trainer.find_start(main, [], trainer.Processes(torch.device("cpu")), folder)
    monkeypatch.setattr(utils, "on_main", lambda *_: told[0])
    elsewhere, same_found = trainer.find_start(other, [], None, None)
    assert (config.image_size, found[1]["epoch"]) == (32, 1)
    assert dataclasses.replace(elsewhere, checkpoint_dir=config.checkpoint_dir) == config
    assert elsewhere.checkpoint_dir == other.checkpoint_dir
    assert same_found is found


def rates_of(monkeypatch, *command: str) -> list[float]:
    """Of each step that is done."""
    rates, end_step = [], trainer.Run.end_step
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Run, "end_step", lambda run, *args: (
            rates.append(run.optimizer.param_groups[0]["lr"]), end_step(run, *args)))  # fmt: skip
        goes_on(*command)
    return rates


def wave(rate: float, epochs: int) -> list[float]:
    """A cosine cycle over so many epochs of three steps."""
    return [rate * (1 + math.cos(math.pi * step / STEPS / epochs)) / 2 for step in range(STEPS * epochs)]


@pytest.mark.parametrize(
    ("typed", "rate", "told"), [([], 1e-4, "0.0001"), (["--learning-rate=0.002"], 2e-3, "0.002")]
)
def test_epochs_that_are_added_to_a_run_that_was_through_are_a_cycle_of_their_own(
    typed, rate, told, coco_root, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    trainer.main(small(coco_root, folder, num_epochs=1))
    shutil.copytree(folder, tmp_path / "other")
    capsys.readouterr()
    rates = rates_of(monkeypatch, folder, "--num-epochs=3", *typed)
    assert rates == pytest.approx(wave(rate, 2))
    told += ", in a last cosine cycle from epoch 2 to the end of epoch 3,"
    assert told in " ".join(capsys.readouterr().out.split())
    with monkeypatch.context() as patch:  # stopped in it, it goes on as if nothing had been, whether typed again or not
        after_batch(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        command = ["trainer.py", "--resume", f"--checkpoint-dir={tmp_path / 'other'}", "--device=cpu", *typed]
        assert trainer.run_command([*command, "--num-epochs=3"]) == 128 + signal.SIGTERM
    assert rates_of(monkeypatch, tmp_path / "other", *typed) == rates[2:]
    assert_the_same(tmp_path / "other", folder)


def test_another_rate_and_penalty_are_followed_by_all_of_the_optimiser(coco_root, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        after_batch(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(small(coco_root, tmp_path / "run", pretrained=True, **TWO), Stopped)
    typed = ("--learning-rate=0.002", "--decoder-rate=5", "--weight-decay=0.25")
    assert rates_of(monkeypatch, tmp_path / "run", *typed) == pytest.approx(wave(2e-3, 2)[2:])
    assert "learning_rate 0.0001 is now 0.002, decoder_rate 10.0 is now 5.0, weight_decay" in capsys.readouterr().out
    last = read_checkpoint(tmp_path / "run" / "last.pth")
    groups = last["optimizer"]["param_groups"]
    assert [(group["initial_lr"], group["weight_decay"]) for group in groups] == [(0.002, 0.25), (0.01, 0.25)]
    assert last["scheduler"]["base_lrs"] == [0.002, 0.01]
    assert last["history"][-1]["decoder_learning_rate"] == pytest.approx(5 * last["history"][-1]["learning_rate"])


def test_a_run_on_its_way_that_is_given_more_epochs_ends_its_last_cycle_with_them(coco_root, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        after_batch(patch, BATCHES + 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(small(coco_root, tmp_path / "run", num_epochs=2), Stopped)
    rates = rates_of(monkeypatch, tmp_path / "run", "--num-epochs=3")
    assert rates == pytest.approx(wave(1e-4, 3)[STEPS + 1 :])


def test_cycles_that_were_asked_for_go_on_as_they_were(coco_root, tmp_path, monkeypatch):
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=1, restart_period=1, restart_mult=1))
    assert rates_of(monkeypatch, tmp_path / "run", "--num-epochs=2") == pytest.approx(wave(1e-4, 1))


def test_a_checkpoint_that_is_older_than_a_setting_goes_on_as_it_was_trained(coco_root, tmp_path):
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=1, pretrained=True, decoder_rate=1.0, average_decay=0.0,
                       contour_weight=0.0, copy_paste=0))  # fmt: skip
    content = read_checkpoint(tmp_path / "run" / "last.pth")
    for name in ("decoder_rate", "average_decay", "contour_weight", "copy_paste", "annotations", "sample"):
        del content["config"][name]
    content["config"]["of_another_program"] = 1
    checkpoints.save(content, tmp_path / "run" / "last.pth")
    goes_on(tmp_path / "run", "--num-epochs=2")
    after = read_checkpoint(tmp_path / "run" / "last.pth")
    names = ("decoder_rate", "contour_weight", "copy_paste")
    assert [after["config"][name] for name in names] == [1.0, 0.0, 0.0]
    assert "average" not in after
    assert after["epoch"] == 2


def test_a_restart_by_torchrun_goes_on_without_being_asked(straight, coco_root, tmp_path, monkeypatch):
    settings = small(coco_root, tmp_path / "run", **OFTEN, **TWO)
    with monkeypatch.context() as patch:
        after_batch(patch, BATCHES + 3, kill)
        run(settings, Killed)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    trainer.main(settings)
    assert_the_same(tmp_path / "run", straight)


def test_a_new_launch_by_torchrun_does_not_take_an_earlier_ones_run_for_its_own(coco_root, tmp_path, monkeypatch):
    settings = small(coco_root, tmp_path / "run", num_epochs=1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what every plain torchrun calls itself
    monkeypatch.setenv(launching.LAUNCHER, "the first")
    trainer.main(settings)
    assert not list((tmp_path / "run").glob("earlier_*"))
    monkeypatch.setenv(launching.LAUNCHER, "the second")
    trainer.main(settings)
    (aside,) = (tmp_path / "run").glob("earlier_*")
    assert (aside / "last.pth").exists()


def test_a_restart_does_not_go_back_to_the_file_that_was_given(coco_root, tmp_path, monkeypatch, capsys):
    trainer.main(small(coco_root, tmp_path / "first", **{**TWO, "num_epochs": 1}))
    settings = small(coco_root, tmp_path / "run", resume=str(tmp_path / "first" / "last.pth"), **OFTEN, **TWO)
    with monkeypatch.context() as patch:
        after_batch(patch, 3, kill)
        run(settings, Killed)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    trainer.main(settings)
    assert f"going on from {tmp_path / 'run' / 'last.pth'}, after epoch 1, step 2" in capsys.readouterr().out


def test_a_restart_that_passes_over_a_damaged_checkpoint_moves_nothing_else(coco_root, tmp_path, monkeypatch, capsys):
    run_folder = tmp_path / "run"
    trainer.main(small(coco_root, run_folder, **{**TWO, "num_epochs": 3}))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    os.truncate(run_folder / "last.pth", 1000)  # and epoch_0003.pth
    best = (run_folder / "best_model.pth").read_bytes()
    trainer.main(small(coco_root, run_folder, resume=str(run_folder / "epoch_0001.pth"), **{**TWO, "num_epochs": 2}))
    assert f"going on from {run_folder / 'epoch_0002.pth'}, after epoch 2" in capsys.readouterr().out
    (aside,) = run_folder.glob("earlier_*")
    assert sorted(path.name for path in aside.iterdir()) == ["epoch_0003.pth", "last.pth"]
    assert (run_folder / "best_model.pth").read_bytes() == best


# --- numbers that break -----------------------------------------------------------------------------------


def break_losses(monkeypatch, first: int) -> None:
    """From this batch on, of training and validation, no loss is finite."""
    forward, batch = utils.LossCalculator.forward, itertools.count(1)

    def broken(*args):
        loss, terms = forward(*args)
        return loss * (math.nan if next(batch) >= first else 1), terms

    monkeypatch.setattr(utils.LossCalculator, "forward", broken)


def test_ten_broken_steps_in_a_row_name_the_last_good_checkpoint_and_it_is_good(
    coco_root, tmp_path, monkeypatch, capsys
):
    write_split(coco_root, "train2017", 24, first_id=1)
    two = {"batch_size": 2, "resume": "newest", **TWO}  # twelve steps of training, three batches of validation
    trainer.main(small(coco_root, tmp_path / "straight", **two))
    with monkeypatch.context() as patch:
        break_losses(patch, 12 + 3 + 2)
        error = refusal(capsys, *flags(small(coco_root, tmp_path / "run", **two)))
    assert error.startswith("trainer.py: error: 10 steps in a row had no finite loss or gradient")
    good = tmp_path / "run" / "last.pth"
    assert f"{good} is the last good checkpoint" in error
    assert (read_checkpoint(good)["epoch"], read_checkpoint(good)["step"]) == (1, 0)
    trainer.main(small(coco_root, tmp_path / "run", **two))
    assert_the_same(tmp_path / "run", tmp_path / "straight")


def test_ten_in_a_row_are_counted_over_epochs_that_have_fewer_steps(coco_root, tmp_path, monkeypatch, capsys):
    break_losses(monkeypatch, BATCHES + 2)
    error = refusal(capsys, *flags(small(coco_root, tmp_path, num_epochs=9, keep_checkpoints=0)))
    assert f"10 steps in a row had no finite loss or gradient; {tmp_path / 'last.pth'} is the last good" in error
    assert [row["skipped_steps"] for row in history(tmp_path)] == ["0", "2", "3", "3"]  # and two of the fifth epoch
    models = [read_checkpoint(tmp_path / f"epoch_{epoch:04d}.pth")["model"] for epoch in (2, 3, 4)]
    weights = [{name: value for name, value in model.items() if "num" not in name} for model in models]
    assert all(same(weights[0], other) for other in weights)


def test_broken_steps_before_a_stop_count_with_those_after_it(coco_root, tmp_path, monkeypatch, capsys):
    break_losses(monkeypatch, 1)
    trainer.main(small(coco_root, tmp_path, num_epochs=2))
    error = refusal(capsys, *flags(small(coco_root, tmp_path, num_epochs=9, resume="newest", keep_checkpoints=0)))
    assert "10 steps in a row" in error
    assert [row["skipped_steps"] for row in history(tmp_path)] == ["3", "3", "3"]  # and the first of the fourth epoch


def test_where_there_is_no_checkpoint_yet_none_is_named(coco_root, tmp_path, monkeypatch, capsys):
    break_losses(monkeypatch, 1)
    error = refusal(capsys, *flags(small(coco_root, tmp_path, batch_size=1, image_size=64)))
    assert "10 steps in a row" in error
    assert "there is no checkpoint yet" in error
    assert not (tmp_path / "last.pth").exists()


# --- a full disk ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(monkeypatch):
    """Whatever is flushed to it fails, as it does where the file system allots late."""
    with monkeypatch.context() as patch:

        def fail(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "fsync", fail)
        yield patch


def wait_after_each_epoch(monkeypatch) -> None:
    """Until all of it is written, or is not."""
    write_down = trainer.write_down
    monkeypatch.setattr(trainer, "write_down", lambda *args: (write_down(*args), args[-1]._writer.rest()))


def test_with_a_full_disk_it_goes_on_and_has_the_right_best_model_afterwards(coco_root, tmp_path, monkeypatch, capsys):
    ious, written = iter([0.5, 0.9, 0.3, 0.4]), {}
    real, evaluate = os.fsync, trainer.validate
    full = {"until": 0, "epoch": 0}
    wait_after_each_epoch(monkeypatch)

    def fsync(descriptor):
        if full["epoch"] in (2, 3):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    def scripted(*args):
        full["epoch"] += 1
        if full["epoch"] == 2:
            written.update({p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()})
        if full["epoch"] == 4:
            assert written.items() <= {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}.items()
        return {**evaluate(*args), "iou": next(ious)}

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(trainer, "validate", scripted)
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=4))
    out = capsys.readouterr().out
    assert "No space left on device: the training goes on, and it will be tried again" in out
    best = read_checkpoint(tmp_path / "run" / "best_model.pth")
    assert (best["epoch"], best["metrics"]["iou"]) == (2, 0.9)
    assert len(history(tmp_path / "run")) == 4
    assert read_checkpoint(tmp_path / "run" / "last.pth")["epoch"] == 4


def test_a_disk_full_from_the_first_epoch_on_does_not_make_a_later_one_the_best(coco_root, tmp_path, monkeypatch):
    script(monkeypatch, [0.9, 0.2])
    waits = []

    with full_disk(monkeypatch) as patch:

        def make_room(seconds):
            waits.append(seconds)
            patch.setattr(os, "fsync", lambda _: None)

        patch.setattr(time, "sleep", make_room)
        trainer.main(small(coco_root, tmp_path / "run", **TWO))  # at its end it insists
    assert waits == [interruptions.RETRY_SECONDS]
    assert read_checkpoint(tmp_path / "run" / "best_model.pth")["epoch"] == 1
    assert read_checkpoint(tmp_path / "run" / "last.pth")["epoch"] == 2
    assert len(history(tmp_path / "run")) == 2


def test_a_run_that_never_finds_room_ends_with_one_line(coco_root, tmp_path, monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with full_disk(monkeypatch):
        error = refusal(capsys, *flags(small(coco_root, tmp_path / "run", num_epochs=1)))
    assert "the last epoch cannot be written" in error
    assert sum(waits) == 3600


def test_after_a_failed_save_the_next_step_does_not_wait_a_quarter_of_an_hour(coco_root, tmp_path, monkeypatch):
    monkeypatch.setattr(interruptions, "RETRY_SECONDS", 0.0)
    wait_after_each_epoch(monkeypatch)
    saves = []
    real = checkpoints.write_last
    monkeypatch.setattr(checkpoints, "write_epoch", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    monkeypatch.setattr(checkpoints, "write_last", lambda *args: (saves.append(1), real(*args)))
    monkeypatch.setattr(checkpoints.RunFolder, "insist", lambda *_: None)
    trainer.main(small(coco_root, tmp_path / "run", **TWO))
    assert saves == [1]  # the first step after the epoch that failed; then the clock is set anew


# --- written while the training goes on -------------------------------------------------------------------


def slowly(monkeypatch, before) -> None:
    """Calls it, in the thread that writes, before each checkpoint of a whole epoch."""
    write = checkpoints.write_epoch
    monkeypatch.setattr(checkpoints, "write_epoch", lambda *args: (before(), write(*args)))


def test_the_training_goes_on_while_the_state_of_before_is_written(straight, coco_root, tmp_path, monkeypatch):
    two_steps_later, waits = threading.Event(), []
    after_batch(monkeypatch, BATCHES + 2, two_steps_later.set)
    slowly(monkeypatch, lambda: waits.append(two_steps_later.wait(30)))
    trainer.main(small(coco_root, tmp_path / "run", keep_checkpoints=0, **TWO))
    assert waits == [True, True]  # else nothing went on until the first one was written
    assert_the_same(tmp_path / "run", straight)
    for name in ("epoch_0001.pth", "epoch_0002.pth"):
        ours, theirs = (read_checkpoint(folder / name) for folder in (tmp_path / "run", straight))
        assert all(same(ours[part], theirs[part]) for part in ("model", "optimizer", "average", "scheduler"))


def test_what_cannot_be_written_is_told_at_the_next_step_and_tried_again(coco_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(interruptions, "RETRY_SECONDS", 0.0)
    failed, outs, write = threading.Event(), [], checkpoints.write_last

    def full():
        if not failed.is_set():
            failed.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def look(*args):
        outs.append((args[1]["step"], capsys.readouterr().out))
        write(*args)

    slowly(monkeypatch, full)
    monkeypatch.setattr(checkpoints, "write_last", look)
    after_batch(monkeypatch, BATCHES + 1, lambda: (failed.wait(30), time.sleep(0.1)))
    trainer.main(small(coco_root, tmp_path / "run", **TWO))
    ((step, out),) = outs
    assert step == 1
    assert "No space left on device: the training goes on, and it will be tried again" in out


def test_a_signal_is_said_to_have_saved_when_all_is_written(coco_root, tmp_path, monkeypatch, capfd):
    write = checkpoints.write_last
    monkeypatch.setattr(checkpoints, "write_last", lambda *args: (time.sleep(0.3), write(*args), print("written")))
    after_batch(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(small(coco_root, tmp_path / "run", **TWO), Stopped)
    out = capfd.readouterr().out
    assert 0 < out.index("written") < out.index("stopped by SIGTERM after epoch 0, step 1: --resume goes on from there")


def test_the_end_of_a_run_waits_and_no_signal_cuts_it_off(coco_root, tmp_path, monkeypatch, capsys):
    handlers = []
    slowly(monkeypatch, lambda: (time.sleep(0.3), handlers.append(signal.getsignal(signal.SIGTERM))))
    monkeypatch.setattr(trainer, "finish", lambda *_: print(read_checkpoint(tmp_path / "run" / "last.pth")["epoch"]))
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=1))
    assert capsys.readouterr().out.endswith("\n1\n")
    assert handlers[0] not in (signal.SIG_DFL, signal.SIG_IGN)  # it leaves a note


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_bug_in_what_writes_ends_the_run_at_the_next_step_or_at_its_end(epochs, coco_root, tmp_path, monkeypatch):
    met, batches = threading.Event(), []
    slowly(monkeypatch, lambda: (met.set(), 1 / 0))
    after_batch(monkeypatch, BATCHES + 1, lambda: (met.wait(30), time.sleep(0.1)))
    after_batch(monkeypatch, BATCHES + 2, lambda: batches.append("too many"))
    assert run(small(coco_root, tmp_path / "run", num_epochs=epochs), ZeroDivisionError)
    assert not batches


# --- in processes of their own ----------------------------------------------------------------------------

# Trains the small stand-in as trainer.py does; DIE_AT is "rank batch file": that rank kills itself there, once.
TINY_RUN = """
import os, signal, sys, time, torch
sys.path.insert(0, "tests")
torch.set_num_threads(1)
import trainer
from test_trainer import Tiny
from training import launching, step
trainer.UNetAutoencoder, trainer.usable_cores = Tiny, lambda: 2
update, counted = step.Tally.update, []
die_rank, die_at, mark = os.environ.get("DIE_AT", "-1 0 x").split()
def counting(*args):
    update(*args)
    counted.append(1)
    time.sleep(float(os.environ.get("SLOW", 0)))
    if os.environ.get("RANK", "0") == die_rank and len(counted) == int(die_at) and not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
step.Tally.update = counting
if __name__ == "__main__" and (gpus := os.environ.get("GPUS")):  # that are not there: processes for as many, on the CPU
    torch.cuda.device_count, count = lambda: int(gpus), torch.cuda.device_count
    launching.use_every_gpu(sys.argv, "cuda")
    torch.cuda.device_count = count
if seen := os.environ.get("SEEN"):  # without augmentation sums tell the photos apart
    open_data = trainer.open_data
    def plain(*args):
        loaders = open_data(*args)
        loaders[0].dataset.dataset._augment = None
        return loaders
    trainer.open_data = plain
    to_device = trainer.to_device
    def noting(batch, *rest):
        if torch.is_grad_enabled():
            with open(f"{seen}.{os.environ.get('RANK', 0)}", "a") as file:
                file.writelines(f"{int(photo[:3].sum())}\\n" for photo in batch)
        return to_device(batch, *rest)
    trainer.to_device = noting
if __name__ == "__main__":  # a loader worker may import it again
    sys.exit(trainer.run_command(["trainer.py", *sys.argv[1:]]))
"""


def command(tmp_path, settings, *launcher: str) -> list[str]:
    (tmp_path / "tiny_run.py").write_text(TINY_RUN)
    start = ["-m", "torch.distributed.run", "--standalone", *launcher] if launcher else []
    return [sys.executable, *start, str(tmp_path / "tiny_run.py"), *flags(settings)]


def popen(tmp_path, settings, *launcher: str, **environment: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command(tmp_path, settings, *launcher), cwd=ROOT, env=environment, **pipes)


def left_over(word: str) -> dict[int, str]:
    """The command lines of the processes that name it, by their numbers."""
    lines = {}
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines[int(place.parent.name)] = place.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return {number: line for number, line in lines.items() if word in line}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_torchrun_ends_all_within_ten_seconds_with_everything_saved(number, coco_root, tmp_path):
    settings = small(coco_root, tmp_path / "run", num_epochs=1000, batch_size=2, num_workers=1)
    begin = time.monotonic()
    process = popen(tmp_path, settings, "--nproc-per-node=2", SLOW="0.05")
    wait_for(tmp_path / "run" / "last.pth")
    processes = left_over(str(tmp_path))
    start = time.monotonic()
    process.send_signal(number)
    out = process.communicate(timeout=100)[0]
    # The same processes' start is the measure of a machine that others load: an end has less to do.
    assert time.monotonic() - start < max(10, start - begin)
    assert "forcefully" not in out, out  # torchrun loses its patience after 30 seconds, and kills who is left
    assert process.returncode != 0
    assert out.count(f"stopped by {number.name} after epoch") == 1, out
    last = read_checkpoint(tmp_path / "run" / "last.pth")
    assert f"after epoch {last['epoch']}, step {last['step']}: --resume goes on" in out
    assert len(last["tallies"]) == 2
    assert not left_over(str(tmp_path))
    memory = os.listdir("/dev/shm")  # of other programs too
    assert not [name for name in memory if any(name.startswith(f"torch_{one}_") for one in processes)]


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"there is no {path}"
        time.sleep(0.05)


def test_one_process_more_goes_on_with_the_photos_that_are_left(coco_root, tmp_path, monkeypatch):
    write_split(coco_root, "train2017", 12, first_id=1)  # two processes, with batches of two: counts divide
    settings = small(coco_root, tmp_path / "run", batch_size=2, num_epochs=1)
    monkeypatch.setattr(trainer, "open_data", without_augmentation(trainer.open_data))
    with monkeypatch.context() as patch:
        after_batch(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(settings, Stopped)
    dataset = trainer.COCOPersonDataset(coco_root, "train2017", 32)
    order = list(trainer.make_loader(dataset, 2, 0, training=True).sampler)
    shown = {index: int(dataset[index][:3].sum()) for index in order}
    assert len(set(shown.values())) == 12  # their sums tell them apart
    more = small(coco_root, tmp_path / "run", batch_size=2, num_epochs=1, resume="newest")
    process = popen(tmp_path, more, "--nproc-per-node=2", SEEN=str(tmp_path / "seen"))
    out = process.communicate(timeout=100)[0]
    assert process.returncode == 0, out
    assert "after epoch 0, step 2, processes 1 is now 2 (so not bit for bit" in out
    seen = [int(line) for rank in (0, 1) for line in (tmp_path / f"seen.{rank}").read_text().splitlines()]
    assert Counter(seen) == Counter(shown[index] for index in order[4:])


def without_augmentation(open_data):
    def plain(*args):
        loaders = open_data(*args)
        loaders[0].dataset.dataset._augment = None
        return loaders

    return plain


def test_a_killed_runs_workers_do_not_keep_its_folder(coco_root, tmp_path):
    settings = small(coco_root, tmp_path / "run", num_epochs=1000, num_workers=2, **OFTEN)
    process = popen(tmp_path, settings)
    wait_for(tmp_path / "run" / "last.pth")
    process.kill()
    process.wait()
    checkpoints.claim(tmp_path / "run").close()
    process.stdout.close()


def test_a_reader_of_the_output_that_ends_does_not_end_the_training(coco_root, tmp_path):
    settings = small(coco_root, tmp_path / "run", num_epochs=4, checkpoint_minutes=0)
    process = popen(tmp_path, settings, SLOW="0.05")
    wait_for(tmp_path / "run" / "epoch_0001.pth")
    process.stdout.close()
    assert process.wait(60) == 0
    assert read_checkpoint(tmp_path / "run" / "last.pth")["epoch"] == 4


def test_a_training_in_a_thread_is_the_same_one(straight, coco_root, tmp_path):
    settings = small(coco_root, tmp_path / "run", num_workers=1, keep_checkpoints=0, **TWO)
    codes = []
    command = ["trainer.py", *flags(settings)]
    thread = threading.Thread(target=lambda: codes.append(trainer.run_command(command)))
    thread.start()
    thread.join()
    assert codes == [0]
    assert_the_same(tmp_path / "run", straight)


def test_ctrl_c_that_ends_the_reader_of_the_output_as_well_still_saves(coco_root, tmp_path):
    settings = small(coco_root, tmp_path / "run", num_epochs=1000, checkpoint_minutes=0)
    process = popen(tmp_path, settings, SLOW="0.05")
    wait_for(tmp_path / "run" / "last.pth")
    time.sleep(0.1)  # the epoch's line comes after its checkpoint
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    process.wait(20)
    assert read_checkpoint(tmp_path / "run" / "last.pth")["step"] > 0
