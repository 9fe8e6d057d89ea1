"""Where a run starts from: whose settings count when it is resumed, and what --start-from takes from a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_runs import ALONE, Tiny, command_error, same, small
from torch import nn

import trainer
from models import CheckpointError, UNetAutoencoder
from trainer import Config
from training import checkpoints, resuming, run_info
from training.resuming import ResumeError, find_checkpoint, merge_settings, resume_message, settings_of
from training.run import REQUIRED

DEFAULTS = dataclasses.asdict(Config())


def checkpoint(**config: object) -> tuple[Path, dict]:
    content = {"config": DEFAULTS | config, "epoch": 3, "step": 0, "world_size": 1}
    return Path("last.pth"), content


def resumed(before: dict, explicit: dict, **in_the_file: object) -> dict:
    """The settings that differ from the defaults."""
    now = merge_settings(checkpoint(**before), DEFAULTS | in_the_file | explicit, explicit)
    assert now.keys() == DEFAULTS.keys()
    return {name: value for name, value in now.items() if value != DEFAULTS[name]}


FOUND = {"encoder": "resnet18", "num_workers": 3, "learning_rate": 1.0, "cache": True, "seed": 4}
HARMLESS = {"learning_rate": 0.5, "decoder_lr_mult": 3.0, "weight_decay": 0.1, "num_epochs": 7, "precision": "float32",
            "best_metric": "dice"}  # fmt: skip


@pytest.mark.parametrize(
    ("before", "explicit", "in_the_file", "now"),
    [(FOUND, {}, {"encoder": "resnet50", "learning_rate": 2.0, "batch_size": 8}, FOUND),
     ({}, HARMLESS, {}, HARMLESS),
     # the folder and the device are this start's, the first weights the checkpoint's
     ({"checkpoint_dir": "there", "run_name": "a", "device": "cuda:7", "resume": "a.pth"}, {"run_name": "b"},
      {"device": "cpu"}, {"run_name": "b", "device": "cpu"}),
     ({"pretrained": False, "start_from": "a.pth"}, {"pretrained": True, "start_from": "b", "encoder_weights": "b"},
      {}, {"pretrained": False, "start_from": "a.pth"}),
     # one flag of the data stands for all
     ({"annotations": "a.json", "photos": "photos"}, {"data_root": "b"}, {}, {"data_root": "b"}),
     # without parameter groups of their own the decoder's learning rate is no matter
     ({"pretrained": False}, {"decoder_lr_mult": 1.0}, {}, {"pretrained": False, "decoder_lr_mult": 1.0})],
)  # fmt: skip
def test_settings_are_the_checkpoints_except_explicit_flags(before, explicit, in_the_file, now):
    assert resumed(before, explicit, **in_the_file) == now


def test_a_setting_that_a_checkpoint_lacks_has_its_default_and_bars_are_black(tmp_path):
    config = {name: value for name, value in DEFAULTS.items() if name not in ("copy_paste", "bars")}
    config |= {"of_another_program": 1, "contour_weight": 0.0}
    checkpoints.save({name: {} for name in REQUIRED} | {"config": config}, tmp_path / "last.pth")
    found = find_checkpoint(tmp_path, "newest", DEFAULTS)
    black = {"contour_weight": 0.0, "bars": "black"}  # which all had before there was the setting
    assert merge_settings(found, DEFAULTS | {"copy_paste": 0.25}, ()) == DEFAULTS | black
    assert settings_of(tmp_path / "last.pth")["bars"] == "black"
    with pytest.raises(ResumeError, match="bars black and cannot go on with reflect"):
        merge_settings(found, DEFAULTS, ("bars",))


@pytest.mark.parametrize(
    ("before", "explicit", "said"),
    [({"image_size": 128}, {"encoder": "resnet18", "image_size": 64, "seed": 1, "sample": True, "num_workers": 1,
                            "grad_accum_steps": 2},
      "--encoder resnet34, --image-size 128, --sample False, --seed 0, --grad-accum-steps 1 and cannot go on with "
      "resnet18, 64, True, 1, 2"),
     ({}, {"decoder_lr_mult": 1.0}, "--decoder-lr-mult 10.0 and cannot go on with 1.0"),  # the groups of weights
     ({"decoder_lr_mult": 1.0}, {"decoder_lr_mult": 2.0}, "--decoder-lr-mult 1.0 and cannot go on with 2.0")],
)  # fmt: skip
def test_all_settings_that_cannot_change_are_refused_at_once(before, explicit, said):
    with pytest.raises(ResumeError, match=f"^last.pth was trained with {said}$"):
        resumed(before, explicit)


def test_the_message_names_changes_and_defaults_that_do_not_apply():
    file = DEFAULTS | {"num_workers": 1, "learning_rate": 0.5, "checkpoint_dir": "b"}
    start = checkpoint(encoder="resnet18", pretrained=False)
    now = merge_settings(start, file, ["num_workers"])
    start[1]["step"] = 7
    assert resume_message(start, now, file, world_size=2) == (
        "going on from last.pth, after epoch 3, step 7, num_workers 12 is now 1, checkpoint_dir checkpoints is now b, "
        "processes 1 is now 2 (so not bit for bit the run that it would have been); "
        "from the checkpoint, and not from the defaults: encoder resnet18 (resnet34), "
        "learning_rate 0.0001 (0.5)")  # fmt: skip


def test_without_a_checkpoint_a_run_begins(tmp_path, capsys):
    for resume, said in (("", ""), ("newest", f"nothing to resume in {tmp_path}: starting from the beginning\n")):
        assert find_checkpoint(tmp_path, resume, DEFAULTS) is None
        assert capsys.readouterr().out == said


def test_a_file_that_holds_a_model_only_is_refused_and_one_that_is_not_there(trained):
    gone = trained.with_name("gone.pth")
    with pytest.raises(CheckpointError, match=f"there is no checkpoint {gone}"):
        find_checkpoint(trained.parent, str(gone), DEFAULTS)
    with pytest.raises(CheckpointError, match=rf"^{trained} holds a model only, .*last.pth .*--start-from {trained}\)"):
        find_checkpoint(trained.parent, str(trained), DEFAULTS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A model of resnet18 without attention gates at 64 pixels."""
    path = tmp_path_factory.mktemp("trained") / "best_model.pth"
    config = {"encoder": "resnet18", "use_attention": False, "image_size": 64}
    torch.manual_seed(1)
    model = UNetAutoencoder("resnet18", pretrained=False, use_attention=False)
    checkpoints.save({"epoch": 1, "config": config, "model": model.state_dict(), "metrics": {}}, path)
    return path


