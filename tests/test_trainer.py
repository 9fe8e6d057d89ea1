"""The command line and the single steps of a training, against values worked out by hand."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import os
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import write_split
from tiny_runs import ALONE, Tiny, command_error, flags, run_of, same, small, spoil_losses, unwatched
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import trainer
from datasets import COCOPersonDataset, batches, make_loader
from models import UNetAutoencoder, model_weights, read_checkpoint
from trainer import Config, parse
from training import batches as steps
from training.command_line import UsageError, flag
from training.settings import LIMITS, WEIGHT_LIMITS, check
from utils import LossCalculator

pytestmark = pytest.mark.usefixtures("tiny")
FIELDS = {field.name: field for field in dataclasses.fields(Config)}
PHOTOS = 10  # of the training in `coco_root`


def test_defaults_are_those_that_the_owner_fixed():
    fixed = dict(
        batch_size=32, learning_rate=1e-4, weight_decay=1e-6, num_epochs=100, image_size=384, num_workers=12,
        pin_memory=True, device="cuda:{local_rank}", pretrained=True, use_attention=True, checkpoint_dir="checkpoints",
        data_root="data/coco", train_split="train2017", val_split="val2017", resume="", sample=False,
    )  # fmt: skip
    assert fixed.items() <= dataclasses.asdict(Config()).items()
    assert parse([]) == (Config(), set())


def test_help_names_the_choices(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "resnet18,resnet34,resnet50" in "".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.type in ("int", "float")])
def test_limits_are_allowed_and_what_is_beyond_is_not(name):
    low, high = WEIGHT_LIMITS if name.endswith("_weight") else LIMITS[name]
    for value in (low, high):
        check(dataclasses.replace(Config(), **{name: value}))
    is_float = FIELDS[name].type == "float"
    for value in (low / 2 or -0.5, high * 2.0, math.nan, math.inf) if is_float else (low - 1, high + 1):
        with pytest.raises(UsageError) as error:
            check(dataclasses.replace(Config(), **{name: value}))
        assert str(error.value) == f"{flag(name)} {value} is out of range: from {low} to {high}"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [("--batch_size 1.5", "--batch-size 1.5"), ("--batch-size=0", "--batch-size 0 65536"),
     ("--encoder vgg", "--encoder vgg resnet34"), ("--no-pretraind", "--no-pretraind mean --no-pretrained?"),
     ("--batch-size 16 photos", "photos"), ("--sample --encoder-weights=a.pth", "--encoder-weights --no-pretrained"),
     ("--device=cuda:99", "cuda:99"), ("--run-name=a/b", "--run-name a/b --checkpoint-dir"),
     ("--run-name=..", "--run-name .."), ("--batch-size=1 --image-size=32", "--batch-size 1 --image-size 32")],
)  # fmt: skip
def test_a_mistake_on_the_command_line_gets_one_line_that_names_it(arguments, named, capsys):
    error = command_error(capsys, *arguments.split())
    assert all(word in error for word in named.split()), error


@pytest.mark.parametrize(
    ("arguments", "resume", "folder"),
    [("", "", "checkpoints"), ("--resume --seed=1", "newest", "checkpoints"),
     ("--resume=a_run/1.pth", "a_run/1.pth", "a_run"),
     ("--resume a_run/1.pth --run-name b", "a_run/1.pth", "checkpoints/b"),
     ("--resume a_run/1.pth --checkpoint-dir c", "a_run/1.pth", "c")],
)  # fmt: skip
def test_resume_is_absent_bare_or_a_file_whose_folder_is_the_runs(arguments, resume, folder):
    config, _ = parse(arguments.split())
    assert (config.resume, trainer.folder_of(config)) == (resume, Path(folder))


@pytest.mark.parametrize(("wanted", "cores", "processes", "workers"), [(12, 64, 8, 8), (12, 4, 8, 1), (3, 4, 1, 3)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_share_the_cores_of_the_machine(wanted, cores, processes, workers, coco_root, monkeypatch):
    monkeypatch.setattr(trainer, "usable_cores", lambda: cores)
    alone = dataclasses.replace(ALONE, local_world_size=processes)
    for loader in trainer.open_data(small(coco_root, "unused", num_workers=wanted, bars="black"), alone):
        assert loader.num_workers == workers
        assert loader.dataset.dataset.sources[0].bars == "black"


@pytest.mark.parametrize(
    ("photos", "processes", "size", "refused"), [(1, 1, 32, 1), (2, 1, 32, 0), (2, 2, 32, 1), (2, 2, 33, 0)]
)
def test_a_single_photo_a_process_needs_more_than_32_pixels(photos, processes, size, refused, coco_root):
    write_split(coco_root, "train2017", photos, first_id=1)
    several = dataclasses.replace(ALONE, world_size=processes)
    with pytest.raises(UsageError, match="one training photo per process") if refused else contextlib.nullcontext():
        trainer.open_data(small(coco_root, "unused", image_size=size), several)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [(lambda path: os.truncate(path / "val2017" / "000000000103.jpg", 9), "{root}/val2017/000000000103.jpg"),
     (lambda path: (path / "run").touch(), "--checkpoint-dir {root}/run")],
)  # fmt: skip
def test_data_that_cannot_be_used_get_one_line_that_names_them(spoil, named, coco_root, capfd):
    spoil(coco_root)
    config = small(coco_root, coco_root / "run", max_unreadable_fraction=0.0, num_workers=1)
    assert named.format(root=coco_root) in command_error(capfd, *flags(config))
    assert not list(coco_root.glob("run/*.pth"))


def test_learning_rate_is_a_cosine_that_waits_for_skipped_steps(coco_root, tmp_path, learning_rates, monkeypatch):
    spoil_losses(monkeypatch, [7])
    trainer.main(small(coco_root, tmp_path, learning_rate=0.01, num_epochs=3, restart_period=1, restart_mult=2))
    # Ten photos in batches of four are three steps an epoch: of a cycle of one epoch, and of one of two, whose second
    # step is skipped; the epoch after that goes on where it would have done.
    fractions = [0, 1 / 3, 2 / 3, 0, 1 / 6, 1 / 6, 1 / 3, 2 / 3, 5 / 6]
    by_hand = [0.01 * (1 + math.cos(math.pi * fraction)) / 2 for fraction in fractions]  # Loshchilov and Hutter 2017
    assert learning_rates == pytest.approx(by_hand, rel=1e-6)
    rows = read_checkpoint(tmp_path / "last.pth")["history"]
    assert [row["learning_rate"] for row in rows] == pytest.approx(by_hand[2::3], rel=1e-6)
    assert [row["skipped_steps"] for row in rows] == [0, 1, 0]


def training_loader(coco_root: Path, batch_size: int):
    return make_loader(COCOPersonDataset(coco_root, "train2017", 32), batch_size, 0, training=True)


def weights_of(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def train_once(model: nn.Module, coco_root, batch_size: int, micro_batches: int = 1, **settings) -> dict[str, float]:
    """Trains an epoch by plain gradient descent, without clipping and copy-paste."""
    config, run = Config(batch_size=batch_size, grad_clip=0, copy_paste=0, **settings), run_of(model, micro_batches)
    return trainer.train_one_epoch(run, training_loader(coco_root, batch_size), 0, config, unwatched(run))


@pytest.mark.parametrize(("grad_accum_steps", "micro_batches"), [(1, 1), (1, 2), (2, 3), (7, 1)])
def test_a_step_takes_the_mean_over_its_photos_however_they_are_split(grad_accum_steps, micro_batches, coco_root):
    # Ten photos in batches of four, the last of two: with grad_accum_steps=2 the steps have eight photos and two.
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 1).double()
    by_hand = copy.deepcopy(model)
    model.register_forward_pre_hook(lambda _, inputs: inputs[0].double())
    metrics = train_once(model, coco_root, 4, micro_batches, grad_accum_steps=grad_accum_steps)
    photos, total = torch.cat(list(batches(training_loader(coco_root, 4), 0))).double() / 255, 0.0
    optimizer = torch.optim.SGD(by_hand.parameters(), 1.0)
    for group in photos.split(4 * grad_accum_steps):
        losses = torch.stack([LossCalculator()(by_hand(photo[None, :3]), photo[None])[0] for photo in group])
        total += losses.sum().item()
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    assert metrics["loss"] == pytest.approx(total / PHOTOS, rel=1e-6)
    assert metrics["images"] == PHOTOS
    assert torch.allclose(weights_of(model), weights_of(by_hand), rtol=0, atol=1e-7)


def test_gradients_are_synced_with_the_last_micro_batch_only(coco_root):
    model = nn.Conv2d(3, 4, 1)
    model.no_sync = Mock(side_effect=contextlib.nullcontext)
    train_once(model, coco_root, 5, micro_batches=2, grad_accum_steps=2)
    assert model.no_sync.call_count == 3  # of four micro-batches of one step


def test_persons_are_pasted_in_the_training_and_not_in_the_validation(coco_root, monkeypatch):
    loader, run, seen = training_loader(coco_root, 5), run_of(nn.Conv2d(3, 4, 1)), []
    plain, forward = list(batches(loader, 0)), LossCalculator.forward
    monkeypatch.setattr(LossCalculator, "forward", lambda *given: seen.append(given[2] * 255) or forward(*given))
    trainer.train_one_epoch(run, loader, 0, Config(batch_size=5, copy_paste=1), unwatched(run))
    for batch, target in zip(plain, seen, strict=True):
        assert not torch.equal(target.round().byte(), batch)
        assert torch.equal(target.round().byte(), steps.copy_paste(batch, 1))
    seen.clear()
    trainer.validate(run, loader, unwatched(run))
    assert torch.equal(torch.cat(seen).round().byte(), torch.cat(plain))


@pytest.mark.parametrize("clip", [0, 2, 0.1])  # in units of the gradient's norm
def test_gradients_are_clipped_after_they_are_unscaled(clip, coco_root):
    torch.manual_seed(0)
    model, loader = nn.Conv2d(3, 4, 1), training_loader(coco_root, PHOTOS)
    target = torch.stack([loader.dataset[index] for index in range(PHOTOS)]).float() / 255
    gradients = torch.autograd.grad(LossCalculator()(model(target[:, :3]), target)[0], list(model.parameters()))
    norm, before = nn.utils.parameters_to_vector(gradients).norm().item(), weights_of(model)
    run = run_of(model)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.train_one_epoch(run, loader, 0, Config(grad_clip=clip * norm, copy_paste=0), unwatched(run))
    assert (weights_of(model) - before).norm().item() == pytest.approx(norm * min(clip or 1, 1), rel=1e-3)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_validation_is_the_mean_over_photos_and_changes_nothing(batch_size, coco_root):
    torch.manual_seed(1)
    dataset, run, expected = COCOPersonDataset(coco_root, "val2017", 32), run_of(Tiny()), []
    with torch.no_grad():
        run.model(torch.rand(4, 3, 32, 32))  # running statistics that are not those of the photos
        run.model[-1].bias[3] = 0.0
        before = copy.deepcopy(run.model.eval().state_dict())
        for index in range(5):
            sample, own = dataset[index][None].float() / 255, dataset.own_pixels([index])[0]
            raw = run.model(sample[:, :3])
            alpha, mask = (raw[0, 3] > 0) & own, (sample[0, 3] == 1) & own
            loss = LossCalculator()(raw, sample)[0].item()
            expected.append((((alpha & mask).sum() / (alpha | mask).sum()).item(), loss))
    assert len(set(expected)) == 5
    run.model.train()
    metrics = trainer.validate(run, make_loader(dataset, batch_size, 0, training=False), unwatched(run))
    assert (metrics["iou"], metrics["loss"]) == pytest.approx(np.mean(expected, axis=0), rel=1e-6)
    assert metrics["images"] == 5
    assert not run.model.training
    assert same(run.model.state_dict(), before)


def test_the_ema_is_of_every_step_and_what_is_saved(coco_root, tmp_path):
    trainer.main(small(coco_root, tmp_path, learning_rate=0.01, num_epochs=1))
    best, last = (read_checkpoint(tmp_path / name) for name in ("best_model.pth", "last.pth"))
    assert last["ema"]["steps"] == 3  # ten photos in batches of four
    assert same(best["model"], model_weights(last))
    assert not torch.equal(best["model"]["0.weight"], last["model"]["0.weight"])


def test_a_run_in_micro_batches_says_so_and_trains_and_validates(coco_root, tmp_path, monkeypatch, capsys):
    config, sizes = small(coco_root, tmp_path, num_epochs=1, grad_accum_steps=2, ema_decay=0.0), []
    run = trainer.start_run(config, ALONE)
    run.micro_batches = 2
    run.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(trainer, "start_run", lambda *_: run)
    trainer.main(config)
    banner = " ".join(capsys.readouterr().out.split())
    assert "4 photos at once do not fit in the free memory of cpu: each batch is split into 2 micro-batches" in banner
    assert "8 photos a step, 2 steps an epoch" in banner
    assert sizes[:8] == [2, 2, 2, 2, 2, 2, 2, 1]  # ten photos, and five; then come those of the preview


class Fetched(TorchDispatchMode):
    """Counts how often Python asks a tensor for a float: on a GPU it would wait each time."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point()
        return function(*args, **(kwargs or {}))


