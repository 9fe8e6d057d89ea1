"""A run that starts from trained weights: what it takes from the file, and what it does not."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from test_trainer import ALONE, small

import trainer
from training import report
from training.checkpoints import save
from utils import CheckpointError


@pytest.fixture(scope="module")
def trained(coco_root, tmp_path_factory):
    """A run's best model: one epoch of resnet18 without attention gates at 64 pixels."""
    folder = tmp_path_factory.mktemp("trained")
    trainer.main(small(coco_root, folder, num_epochs=1, image_size=64, use_attention=False))
    return folder / "best_model.pth"


@pytest.fixture(scope="module")
def coco_root(tmp_path_factory):
    from conftest import write_split

    root = tmp_path_factory.mktemp("data") / "coco"
    write_split(root, "train2017", 10, first_id=1)
    write_split(root, "val2017", 5, first_id=101)
    return root


def test_a_run_starts_from_the_weights_with_their_settings_and_all_else_new(trained):
    config = trainer.parse(["--start-from", str(trained), "--device", "cpu"])
    assert (config.encoder, config.use_attention, config.image_size) == ("resnet18", False, 64)
    assert (config.num_epochs, config.batch_size, config.seed) == (100, 32, 0)
    run, content = trainer.start_run(config, ALONE), torch.load(trained, weights_only=True)
    weights = run.model.state_dict()
    assert weights.keys() == content["model"].keys()
    assert all(torch.equal(weights[name], value) for name, value in content["model"].items())
    assert (run.epochs_done, run.step, run.best_iou, run.history) == (0, 0, -1.0, [])
    assert not run.optimizer.state
    assert run.scheduler.base_lrs == [1e-4]  # nothing starts from random values


def test_a_flag_overrides_the_files_image_size(trained):
    assert trainer.parse(["--start-from", str(trained), "--image-size", "96"]).image_size == 96


def test_box_is_the_model_that_comes_with_the_program(trained, monkeypatch, tmp_path):
    content = torch.load(trained, weights_only=True)
    halved = {name: value.half() if value.is_floating_point() else value for name, value in content["model"].items()}
    save({**content, "model": halved}, tmp_path / "box.pth")
    monkeypatch.setattr(trainer, "BOX", tmp_path / "box.pth")
    run = trainer.start_run(trainer.parse(["--start-from", "box", "--device", "cpu"]), ALONE)
    weights = run.model.state_dict()
    assert all(torch.equal(weights[name], value.to(weights[name].dtype)) for name, value in halved.items())
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())


def test_a_resume_goes_on_from_its_own_weights_where_the_file_is_gone(trained, coco_root, tmp_path):
    start = small(coco_root, tmp_path / "run", num_epochs=1, image_size=64, use_attention=False)
    start.start_from = str(tmp_path / "gone.pth")
    (tmp_path / "gone.pth").write_bytes(trained.read_bytes())
    trainer.main(start)
    (tmp_path / "gone.pth").unlink()
    before = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["model"]
    start.resume, start.restart_period, start.num_epochs = "newest", 1, 1
    found = trainer.resuming.newest_usable(tmp_path / "run")
    after = trainer.start_run(start, ALONE, found).model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("batch_size", "whole", "changed", "said"),
    [(15, True, set(), "keeping its BatchNorm statistics"),
     (15, False, {"decoder"}, "the encoder keeping its BatchNorm statistics"),  # with ImageNet's weights
     (16, True, {"decoder", "encoder"}, "")],
)  # fmt: skip
def test_what_came_trained_keeps_its_statistics_at_small_batches(batch_size, whole, changed, said, trained):
    config = trainer.parse(["--start-from", str(trained), "--device", "cpu", "--batch-size", str(batch_size)])
    run = trainer.start_run(config, ALONE)
    run.settings["start_from"] *= whole
    assert report.kept_batchnorm(run) == said
    before = copy.deepcopy(run.model.state_dict())
    run.begin_epoch()
    run.model(torch.rand(2, 3, 64, 64))
    after = run.model.state_dict().items()
    assert {name.split(".")[0] for name, value in after if not torch.equal(value, before[name])} == changed
    assert run.model.encoder.training  # dropout and the like are as ever


def test_an_encoder_of_random_values_learns_its_statistics():
    assert not trainer.start_run(trainer.Config(pretrained=False, batch_size=2, device="cpu"), ALONE).keeps_statistics


def test_a_resume_trains_as_the_run_began_whatever_is_said_now(coco_root, tmp_path):
    settings = small(coco_root, tmp_path / "run", num_epochs=1, encoder="resnet18")
    trainer.main(settings)
    now = dataclasses.replace(settings, pretrained=True, start_from="x", resume="newest")
    with trainer.RunFolder(tmp_path / "run", 0) as folder:
        config, found = trainer.find_start(now, trainer.FIELDS, ALONE, folder)
    run = trainer.start_run(config, ALONE, found)
    assert (run.settings["pretrained"], run.settings["start_from"]) == (False, "")
    assert run.scheduler.base_lrs == [1e-4]
    assert not run.keeps_statistics


def test_a_file_that_the_run_itself_would_move_aside_is_refused(trained, capsys):
    arguments = ["--start-from", str(trained), "--checkpoint-dir", str(trained.parent)]
    assert trainer.run_command(["trainer.py", *arguments]) == 2
    assert "lies in the run's own folder, whose files a new run moves aside" in capsys.readouterr().err
    assert trainer.parse([*arguments, "--run-name", "tuned"]).encoder == "resnet18"


@pytest.mark.parametrize("flags", [["--encoder", "resnet34"], ["--use-attention"]])
def test_weights_of_another_model_are_refused_in_one_line(flags, trained):
    config = trainer.parse(["--start-from", str(trained), "--device", "cpu", *flags])
    said = f"the weights in {trained} are those of resnet18 without attention gates: another --encoder"
    with pytest.raises(CheckpointError, match=said) as caught:
        trainer.start_run(config, ALONE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--start-from", "none.pth"], "there is no checkpoint none.pth"),
        (["--start-from", "README.md"], "the checkpoint README.md is damaged or no checkpoint"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_in_one_line(flags, said, coco_root, tmp_path, capsys):
    data = ["--data-root", str(coco_root), "--checkpoint-dir", str(tmp_path), "--device", "cpu", "--num-workers", "0"]
    assert trainer.run_command(["trainer.py", *flags, *data]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"trainer.py: error: {said}")
    assert error.count("\n") == 1


def test_two_sources_of_weights_contradict_each_other(trained, capsys):
    assert trainer.run_command(["trainer.py", "--start-from", str(trained), "--encoder-weights", "a.pth"]) == 2
    assert "--encoder-weights and --start-from both name the weights" in capsys.readouterr().err
