"""Whole trainings: what they leave behind, the same bits again, and folders that hold an earlier run."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from tiny_runs import command_error, contents, flags, history, last_state, run_of, same, script, small, unwatched

import trainer
from datasets import COCOPersonDataset, make_loader
from models import CheckpointError, UNetAutoencoder, read_checkpoint
from tools import make_sample
from training import checkpoints, pictures, resuming
from training.pictures import save_curves

pytestmark = pytest.mark.usefixtures("tiny")
TWO = {"num_epochs": 2, "restart_period": 2, "learning_rate": 2e-3}  # a resume after one is within a cycle


@pytest.mark.slow
def test_a_real_run_leaves_its_files_and_resumed_the_same_bits(coco_root, tmp_path, monkeypatch):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    monkeypatch.setattr(trainer, "UNetAutoencoder", UNetAutoencoder)
    monkeypatch.setattr(pictures, "save_curves", save_curves)
    trainer.main(small(coco_root, straight, keep_checkpoints=1, **TWO))
    models = {"best_model.pth", "epoch_0002.pth", "last.pth"}
    assert {path.name for path in straight.iterdir()} == {
        *models, ".lock", "history.csv", "preview.png", "curves.png", "data.png", "run.json"}  # fmt: skip
    assert [row["epoch"] for row in history(straight)] == ["1", "2"]
    for picture in ("preview.png", "curves.png", "data.png"):
        assert (straight / picture).read_bytes().startswith(b"\x89PNG")

    best, model = read_checkpoint(straight / "best_model.pth"), UNetAutoencoder("resnet18", pretrained=False)
    ious = [float(row["val_iou"]) for row in history(straight)]
    assert len(set(ious)) > 1
    assert best["epoch"] == 1 + ious.index(max(ious))
    model.load_state_dict(best["model"])
    loader = make_loader(COCOPersonDataset(coco_root, "val2017", 32), 2, 0, training=False)
    metrics = trainer.validate(run := run_of(model), loader, unwatched(run))
    assert metrics == pytest.approx(best["metrics"], abs=1e-6)

    trainer.main(small(coco_root, resumed, **{**TWO, "num_epochs": 1}))
    trainer.main(small(coco_root, resumed, resume="newest", **TWO))
    assert same(last_state(resumed), last_state(straight))
    assert len(history(resumed)) == 2


def test_a_last_batch_of_one_photo_does_not_break_batchnorm(coco_root, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "UNetAutoencoder", UNetAutoencoder)
    # Batches of 3, 3, 3 and 1; the deepest features have one pixel.
    trainer.main(small(coco_root, tmp_path, num_epochs=1, batch_size=3, encoder="mobilenet_v2"))
    assert int(read_checkpoint(tmp_path / "last.pth")["optimizer"]["state"][0]["step"]) == 3


@pytest.mark.usefixtures("coco_root")
def test_a_sample_run_draws_its_own_photos_into_the_first_root(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_sample.draw_sample, "__defaults__", (6, 3, 0))
    monkeypatch.chdir(tmp_path)
    folders = ["--data-root=sample,coco", "--checkpoint-dir=run"]
    size = ["--num-epochs=1", "--image-size=32", "--batch-size=4", "--num-workers=0"]
    assert trainer.run_command(["trainer.py", "--sample", *folders, *size]) == 0
    assert len(list((tmp_path / "sample" / "train2017").glob("*.jpg"))) == 6
    assert read_checkpoint(tmp_path / "run" / "best_model.pth")["config"]["encoder"] == "resnet18"
    said = " ".join(capsys.readouterr().out.split())
    assert "15 photos to train on (5 in sample, 10 in coco), 8 to validate (3 in sample, 5 in coco)" in said


def test_a_run_of_a_name_has_a_folder_for_itself(coco_root, tmp_path, monkeypatch):
    tensorboard = SimpleNamespace(SummaryWriter=Mock())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    (coco_root / "val2017" / "000000000101.jpg").write_bytes(b"")
    trainer.main(small(coco_root, tmp_path / "runs", run_name="first", num_epochs=1, tensorboard=True))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["first"]
    assert {"last.pth", "history.csv", "skipped.txt"} <= {*contents(tmp_path / "runs" / "first")}
    tensorboard.SummaryWriter.assert_called_once_with(str(tmp_path / "runs" / "first" / "tensorboard"), purge_step=1)


def test_the_log_is_what_the_console_showed_of_every_start(coco_root, tmp_path, capsys):
    run, shown = tmp_path / "run", ""
    arguments = flags(small(coco_root, run, num_epochs=1))
    assert "--seed" in command_error(capsys, *arguments, "--seed=-1")
    assert not run.exists()
    for more in ([], ["--resume", "--num-epochs=2"]):
        assert trainer.run_command(["trainer.py", *arguments, *more]) == 0
        shown += capsys.readouterr().out
    command_error(capsys, *arguments, "--resume", "--seed=3")
    log = (run / "run.log").read_text().splitlines()
    assert [line for line in log if not line.startswith("--- ")] == shown.splitlines()
    assert len(log) == len(shown.splitlines()) + 2
    assert trainer.run_command(["trainer.py", *arguments]) == 0
    (archive,) = run.glob("earlier_*")
    assert (archive / "run.log").read_text().splitlines() == log


def test_neither_a_repeat_nor_the_workers_change_a_bit(coco_root, tmp_path, capsys):
    states = []
    for number, workers in enumerate((0, 0, 2)):
        trainer.main(small(coco_root, tmp_path / f"run{number}", num_epochs=2, num_workers=workers))
        assert f"{workers} workers each" in capsys.readouterr().out
        states.append(last_state(tmp_path / f"run{number}"))
    assert all(same(states[0], other) for other in states[1:])
    trainer.main(small(coco_root, tmp_path / "other", num_epochs=2, seed=1))
    assert not same(states[0]["model"], last_state(tmp_path / "other")["model"])


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_that_starts_anew_archives_an_earlier_one_and_says_so(damaged, coco_root, tmp_path, capsys):
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=1))
    assert "earlier" not in capsys.readouterr().out
    if damaged:  # all that there is to resume from: epoch_0001.pth is the same file
        os.truncate(tmp_path / "run" / "last.pth", 1000)
    before = contents(tmp_path / "run")
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=2, seed=1, resume="newest" if damaged else ""))
    (archive,) = (tmp_path / "run").glob("earlier_*")
    assert f"an earlier run's files were moved to {archive}" in capsys.readouterr().out
    assert contents(archive) == before
    assert len(history(tmp_path / "run")) == 2


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_run_that_goes_on_from_a_file_keeps_what_came_after_it(elsewhere, coco_root, tmp_path, monkeypatch):
    run, file = tmp_path / "run", tmp_path / "copied.pth"
    script(monkeypatch, [0.5, 0.6, 0.9, 0.4])
    trainer.main(small(coco_root, run, num_epochs=3, keep_checkpoints=0))
    before = contents(run)
    first = run / "epoch_0001.pth"
    trainer.main(small(coco_root, run, num_epochs=2, resume=str(shutil.copy(first, file) if elsewhere else first)))
    (archive,) = run.glob("earlier_*")
    kept = {} if elsewhere else {first.name: first.read_bytes()}
    assert contents(archive) | kept == before
    assert [row["epoch"] for row in history(run)] == ["1", "2"]
    assert read_checkpoint(run / "best_model.pth")["epoch"] == 2  # the best of those made since


def test_a_finished_run_says_so_and_changes_nothing(coco_root, tmp_path, capsys):
    settings = small(coco_root, tmp_path / "run", num_epochs=1)
    trainer.main(settings)
    before = contents(tmp_path / "run")
    trainer.main(dataclasses.replace(settings, resume="newest"))
    assert "1 epoch done: a higher --num-epochs goes on" in capsys.readouterr().out
    assert contents(tmp_path / "run") == before


def test_a_folder_is_claimed_before_its_checkpoint_is_read(coco_root, tmp_path, monkeypatch, capsys):
    newest_usable, read = checkpoints.newest_usable, []
    trainer.main(small(coco_root, tmp_path, num_epochs=1))
    settings = small(coco_root, tmp_path, num_epochs=2, resume="newest")

    def while_claimed(folder):
        with pytest.raises(CheckpointError, match="another run is writing"):
            checkpoints.claim(folder)
        read.append(folder)
        return newest_usable(folder)

    monkeypatch.setattr(resuming, "newest_usable", while_claimed)
    with checkpoints.claim(tmp_path):
        for config in (settings, dataclasses.replace(settings, resume="")):
            assert f"another run is writing to {tmp_path}" in command_error(capsys, *flags(config))
    assert read == []
    trainer.main(settings)
    assert read == [tmp_path]
    assert len(history(tmp_path)) == 2


@pytest.mark.parametrize("owner", ["elsewhere 1", None])
def test_a_resume_that_is_refused_leaves_no_claim_behind(owner, coco_root, tmp_path, capsys):
    run = tmp_path / "run"
    trainer.main(small(coco_root, run, num_epochs=1))
    (run / ".lock").write_text(owner) if owner else (run / ".lock").unlink()
    before = contents(run)
    assert "--seed" in command_error(capsys, *flags(small(coco_root, run, num_epochs=2, seed=3, resume="newest")))
    assert contents(run) == before
    checkpoints.claim(run).close()  # the same process may have it at once
    trainer.main(small(coco_root, run, num_epochs=2, resume="newest"))
    assert checkpoints.same_launcher(run)