def test_the_loop_waits_for_the_device_only_where_it_logs(coco_root):
    config = small(coco_root, "unused", batch_size=2)
    run = trainer.start_run(config, ALONE)
    run.scaler, run.steps_per_epoch = torch.amp.GradScaler("cpu", init_scale=1024.0), 5  # as with float16
    with Fetched() as fetched:
        trainer.train_one_epoch(run, training_loader(coco_root, 2), 0, config, unwatched(run))
    assert fetched.count == 0  # what it logs is fetched as a list


def test_a_step_is_skipped_whichever_of_its_micro_batches_is_broken(coco_root, monkeypatch):
    model = nn.Conv2d(3, 4, 1)
    before = weights_of(model)
    spoil_losses(monkeypatch, [2])
    assert train_once(model, coco_root, 5, micro_batches=2, grad_accum_steps=2)["skipped_steps"] == 1
    assert torch.equal(weights_of(model), before)


@pytest.mark.slow
def test_compiled_the_model_gives_the_same_loss_and_gradients(monkeypatch, coco_root):
    monkeypatch.setattr(trainer, "UNetAutoencoder", UNetAutoencoder)
    # Captured whole, with its backward pass, but run as it is: to translate it into C++ as well takes minutes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    run = trainer.start_run(small(coco_root, "unused", compile=True), ALONE)
    assert run.ddp_model is not run.model
    target = torch.rand(2, 4, 32, 32, generator=torch.Generator().manual_seed(0)).round()
    results = []
    for model in (copy.deepcopy(run.model), run.ddp_model):
        loss, _ = LossCalculator()(model(target[:, :3]), target)
        loss.backward()
        results.append([loss.detach(), *(weights.grad for weights in model.parameters())])
    for plain, compiled in zip(*results, strict=True):
        assert torch.allclose(plain, compiled, rtol=1e-3, atol=1e-5)
    assert not any("_orig_mod" in key for key in run.model.state_dict())
