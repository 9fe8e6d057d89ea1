"""The command line and the single steps of a training, against values worked out by hand."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import write_split
from tiny_runs import ALONE, Tiny, command_error, flags, run_of, small, unwatched
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import trainer
from datasets import COCOPersonDataset, batches, make_loader
from models import UNetAutoencoder, read_checkpoint
from trainer import SAMPLE, Config, parse
from training import batches as steps
from training.command_line import UsageError, flag
from training.settings import LIMITS, WEIGHT_LIMITS, check, field_help
from utils import LossCalculator

pytestmark = pytest.mark.usefixtures("tiny")
FIELDS = {field.name: field for field in dataclasses.fields(Config)}
PHOTOS = 10  # of the training in `coco_root`

# --- the command line -------------------------------------------------------------------------------------


def test_defaults_are_those_that_the_owner_fixed():
    fixed = dict(
        batch_size=32, learning_rate=1e-4, weight_decay=1e-6, num_epochs=100, image_size=384, num_workers=12,
        pin_memory=True, device="cuda:{local_rank}", pretrained=True, use_attention=True, checkpoint_dir="checkpoints",
        data_root="data/coco", train_split="train2017", val_split="val2017", resume="", sample=False,
    )  # fmt: skip
    assert fixed.items() <= dataclasses.asdict(Config()).items()
    assert parse([]) == (Config(), set())


def test_help_shows_each_flag_with_its_comment_its_choices_and_no_empty_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    shown = "".join(capsys.readouterr().out.split())
    for name, (_, comment) in field_help(Config).items():
        assert comment, name
        assert flag(name) in shown
        assert "".join(comment.split()) in shown
    choices = "resnet18,resnet34,resnet50", "auto,float32,bfloat16;defaultauto", "global_iou,global_dice;defaultiou"
    assert all(text in shown for text in choices)
    assert not any(text in shown for text in ("{local_rank}", "()", "(default)"))


def other_value(name: str) -> object:
    """Returns a value that is allowed and not the default."""
    default = FIELDS[name].default
    others = {"bars": "black", "encoder": "resnet50", "precision": "float32", "best_metric": "dice"}
    if isinstance(default, str):
        return others.get(name, f"{default}_x")
    return not default if isinstance(default, bool) else default / 2 if isinstance(default, float) else default + 1


@pytest.mark.parametrize("spell", [flag, "--{}".format], ids=["dashes", "underscores"])
@pytest.mark.parametrize("separator", [" ", "="])
@pytest.mark.parametrize("left_out", ["annotations photos masks start_from", "data_root masks encoder_weights sample"])
def test_every_field_is_a_flag_in_each_spelling(spell, separator, left_out):
    values = {name: other_value(name) for name in FIELDS if name not in left_out.split()} | {"pretrained": True}
    arguments = []
    for name, value in values.items():
        no_value = isinstance(value, bool)
        text = spell(name if value else f"no_{name}") if no_value else f"{spell(name)}{separator}{value}"
        arguments += text.split(" ")
    assert parse(arguments) == (Config(**values), {*values})


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
    [
        ("--batch-size=lots", "--batch-size lots"), ("--batch_size 1.5", "--batch-size 1.5"),
        ("--batch-size", "--batch-size"), ("--batch-size=0", "--batch-size 0 65536"),
        ("--tensorboard=perhaps", "--tensorboard perhaps"), ("--encoder vgg", "--encoder vgg resnet34"),
        ("--precision half", "--precision half bfloat16"), ("--best-metric loss", "--best-metric loss global_iou"),
        ("--batchsize=16", "--batchsize mean --batch-size?"), ("--num-epoch 3", "--num-epoch mean --num-epochs?"),
        ("--no-pretraind", "--no-pretraind mean --no-pretrained?"), ("--frobnicate", "--frobnicate --help"),
        ("--batch-size 16 photos", "photos"), ("--sample --encoder-weights=a.pth", "--encoder-weights --no-pretrained"),
        ("--device=toaster", "--device toaster"), ("--device=cuda:99", "cuda:99"),
        ("--run-name=a/b", "--run-name a/b --checkpoint-dir"), ("--run-name=..", "--run-name .."),
        ("--run-name=a\\b", "--run-name a\\b"), ("--batch-size=1 --image-size=32", "--batch-size 1 --image-size 32"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_gets_one_line_that_names_it(arguments, named, capsys):
    error = command_error(capsys, *arguments.split())
    assert all(word in error for word in named.split()), error


def test_sample_sets_its_settings_and_a_flag_still_wins():
    assert parse(["--sample"])[0] == Config(sample=True, **SAMPLE)
    for arguments in (["--sample", "--encoder=resnet34"], ["--encoder=resnet34", "--sample"]):  # the usual default
        assert parse(arguments)[0] == Config(sample=True, **{**SAMPLE, "encoder": "resnet34"})


@pytest.mark.parametrize(
    ("arguments", "resume", "folder"),
    [
        ("", "", "checkpoints"), ("--resume", "newest", "checkpoints"), ("--resume --seed=1", "newest", "checkpoints"),
        ("--resume a_run/1.pth", "a_run/1.pth", "a_run"), ("--resume=a_run/1.pth", "a_run/1.pth", "a_run"),
        ("--resume a_run/1.pth --run-name b", "a_run/1.pth", "checkpoints/b"),
        ("--resume a_run/1.pth --checkpoint-dir c", "a_run/1.pth", "c"),
    ],
)  # fmt: skip
def test_resume_is_absent_bare_or_a_file_whose_folder_is_the_runs(arguments, resume, folder):
    config, _ = parse(arguments.split())
    assert (config.resume, trainer.folder_of(config)) == (resume, Path(folder))


# --- the data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "cores", "processes", "workers"),
    [(12, 64, 4, 12), (12, 64, 8, 8), (12, 4, 8, 1), (0, 8, 1, 0), (3, 4, 1, 3)],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_share_the_cores_of_the_machine(wanted, cores, processes, workers, coco_root, monkeypatch):
    monkeypatch.setattr(trainer, "usable_cores", lambda: cores)
    alone = dataclasses.replace(ALONE, local_world_size=processes)
    loaders = trainer.open_data(small(coco_root, "unused", num_workers=wanted), alone)
    assert [loader.num_workers for loader in loaders] == [workers, workers]


def test_both_splits_have_the_bars_of_the_settings(coco_root):
    for loader in trainer.open_data(small(coco_root, "unused", bars="black"), ALONE):
        assert {source.bars for source in loader.dataset.dataset.sources} == {"black"}
    expected = COCOPersonDataset(coco_root, "val2017", 32, bars="black")[0]
    assert torch.equal(loader.dataset[0], expected)


@pytest.mark.parametrize(("photos", "processes", "refused"), [(1, 1, True), (2, 1, False), (2, 2, True)])
def test_a_single_photo_a_process_needs_more_than_32_pixels(photos, processes, refused, coco_root):
    write_split(coco_root, "train2017", photos, first_id=1)
    several = dataclasses.replace(ALONE, world_size=processes)
    with pytest.raises(UsageError, match="one training photo per process") if refused else contextlib.nullcontext():
        trainer.open_data(small(coco_root, "unused"), several)
    side = 33 if refused else 32
    loader, _ = trainer.open_data(small(coco_root, "unused", image_size=side), several)
    model = UNetAutoencoder("resnet18", pretrained=False)
    shapes = [model(batch[:, :3] / 255).shape for batch in batches(loader, 0)]
    assert shapes == [(photos // processes, 4, side, side)]


JSON, PHOTO = "annotations/instances_val2017.json", "val2017/000000000103.jpg"


@pytest.mark.parametrize(
    ("spoil", "settings", "named"),
    [
        (shutil.rmtree, {}, "{root} --sample --annotations"),
        (lambda root: os.truncate(root / JSON, 999), {}, "{root}/" + f"{JSON} cut short"),
        (lambda root: [photo.unlink() for photo in (root / "train2017").iterdir()], {}, "{root}/train2017"),
        (lambda root: os.truncate(root / PHOTO, 9), {"num_workers": 1}, "{root}/" + PHOTO),
        (lambda root: None, {"sample": True}, "sample {root}"),  # which is not drawn over something else
        (lambda root: (root / "run").touch(), {}, "--checkpoint-dir {root}/run"),
    ],
)
def test_data_that_cannot_be_used_get_one_line_that_names_them(spoil, settings, named, coco_root, capfd):
    spoil(coco_root)
    error = command_error(capfd, *flags(small(coco_root, coco_root / "run", max_unreadable_fraction=0.0, **settings)))
    assert all(word in error for word in named.format(root=coco_root).split()), error
    assert not list(coco_root.glob("run/*.pth"))


# --- the learning rate ------------------------------------------------------------------------------------


def cosine(start: float, epochs: float, period: float, mult: int) -> float:
    """Returns the learning rate after so many epochs (Loshchilov and Hutter 2017, eq. 5, with a minimum of 0)."""
    while epochs >= period:
        epochs, period = epochs - period, period * mult
    return start * (1 + math.cos(math.pi * epochs / period)) / 2


@pytest.mark.parametrize(
    ("settings", "cycle", "broken", "epochs"),
    [
        # Ten photos in batches of four are three steps an epoch.
        ({"num_epochs": 4, "restart_period": 1, "restart_mult": 2}, (1, 2), 0, [step / 3 for step in range(12)]),
        ({"num_epochs": 2, "grad_accum_steps": 2}, (2, 1), 0, [0, 1 / 2, 1, 3 / 2]),
        # It stands still on a skipped step; the next epoch begins where it would have begun.
        ({"num_epochs": 2}, (2, 1), 2, [0, 1 / 3, 1 / 3, 2 / 3, 4 / 3, 5 / 3]),
    ],
    ids=["longer cycles", "accumulation", "skipped step"],
)
def test_learning_rate_follows_the_cosine_step_by_step(
    settings, cycle, broken, epochs, coco_root, tmp_path, learning_rates, monkeypatch
):
    batch, forward = itertools.count(1), LossCalculator.forward

    def maybe_broken(self, *args):
        loss, terms = forward(self, *args)
        return loss * (math.nan if next(batch) == broken else 1), terms

    monkeypatch.setattr(LossCalculator, "forward", maybe_broken)
    trainer.main(small(coco_root, tmp_path / "run", learning_rate=0.01, **settings))
    by_hand = [cosine(0.01, epoch, *cycle) for epoch in epochs]
    assert learning_rates == pytest.approx(by_hand, rel=1e-6)
    history, steps = read_checkpoint(tmp_path / "run" / "last.pth")["history"], len(epochs) // settings["num_epochs"]
    assert [row["learning_rate"] for row in history] == pytest.approx(by_hand[steps - 1 :: steps], rel=1e-6)
    assert [row["skipped_steps"] for row in history] == [bool(broken), *[0] * (settings["num_epochs"] - 1)]


# --- a step and a validation ------------------------------------------------------------------------------


def training_loader(coco_root: Path, batch_size: int):
    return make_loader(COCOPersonDataset(coco_root, "train2017", 32), batch_size, 0, training=True)


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
    for group in photos.split(4 * grad_accum_steps):
        losses = [LossCalculator()(by_hand(photo[None, :3]), photo[None])[0] for photo in group]
        total += sum(loss.item() for loss in losses)
        gradients = torch.autograd.grad(sum(losses) / len(group), list(by_hand.parameters()))
        with torch.no_grad():
            for weights, gradient in zip(by_hand.parameters(), gradients, strict=True):
                weights -= gradient
    assert metrics["loss"] == pytest.approx(total / PHOTOS, rel=1e-6)
    assert metrics["images"] == PHOTOS
    for weights, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(weights, expected, rtol=0, atol=1e-7)


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
    norm = nn.utils.parameters_to_vector(gradients).norm().item()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    run = run_of(model)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.train_one_epoch(run, loader, 0, Config(grad_clip=clip * norm, copy_paste=0), unwatched(run))
    moved = (nn.utils.parameters_to_vector(model.parameters()) - before).norm().item()
    assert moved == pytest.approx(norm * min(clip or 1, 1), rel=1e-3)


def test_validation_is_the_mean_over_photos_and_changes_nothing(coco_root):
    torch.manual_seed(1)
    weights = {"colour_weight": 0.5, "bce_weight": 2, "dice_weight": 1}
    model, criterion, dataset = Tiny(), LossCalculator(**weights), COCOPersonDataset(coco_root, "val2017", 32)
    with torch.no_grad():  # running statistics that are not those of the photos
        model.train()(torch.rand(4, 3, 32, 32))
        model[-1].bias[3] = 0.0
    before, ious, losses = copy.deepcopy(model.state_dict()), [], []
    with torch.no_grad():
        for index in range(5):
            sample = dataset[index][None].float() / 255
            raw = model.eval()(sample[:, :3])
            own = dataset.own_pixels([index])[0].numpy()
            alpha, mask = (raw[0, 3].numpy() > 0) & own, (sample[0, 3].numpy() == 1) & own
            ious.append((alpha & mask).sum() / (alpha | mask).sum())
            losses.append(criterion(raw, sample)[0].item())
    assert len(set(ious)) == 5
    for batch_size in (2, 8):
        run = run_of(model.train())
        run.criterion = criterion
        metrics = trainer.validate(run, make_loader(dataset, batch_size, 0, training=False), unwatched(run))
        assert metrics["iou"] == pytest.approx(np.mean(ious), rel=1e-9)
        assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
        assert metrics["images"] == 5
        assert not model.training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("ema_decay", [0.999, 0.0])
def test_the_ema_if_there_is_one_is_validated_and_saved(ema_decay, coco_root, tmp_path, monkeypatch):
    validated, validate = [], trainer.validate
    monkeypatch.setattr(trainer, "validate", lambda run, *args: (
        validated.append(copy.deepcopy(run.eval_model.state_dict())), validate(run, *args))[1])  # fmt: skip
    trainer.main(small(coco_root, tmp_path, learning_rate=0.01, num_epochs=1, ema_decay=ema_decay))
    best, last = (read_checkpoint(tmp_path / name) for name in ("best_model.pth", "last.pth"))
    assert all(torch.equal(best["model"][name], value) for name, value in validated[0].items())
    assert torch.equal(best["model"]["0.weight"], last["model"]["0.weight"]) == (ema_decay == 0)
    assert ("ema" in last) == (ema_decay > 0)
    assert not ema_decay or last["ema"]["steps"] == 3  # ten photos in batches of four


# --- on a GPU ---------------------------------------------------------------------------------------------


class Cramped(Tiny):
    """As if the device's memory held no more than two photos."""

    def forward(self, images):
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(images)