def start(*arguments: object) -> trainer.Run:
    config, _ = trainer.parse([*map(str, arguments), "--device", "cpu"])
    return trainer.start_run(config, ALONE)


def test_a_run_starts_from_trained_weights_of_half_precision_and_their_settings(trained, monkeypatch, tmp_path):
    content = torch.load(trained, weights_only=True)
    halved = {name: value.half() if value.is_floating_point() else value for name, value in content["model"].items()}
    checkpoints.save({**content, "model": halved}, tmp_path / "bundled.pth")
    monkeypatch.setattr("cutting.cutter.BUNDLED", tmp_path / "bundled.pth")
    run = start("--start-from", "bundled")
    settings, weights = run.settings, run.model.state_dict()
    assert (settings["encoder"], settings["use_attention"], settings["image_size"]) == ("resnet18", False, 64)
    assert (settings["num_epochs"], settings["batch_size"], settings["seed"]) == (40, 8, 0)  # FINE_TUNING's
    assert same({name: value.to(halved[name].dtype) for name, value in weights.items()}, halved)
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())
    assert (run.epochs_done, run.step, run.history, {**run.optimizer.state}) == (0, 0, [], {})
    assert run.scheduler.base_lrs == [5e-5]  # nothing starts from random values
    config, _ = trainer.parse(["--start-from", str(trained), "--image-size", "96", "--num-epochs", "3"])
    assert (config.image_size, config.num_epochs, config.learning_rate) == (96, 3, 5e-5)


@pytest.mark.parametrize(
    ("batch_size", "whole_model", "learning", "note"),
    [(15, True, set(), ", its BatchNorm statistics frozen"),
     (15, False, {"decoder"}, ", the encoder's BatchNorm statistics frozen"),  # with ImageNet's weights
     (16, True, {"decoder", "encoder"}, "")],
)  # fmt: skip
def test_pretrained_batchnorm_is_frozen_for_small_batches(batch_size, whole_model, learning, note, trained):
    run = start("--start-from", trained, "--batch-size", batch_size)
    run.settings["start_from"] *= whole_model
    assert run_info.frozen_bn_note(run) == note
    run.begin_epoch()
    norms = {name: layer for name, layer in run.model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    assert {name.split(".")[0] for name, layer in norms.items() if layer.training} == learning
    assert run.model.encoder.training  # dropout and the like are as ever
    assert not start("--no-pretrained", "--batch-size", "2", "--encoder", "resnet18").frozen_bn


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("start_from", "asked"), [("", [True, False]), ("gone.pth", [False, "gone.pth", False])])
def test_only_a_new_run_loads_weights_to_start_from(start_from, asked, coco_root, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(trainer, "UNetAutoencoder", lambda *args: (loaded.append(args[1]), Tiny())[1])
    monkeypatch.setattr(resuming, "load_weights", lambda _, path: loaded.append(str(path)))
    for epochs in (1, 2):
        settings = {"pretrained": True, "start_from": start_from, "resume": "newest"}
        trainer.main(small(coco_root, tmp_path, num_epochs=epochs, **settings))
    assert loaded == asked


@pytest.mark.parametrize(
    ("flags", "line"),
    [("--start-from=none.pth --checkpoint-dir={folder}/run", "there is no checkpoint none.pth"),
     ("--start-from={folder}/a.pth", "a.pth is damaged or no checkpoint"),
     ("--start-from={trained} --encoder=resnet34", "are those of resnet18 without attention gates: another --encoder"),
     ("--start-from={trained} --checkpoint-dir={trained.parent}", "lies in the run's own folder"),
     ("--start-from={trained} --encoder-weights=a.pth", "--encoder-weights and --start-from both name")],
)  # fmt: skip
def test_a_file_that_cannot_be_started_from_is_refused(flags, line, trained, coco_root, tmp_path, capsys):
    (tmp_path / "a.pth").touch()
    arguments = f"--data-root={coco_root} --device=cpu --num-workers=0 {flags.format(folder=tmp_path, trained=trained)}"
    assert line in command_error(capsys, *arguments.split())
