"""Whole trainings: what they leave behind, the same bits again, and folders that hold an earlier run."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import tiny_runs
from tiny_runs import ALONE, command_error, contents, flags, history, last_state, same, script, small

import trainer
from models import UNetAutoencoder, read_checkpoint
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
    for picture in ("preview.png", "curves.png", "data.png"):
        assert (straight / picture).read_bytes().startswith(b"\x89PNG")
    ious = [float(row["val_iou"]) for row in history(straight)]
    assert len(set(ious)) > 1
    assert read_checkpoint(straight / "best_model.pth")["epoch"] == 1 + ious.index(max(ious))
    tiny_runs.assert_measured_alone(straight, coco_root, UNetAutoencoder("resnet18", pretrained=False))
    trainer.main(small(coco_root, resumed, **{**TWO, "num_epochs": 1}))
    trainer.main(small(coco_root, resumed, resume="newest", **TWO))
    assert same(last_state(resumed), last_state(straight))
    assert [row["epoch"] for row in history(resumed)] == ["1", "2"]


@pytest.mark.usefixtures("coco_root")
def test_a_sample_run_draws_its_own_photos_into_the_first_root(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_sample.draw_sample, "__defaults__", (6, 3, 0))
    monkeypatch.chdir(tmp_path)
    arguments = "--sample --data-root=sample,coco --checkpoint-dir=run --num-epochs=1 --image-size=32 --num-workers=0"
    assert trainer.run_command(["trainer.py", *arguments.split()]) == 0
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


def test_the_log_is_what_the_console_showed(coco_root, tmp_path, capsys):
    assert trainer.run_command(["trainer.py", *flags(small(coco_root, tmp_path, num_epochs=1))]) == 0
    _, *log = (tmp_path / "run.log").read_text().splitlines()
    assert log == capsys.readouterr().out.splitlines()


def test_the_seed_makes_the_first_weights(coco_root, tmp_path):
    first, again, other = (trainer.start_run(small(coco_root, tmp_path, seed=seed), ALONE).model for seed in (1, 1, 2))
    assert same(first.state_dict(), again.state_dict())
    assert not same(first.state_dict(), other.state_dict())


@pytest.mark.parametrize(("resume", "best"), [("", 1), ("epoch_0001.pth", 2)])  # the best of those made since
def test_what_a_run_replaces_is_archived(resume, best, coco_root, tmp_path, monkeypatch, capsys):
    script(monkeypatch, [0.5, 0.6, 0.9, 0.4, 0.3])
    trainer.main(small(coco_root, tmp_path, num_epochs=3, keep_checkpoints=0))
    assert "earlier" not in capsys.readouterr().out
    before = contents(tmp_path)
    trainer.main(small(coco_root, tmp_path, num_epochs=2, resume=resume and str(tmp_path / resume)))
    (archive,) = tmp_path.glob("earlier_*")
    assert f"an earlier run's files were moved to {archive}" in capsys.readouterr().out
    assert contents(archive) | {name: before[name] for name in [resume] if name} == before
    assert [row["epoch"] for row in history(tmp_path)] == ["1", "2"]
    assert read_checkpoint(tmp_path / "best_model.pth")["epoch"] == best


def test_a_finished_run_says_so_and_changes_nothing(coco_root, tmp_path, capsys):
    for resume in ("", "newest"):
        before = contents(tmp_path)
        trainer.main(small(coco_root, tmp_path, num_epochs=1, resume=resume))
    assert "1 epoch done: a higher --num-epochs goes on" in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_a_folder_is_claimed_before_its_checkpoint_is_read(coco_root, tmp_path, monkeypatch, capsys):
    trainer.main(small(coco_root, tmp_path, num_epochs=1))
    new, resumed = (flags(small(coco_root, tmp_path, num_epochs=2, resume=resume)) for resume in ("", "newest"))
    with checkpoints.claim(tmp_path):
        for arguments in (new, resumed):
            assert f"another run is writing to {tmp_path}" in command_error(capsys, *arguments)
    monkeypatch.setattr(resuming, "newest_usable", checkpoints.claim)  # refused where the run has it
    assert f"another run is writing to {tmp_path}" in command_error(capsys, *resumed)
    checkpoints.claim(tmp_path).close()  # which a run that is refused leaves to the next at once