def test_a_run_in_micro_batches_says_so_and_trains_and_validates(coco_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "UNetAutoencoder", Cramped)
    config = small(coco_root, tmp_path / "run", num_epochs=1, grad_accum_steps=2)
    run = trainer.start_run(config, ALONE)
    run.micro_batches = steps.find_micro_batches(run.model, 4, 32, ALONE.device, None)
    monkeypatch.setattr(trainer, "start_run", lambda *_: run)
    trainer.main(config)
    banner = " ".join(capsys.readouterr().out.split())
    assert "4 photos at once do not fit in the free memory of cpu: each batch is split into 2 micro-batches" in banner
    assert "8 photos a step, 2 steps an epoch" in banner
    assert run.epochs_done == 1


class Fetched(TorchDispatchMode):
    """Counts how often Python asks a tensor for a float: on a GPU it would wait each time."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point()
        return function(*args, **(kwargs or {}))


def test_the_loop_waits_for_the_device_only_where_it_logs(coco_root, monkeypatch):
    config, tolist = small(coco_root, "unused", batch_size=2, log_every=2), torch.Tensor.tolist
    run = trainer.start_run(config, ALONE)
    run.scaler, run.steps_per_epoch = torch.amp.GradScaler("cpu", init_scale=1024.0), 5  # as with float16
    with Fetched() as fetched:
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (  # the epoch's sums, at its end, are float64
            setattr(fetched, "count", fetched.count + (tensor.dtype == torch.float32)), tolist(tensor))[1])  # fmt: skip
        trainer.train_one_epoch(run, training_loader(coco_root, 2), 0, config, unwatched(run))
    assert fetched.count == 2  # of five steps the second and the fourth


def test_a_step_is_skipped_whichever_of_its_micro_batches_is_broken(coco_root, monkeypatch):
    number, forward, model = itertools.count(1), LossCalculator.forward, nn.Conv2d(3, 4, 1)
    before = copy.deepcopy(model.state_dict())

    def second_is_broken(*args: object):
        loss, terms = forward(*args)
        return loss + (math.inf if next(number) == 2 else 0), terms  # the gradient stays finite

    monkeypatch.setattr(LossCalculator, "forward", second_is_broken)
    metrics = train_once(model, coco_root, 5, micro_batches=2, grad_accum_steps=2)
    assert next(number) == 5
    assert metrics["skipped_steps"] == 1
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


# --- compiled ---------------------------------------------------------------------------------------------


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
