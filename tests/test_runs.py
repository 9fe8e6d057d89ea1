"""Whole trainings, tiny and real: what they leave behind, the same bits again, resumed, and on two processes."""

from __future__ import annotations

import csv
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import write_split
from test_trainer import Tiny, flags, quick, refusal, run_of, small, unwatched  # noqa: F401
from torch.optim.optimizer import register_optimizer_step_pre_hook

import trainer
from datasets import COCOPersonDataset, make_loader
from models import UNetAutoencoder
from tools import make_sample
from training import checkpoints, resuming
from utils import CheckpointError, LossCalculator, read_checkpoint, weights_of

ROOT = Path(trainer.__file__).parent
FOUR = {"num_epochs": 4, "restart_period": 3, "learning_rate": 2e-3}  # so that a resume after two falls within a cycle
TIMES = {"seconds", "images_per_second", "data_wait"}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(trainer, "UNetAutoencoder", Tiny)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The photos and the folder of a real run of four epochs, on a real U-Net."""
    folder = tmp_path_factory.mktemp("finished")
    write_split(folder / "coco", "train2017", 10, first_id=1)
    write_split(folder / "coco", "val2017", 5, first_id=101)
    trainer.main(small(folder / "coco", folder / "run", keep_checkpoints=2, **FOUR))
    yield folder / "coco", folder / "run"
    shutil.rmtree(folder)  # half a gigabyte


def history(run: Path) -> list[dict[str, str]]:
    with open(run / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def same(one, other) -> bool:
    """Whether two trees of dictionaries, lists, tensors and numbers agree bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def state(run: Path) -> dict:
    """All that last.pth holds, but for the settings and the times."""
    content = read_checkpoint(run / "last.pth")
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in content["history"]]
    return {**content, "history": rows, "config": None}


def iou_by_hand(content: dict, coco: Path) -> float:
    """The mean IoU of a checkpoint's model on the validation photos, one at a time, in numpy."""
    config, ious = content["config"], []
    model = UNetAutoencoder(config["encoder"], False, config["use_attention"])
    model.load_state_dict(content["model"])
    model.eval()
    dataset = COCOPersonDataset(coco, "val2017", config["image_size"])
    for index in range(len(dataset)):
        rgba = dataset[index].numpy()
        with torch.no_grad():
            alpha = model.predict(torch.from_numpy(rgba[None, :3] / np.float32(255)))[0, 3].numpy()
        found, truth = alpha > 0.5, rgba[3] == 255
        ious.append((found & truth).sum() / (found | truth).sum() if (found | truth).any() else 1.0)
    return float(np.mean(ious))


# --- what a run leaves ------------------------------------------------------------------------------------


def test_a_run_leaves_its_files(finished):
    run = finished[1]
    checkpoints = ["best_model.pth", "epoch_0003.pth", "epoch_0004.pth", "last.pth"]
    others = [".lock", "history.csv", "preview.png", "curves.png", "run.json"]
    assert {path.name for path in run.iterdir()} == {*checkpoints, *others}
    assert [row["epoch"] for row in history(run)] == ["1", "2", "3", "4"]
    for picture in ("preview.png", "curves.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert read_checkpoint(run / "last.pth")["epoch"] == 4


def test_the_best_model_is_worth_what_it_says(finished):
    coco, run = finished
    best = torch.load(run / "best_model.pth", weights_only=True)
    assert {"model", "config", "metrics", "epoch"} <= best.keys()
    assert not any(key.startswith(("module.", "_orig_mod.")) for key in best["model"])
    assert best["metrics"]["iou"] == pytest.approx(iou_by_hand(best, coco), abs=1e-6)
    ious = [float(row["val_iou"]) for row in history(run)]
    assert len(set(ious)) > 1
    assert best["epoch"] == 1 + int(np.argmax(ious))
    assert best["metrics"]["iou"] == pytest.approx(max(ious), abs=1e-6)


@pytest.mark.usefixtures("tiny")
def test_the_best_is_the_first_of_the_highest(coco_root, tmp_path, monkeypatch):
    script(monkeypatch, [0.0, 0.4, 0.7, 0.2, 0.7])
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=5, keep_checkpoints=0))
    best = read_checkpoint(tmp_path / "run" / "best_model.pth")
    assert (best["epoch"], best["metrics"]["iou"]) == (3, 0.7)
    assert same(best["model"], weights_of(read_checkpoint(tmp_path / "run" / "epoch_0003.pth")))


def script(monkeypatch, ious: list[float]) -> None:
    """Lets the validation of the coming epochs find these."""
    coming, real = iter(ious), trainer.validate
    monkeypatch.setattr(trainer, "validate", lambda *args: {**real(*args), "iou": next(coming)})


@pytest.mark.usefixtures("tiny")
def test_a_new_run_moves_an_older_one_aside_and_says_so(coco_root, tmp_path, capsys):
    run = tmp_path / "run"
    trainer.main(small(coco_root, run, num_epochs=1))
    older = (run / "best_model.pth").read_bytes()
    assert "earlier" not in capsys.readouterr().out
    trainer.main(small(coco_root, run, num_epochs=2, seed=1))
    aside = next(run.glob("earlier_*"))
    assert str(aside) in capsys.readouterr().out
    assert (aside / "best_model.pth").read_bytes() == older
    assert len(history(aside)) == 1
    assert len(history(run)) == 2


def test_a_last_batch_of_one_photo_does_not_break_batchnorm(coco_root, tmp_path):
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=1, batch_size=3))  # 3 + 3 + 3 + 1, and 1 x 1 features
    assert int(read_checkpoint(tmp_path / "run" / "last.pth")["optimizer"]["state"][0]["step"]) == 3


def test_a_sample_run_draws_its_own_photos(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_sample.draw_sample, "__defaults__", (6, 3, 0))
    folders = ["--data-root", str(tmp_path / "sample"), "--checkpoint-dir", str(tmp_path / "run")]
    size = ["--num-epochs=1", "--image-size=32", "--batch-size=4", "--num-workers=0"]
    assert trainer.run_command(["trainer.py", "--sample", *folders, *size]) == 0
    assert len(list((tmp_path / "sample" / "train2017").glob("*.jpg"))) == 6
    assert read_checkpoint(tmp_path / "run" / "best_model.pth")["config"]["encoder"] == "resnet18"
    assert str(tmp_path / "sample") in capsys.readouterr().out


# --- the same bits ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
def test_neither_a_repeat_nor_the_workers_change_a_bit(coco_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "usable_cores", lambda: 4)
    states = []
    for place, workers in enumerate((0, 0, 1, 3)):
        run = tmp_path / f"run{place}"
        trainer.main(small(coco_root, run, num_epochs=2, num_workers=workers))
        assert f"{workers} worker{'' if workers == 1 else 's'} each" in capsys.readouterr().out
        states.append(state(run))
    assert all(same(states[0], other) for other in states[1:])
    trainer.main(small(coco_root, tmp_path / "other", num_epochs=2, seed=1))
    assert not same(states[0]["model"], state(tmp_path / "other")["model"])


def test_a_resumed_run_ends_with_the_bits_of_a_straight_one(finished, tmp_path):
    coco, straight = finished
    run = tmp_path / "run"
    trainer.main(small(coco, run, keep_checkpoints=1, **{**FOUR, "num_epochs": 2}))
    trainer.main(small(coco, run, keep_checkpoints=1, resume="newest", **FOUR))
    assert same(state(run), state(straight))
    assert len(history(run)) == 4
    shutil.rmtree(run)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("file", "batch_size"), [("", 4), ("epoch_0002.pth", 10)])  # 3 steps an epoch, and 1
def test_dropout_and_learning_rate_go_on_after_a_resume(file, batch_size, coco_root, tmp_path):
    four = {**FOUR, "batch_size": batch_size}
    trainer.main(small(coco_root, tmp_path / "straight", **four))
    run, rates = tmp_path / "run", []
    trainer.main(small(coco_root, run, **{**four, "num_epochs": 2}))
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    trainer.main(small(coco_root, run, resume=str(run / file) if file else "newest", **four))
    hook.remove()
    assert rates[0] == pytest.approx(FOUR["learning_rate"] * (1 + np.cos(np.pi * 2 / 3)) / 2, rel=1e-9)
    assert same(state(run), state(tmp_path / "straight"))
    assert not list(run.glob("earlier_*"))


@pytest.mark.usefixtures("tiny")
def test_a_worse_epoch_after_a_resume_is_not_the_best(coco_root, tmp_path, monkeypatch):
    script(monkeypatch, [0.5, 0.9, 0.6, 0.8])
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=2))
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=4, resume="newest"))
    assert read_checkpoint(tmp_path / "run" / "best_model.pth")["epoch"] == 2
    assert read_checkpoint(tmp_path / "run" / "last.pth")["best_iou"] == 0.9


@pytest.mark.usefixtures("tiny")
def test_resume_passes_over_a_checkpoint_cut_short(coco_root, tmp_path, capsys):
    run = tmp_path / "run"
    trainer.main(small(coco_root, run, num_epochs=2))
    os.truncate(run / "epoch_0002.pth", 1000)  # last.pth is the same file
    trainer.main(small(coco_root, run, num_epochs=2, resume="newest"))
    assert "after epoch 1" in capsys.readouterr().out
    assert read_checkpoint(run / "last.pth")["epoch"] == 2
    assert [row["epoch"] for row in history(run)] == ["1", "2"]


@pytest.mark.usefixtures("tiny")
def test_resume_with_nothing_there_says_so_and_trains(coco_root, tmp_path, capsys):
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=1, resume="newest"))
    assert f"nothing to resume in {tmp_path / 'run'}" in capsys.readouterr().out
    assert len(history(tmp_path / "run")) == 1


@pytest.mark.usefixtures("tiny")
def test_a_run_that_goes_on_from_another_folder_overwrites_nothing(coco_root, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    script(monkeypatch, [0.9, 0.8, 0.5, 0.6])
    trainer.main(small(coco_root, first, num_epochs=1))
    trainer.main(small(coco_root, second, num_epochs=1, seed=7))
    before = {path.name: path.read_bytes() for path in second.iterdir() if path.name != ".lock"}
    trainer.main(small(coco_root, second, num_epochs=3, resume=str(first / "last.pth")))
    (aside,) = second.glob("earlier_*")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
    assert [row["epoch"] for row in history(second)] == ["1", "2", "3"]
    assert read_checkpoint(second / "best_model.pth")["epoch"] == 3  # the best of those made here


@pytest.mark.usefixtures("tiny")
def test_a_resume_that_finds_all_damaged_moves_them_aside(coco_root, tmp_path, capsys):
    run = tmp_path / "run"
    trainer.main(small(coco_root, run, num_epochs=1))
    os.truncate(run / "last.pth", 1000)  # epoch_0001.pth is the same file
    trainer.main(small(coco_root, run, num_epochs=1, resume="newest"))
    assert "nothing to resume" in capsys.readouterr().out
    assert len(list(run.glob("earlier_*/best_model.pth"))) == 1
    assert read_checkpoint(run / "last.pth")["epoch"] == 1


@pytest.mark.usefixtures("tiny")
def test_resume_from_what_cannot_be_used_is_refused(coco_root, tmp_path, capsys):
    run, damaged = tmp_path / "run", tmp_path / "damaged.pth"
    settings = small(coco_root, run, num_epochs=1)
    trainer.main(settings)
    damaged.write_bytes((run / "last.pth").read_bytes()[:1000])
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    for file in (damaged, tmp_path / "absent.pth"):
        assert str(file) in refusal(capsys, *flags(dataclasses.replace(settings, resume=str(file))))
    best = refusal(capsys, *flags(dataclasses.replace(settings, resume=str(run / "best_model.pth"))))
    assert "best_model.pth" in best
    assert "last.pth" in best
    changes = {
        "encoder": "resnet50", "use_attention": False, "image_size": 64, "seed": 7, "val_split": "train2017",
        "restart_period": 5, "restart_mult": 2, "accumulate": 2,
    }  # fmt: skip
    for name, value in changes.items():
        error = refusal(capsys, *flags(dataclasses.replace(settings, resume="newest", **{name: value})))
        assert all(str(part) in error for part in (name.replace("_", "-"), getattr(settings, name), value)), error
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}


def test_a_resume_needs_no_pretrained_weights(coco_root, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(trainer, "UNetAutoencoder", lambda *args: (asked.append(args[1]), Tiny())[1])
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=1, pretrained=True))
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=2, pretrained=True, resume="newest"))
    assert asked == [True, False]


# --- in processes of their own ----------------------------------------------------------------------------

# Trains as trainer.py does and keeps what each process ends with.
TWO_PROCESSES = """
import os, sys, torch, trainer
torch.set_num_threads(1)
runs, start_run = [], trainer.start_run
trainer.start_run = lambda *args: (runs.append(start_run(*args)), runs[0])[1]
code = trainer.run_command(["trainer.py", *sys.argv[2:]])
torch.save(runs[0].evaluated.state_dict(), f"{sys.argv[1]}/rank{os.environ['RANK']}.pth")
sys.exit(code)
"""


def start(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def torchrun(*command: str) -> str:
    done = start("-m", "torch.distributed.run", "--standalone", *command)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_measure_what_one_does(coco_root, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    settings = small(coco_root, run, num_epochs=1, batch_size=2)
    out = torchrun("--nproc_per_node=2", str(tmp_path / "two.py"), str(tmp_path), *flags(settings))
    assert "2 processes" in out
    assert out.count("1/1 |") == 1  # only the main one prints
    ranks = [torch.load(tmp_path / f"rank{rank}.pth") for rank in (0, 1)]
    assert same(*ranks)

    best = read_checkpoint(run / "best_model.pth")
    assert best["model"].keys() == UNetAutoencoder("resnet18", False).state_dict().keys()  # no module. before them
    assert same(best["model"], ranks[0])
    assert same(best["model"], weights_of(read_checkpoint(run / "last.pth")))
    assert float(history(run)[0]["val_iou"]) == pytest.approx(iou_by_hand(best, coco_root), abs=1e-6)
    model = UNetAutoencoder("resnet18", False)
    model.load_state_dict(best["model"])
    loader = make_loader(COCOPersonDataset(coco_root, "val2017", 32), 2, 0, training=False)
    alone = run_of(model)
    alone.criterion = LossCalculator(*(getattr(settings, f"{name}_weight") for name in
                                       ("colour", "bce", "dice", "contour")))  # fmt: skip
    alone = trainer.validate(alone, loader, unwatched(alone))
    assert alone["images"] == 5
    assert best["metrics"] == pytest.approx(alone, abs=1e-6)
    assert float(history(run)[0]["val_loss"]) == pytest.approx(alone["loss"], rel=1e-5)


def test_bare_torchrun_on_a_cpu_is_one_process(coco_root, tmp_path):
    settings = [flag for flag in flags(small(coco_root, tmp_path / "run", num_epochs=1)) if "--device" not in flag]
    settings += ["--device=cuda:{local_rank}"] if not torch.cuda.is_available() else ["--device=cpu"]
    out = torchrun("trainer.py", *settings)
    assert "1 process," in out
    assert len(history(tmp_path / "run")) == 1


def test_a_photo_that_a_worker_cannot_read_gets_one_line(coco_root, tmp_path):
    photo = sorted((coco_root / "val2017").iterdir())[2]
    photo.write_bytes(b"no photo at all")
    done = start("trainer.py", *flags(small(coco_root, tmp_path / "run", num_workers=1, max_bad_photos=0.0)))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert str(photo) in done.stderr


@pytest.mark.usefixtures("tiny")
def test_going_back_to_an_earlier_epoch_keeps_what_came_after_it(coco_root, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    script(monkeypatch, [0.5, 0.6, 0.9, 0.4])
    trainer.main(small(coco_root, run, num_epochs=3, keep_checkpoints=0))
    best = (run / "best_model.pth").read_bytes()
    trainer.main(small(coco_root, run, num_epochs=2, keep_checkpoints=0, resume=str(run / "epoch_0001.pth")))
    (aside,) = run.glob("earlier_*")
    assert (aside / "best_model.pth").read_bytes() == best
    assert [path.name for path in sorted(aside.glob("epoch_*"))] == ["epoch_0002.pth", "epoch_0003.pth"]
    assert read_checkpoint(run / "best_model.pth")["epoch"] == 2
    assert str(aside) in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_a_finished_run_says_so_and_changes_nothing(coco_root, tmp_path, capsys):
    settings = small(coco_root, tmp_path / "run", num_epochs=1)
    trainer.main(settings)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    trainer.main(dataclasses.replace(settings, resume="newest"))
    assert "the epoch is done" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.usefixtures("tiny")
def test_the_log_is_what_the_console_showed_of_every_start(coco_root, tmp_path, capsys):
    run, said = tmp_path / "run", ""
    settings = small(coco_root, run, num_epochs=1)
    assert "--seed" in refusal(capsys, *flags(settings), "--seed=-1")
    assert not run.exists()
    for more in ([], ["--resume", "--num-epochs=2"]):
        assert trainer.run_command(["trainer.py", *flags(settings), *more]) == 0
        said += capsys.readouterr().out
    refusal(capsys, *flags(settings), "--resume", "--seed=3")
    log = (run / "run.log").read_text().splitlines()
    assert [line for line in log if not line.startswith("--- ")] == said.splitlines()
    assert len(log) == len(said.splitlines()) + 2
    assert trainer.run_command(["trainer.py", *flags(settings)]) == 0
    (aside,) = run.glob("earlier_*")
    assert (aside / "run.log").read_text().splitlines() == log


@pytest.mark.usefixtures("tiny")
def test_a_run_of_a_name_has_a_folder_for_itself(coco_root, tmp_path, monkeypatch):
    tensorboard = SimpleNamespace(SummaryWriter=Mock())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    (coco_root / "val2017" / "000000000101.jpg").write_bytes(b"")
    trainer.main(small(coco_root, tmp_path / "runs", run_name="first", num_epochs=1, tensorboard=True, log_every=2))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["first"]
    assert {"last.pth", "history.csv", "skipped.txt"} <= {path.name for path in (tmp_path / "runs" / "first").iterdir()}
    tensorboard.SummaryWriter.assert_called_once_with(str(tmp_path / "runs" / "first" / "tensorboard"), purge_step=1)
    steps = [call.args for call in tensorboard.SummaryWriter().add_scalar.mock_calls]
    assert [step for name, _, step in steps if name == "step/loss"] == [2]  # of 3
    assert [step for name, _, step in steps if name == "iou/val"] == [1]


@pytest.mark.usefixtures("tiny")
def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(coco_root, tmp_path, capsys):
    settings = small(coco_root, tmp_path, num_epochs=1)
    with checkpoints.claim(tmp_path):
        assert f"another run is writing to {tmp_path}" in refusal(capsys, *flags(settings))
    trainer.main(settings)


@pytest.mark.usefixtures("tiny")
def test_a_folder_is_claimed_before_its_checkpoint_is_read(coco_root, tmp_path, monkeypatch, capsys):
    run, read = tmp_path / "run", []
    trainer.main(small(coco_root, run, num_epochs=1))
    settings = small(coco_root, run, num_epochs=2, resume="newest")
    newest_usable = checkpoints.newest_usable

    def while_claimed(folder):
        with pytest.raises(CheckpointError, match="another run is writing"):
            checkpoints.claim(folder)
        read.append(folder)
        return newest_usable(folder)

    monkeypatch.setattr(resuming, "newest_usable", while_claimed)
    with checkpoints.claim(run):
        assert f"another run is writing to {run}" in refusal(capsys, *flags(settings))
    assert read == []
    trainer.main(settings)
    assert read == [run]
    assert len(history(run)) == 2


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("signed", ["elsewhere 1", None])
def test_a_resume_that_is_refused_leaves_no_claim_behind(signed, coco_root, tmp_path, capsys):
    run = tmp_path / "run"
    trainer.main(small(coco_root, run, num_epochs=1))
    (run / ".lock").write_text(signed) if signed else (run / ".lock").unlink()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert "--seed" in refusal(capsys, *flags(small(coco_root, run, num_epochs=2, seed=3, resume="newest")))
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}
    checkpoints.claim(run).close()  # the same process may have it at once
    trainer.main(small(coco_root, run, num_epochs=2, resume="newest"))
    assert checkpoints.is_ours(run)
