"""The command line, the schedule and the single steps of a training, against values worked out by hand."""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import write_split
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import trainer
from datasets import COCOPersonDataset, batches, make_loader
from models import UNetAutoencoder
from trainer import LIMITS, SAMPLE, Config, parse
from training import report, resuming, step
from training.checkpoints import RunFolder, save
from training.interruptions import Watch
from training.resuming import ResumeError
from training.run import Run
from training.settings import UsageError
from utils import LossCalculator, Processes

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
ALONE = Processes(torch.device("cpu"))
PHOTOS = 10  # of the training in `coco_root`


def unwatched(run: Run) -> Watch:
    """No signal and no clock interrupts it."""
    return Watch(run, RunFolder("unused", 0), 0)


class Tiny(nn.Sequential):
    """Stands in for the U-Net where the model is not the matter: it has BatchNorm and dropout, and is fast."""

    def __init__(self, *_):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 4, 1)
        )

    @property
    def encoder(self):
        return self[0]

    def predict(self, images):
        return torch.sigmoid(self(images))


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread, which a busy machine does not slow down; and `parse` reads the comments once, not at each call."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inspect.getsource", functools.cache(inspect.getsource))
        yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(trainer, "UNetAutoencoder", Tiny)


def small(coco_root, folder, **changes) -> Config:
    """Settings of a run of seconds on the ten photos of `coco_root`."""
    settings = dict(image_size=32, batch_size=4, num_workers=0, encoder="resnet18", pretrained=False, device="cpu")
    return Config(**{"data_root": str(coco_root), "checkpoint_dir": str(folder), **settings, **changes})


def dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def flags(config: Config) -> list[str]:
    """The command line that says the same as a Config; `resume` is given as "newest" or a file."""
    arguments = []
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, bool):
            arguments.append(dashed(name if value else f"no_{name}"))
        elif name == "resume":
            arguments += {"": [], "newest": ["--resume"]}.get(value, [f"--resume={value}"])
        else:
            arguments.append(f"{dashed(name)}={value}")
    return arguments


def refusal(capsys, *arguments: str) -> str:
    """The one line by which a command line is refused."""
    capsys.readouterr()
    assert trainer.run_command(["trainer.py", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.endswith("\n")
    assert error.count("\n") == 1, error
    return error


@pytest.mark.usefixtures("tiny")
def test_several_roots_are_one_set_and_the_banner_names_them(coco_root, tmp_path, monkeypatch, capsys):
    write_split(tmp_path / "other", "train2017", 6, first_id=3)
    monkeypatch.chdir(tmp_path)
    config = parse(flags(small("other, coco", tmp_path / "run", num_epochs=1)))
    trainer.main(config)
    said = "16 photos to train on (6 in other, 10 in coco), 5 to validate (5 in coco)"
    assert said in " ".join(capsys.readouterr().out.split())
    train, val = trainer.open_data(config, ALONE)
    roots = [COCOPersonDataset(root, "train2017", 32) for root in ("other", "coco")]
    train.dataset.dataset._augment = None
    assert all(map(torch.equal, train.dataset.dataset, [sample for root in roots for sample in root]))
    assert len(train.dataset) == 16
    assert all(map(torch.equal, val.dataset.dataset, COCOPersonDataset(coco_root, "val2017", 32)))
    assert len(val.dataset) == 5


def test_the_sample_is_drawn_into_the_first_of_several_roots(monkeypatch):
    drawn = []
    monkeypatch.setattr("tools.make_sample.draw_sample", drawn.append)
    trainer.draw_sample(Config(data_root="data/sample, my/photos"))
    assert drawn == [Path("data/sample")]


def test_one_root_is_told_as_ever(coco_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "UNetAutoencoder", Tiny)
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=1))
    said = " ".join(capsys.readouterr().out.split())
    assert f"data 10 photos to train on, 5 to validate, in {coco_root} samples from the photos every time" in said


def test_defaults_are_the_owners():
    fixed = dict(
        batch_size=32, learning_rate=1e-4, weight_decay=1e-6, num_epochs=100, image_size=384, num_workers=12,
        pin_memory=True, device="cuda:{local_rank}", pretrained=True, use_attention=True, checkpoint_dir="checkpoints",
        data_root="data/coco", train_split="train2017", val_split="val2017", resume="", sample=False,
    )  # fmt: skip
    assert fixed.items() <= dataclasses.asdict(Config()).items()
    assert parse([]) == Config()


def comments() -> dict[str, str]:
    """The comment beside each field of Config; read from the syntax tree, not as trainer.py does it."""
    source = Path(trainer.__file__).read_text()
    lines = source.splitlines()
    tree = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "Config")
    fields = [node for node in tree.body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2] for node in fields}


def test_every_field_has_a_comment_and_help_shows_it(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    shown = "".join(capsys.readouterr().out.split())
    assert comments().keys() == FIELDS.keys()
    for name, comment in comments().items():
        assert comment, name
        assert "".join(comment.split()) in shown
        assert dashed(name) in shown


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.type != "bool"])
def test_every_field_is_a_flag_in_each_spelling(name):
    default = FIELDS[name].default
    other = {"encoder": "resnet50", "encoder_weights": "some_file.pth", "log_every": 7}.get(name)
    value = other or {int: lambda v: v + 1, float: lambda v: v / 2, str: lambda v: f"{v}_x"}[type(default)](default)
    beside = {"annotations": {"photos": "there"}, "photos": {"annotations": "there"},
              "resume": {"checkpoint_dir": "there"}}.get(name, {})  # fmt: skip
    for flag in (f"--{name}", dashed(name)):
        for arguments in ([flag, str(value)], [f"{flag}={value}"]):
            arguments += [f"--{other}={there}" for other, there in beside.items()]
            assert parse(arguments) == dataclasses.replace(Config(), **beside, **{name: value})


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.type == "bool"])
def test_every_switch_has_its_no(name):
    for on, off in ((dashed(name), dashed(f"no_{name}")), (f"--{name}", f"--no_{name}")):
        assert getattr(parse([on]), name) is True
        assert getattr(parse([off]), name) is False


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.type in ("int", "float")])
def test_limits_are_allowed_and_what_is_beyond_is_not(name, capsys):
    low, high = LIMITS[name]
    flag, is_float = dashed(name), FIELDS[name].type == "float"
    for value in (low, high):
        assert getattr(parse([f"{flag}={value}"]), name) == value
    for value in (low / 2 or -0.5, high * 2.0, math.nan, math.inf) if is_float else (low - 1, high + 1):
        error = refusal(capsys, f"{flag}={value}")
        assert flag in error
        assert str(value) in error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--batch-size=lots", "--batch-size lots"), ("--batch_size 1.5", "--batch-size 1.5"),
        ("--learning-rate=fast", "--learning-rate fast"), ("--batch-size", "--batch-size"),
        ("--amp=perhaps", "--amp perhaps"), ("--encoder vgg", "--encoder vgg resnet34"),
        ("--batchsize=16", "--batchsize=16 mean --batch-size?"), ("--num-epoch 3", "--num-epoch mean --num-epochs?"),
        ("--no-pretraind", "--no-pretraind mean --no-pretrained?"),
        ("--frobnicate", "--frobnicate --help"), ("16", "16"), ("--batch-size 16 photos", "photos"),
        ("--no-pretrained --encoder-weights=a.pth", "--encoder-weights --no-pretrained"),
        ("--device=toaster", "--device toaster"), ("--device=cuda:99", "cuda:99"),
        ("--run-name=a/b", "--run-name a/b --checkpoint-dir"), ("--run-name=..", "--run-name .."),
        ("--run-name=a\\b", "--run-name a\\b"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_line_that_names_it(arguments, named, capsys):
    error = refusal(capsys, *arguments.split())
    assert all(word in error for word in named.split())


def test_sample_sets_its_settings_and_a_flag_still_wins():
    assert parse(["--sample"]) == dataclasses.replace(Config(), sample=True, **SAMPLE)
    assert parse(["--sample", "--image-size=64"]).image_size == 64
    for arguments in (["--sample", "--encoder=resnet34"], ["--encoder=resnet34", "--sample"]):  # the usual default
        assert parse(arguments) == dataclasses.replace(Config(), sample=True, **{**SAMPLE, "encoder": "resnet34"})


def test_resume_is_absent_bare_or_a_file():
    def folder(arguments: list[str]) -> Path:
        return trainer.folder_of(parse(arguments))

    assert not parse([]).resume
    assert parse(["--resume"]).resume == parse(["--resume", "--seed=1"]).resume == "newest"
    assert folder(["--resume"]) == folder([])
    assert folder(["--resume", "a_run/1.pth"]) == Path("a_run")
    assert folder(["--resume", "a_run/1.pth", "--run-name", "b"]) == Path("checkpoints/b")
    assert folder(["--resume", "a_run/1.pth", "--checkpoint-dir", "c"]) == Path("c")
    assert parse(["--resume", "a_run/1.pth"]).resume == parse(["--resume=a_run/1.pth"]).resume == "a_run/1.pth"


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(monkeypatch, capsys):
    monkeypatch.setattr(trainer, "main", Mock(side_effect=KeyboardInterrupt))
    assert trainer.run_command(["trainer.py"]) == 130
    assert "--resume" in capsys.readouterr().err


# --- the schedule -----------------------------------------------------------------------------------------


def cosine(start: float, epochs: float, period: float, mult: int) -> float:
    """The learning rate after so many epochs (Loshchilov and Hutter 2017, eq. 5, with a minimum of 0)."""
    while epochs >= period:
        epochs, period = epochs - period, period * mult
    return start * (1 + math.cos(math.pi * epochs / period)) / 2


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("num_epochs", "period", "mult", "first_cycle"), [(3, 0, 1, 3), (4, 2, 1, 2), (4, 1, 2, 1)]
)
def test_learning_rate_follows_the_cosine_step_by_step(num_epochs, period, mult, first_cycle, coco_root, tmp_path):
    cycle, rates = {"num_epochs": num_epochs, "restart_period": period, "restart_mult": mult}, []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    trainer.main(small(coco_root, tmp_path / "run", learning_rate=0.01, **cycle))
    hook.remove()
    # Ten photos in batches of four are three steps an epoch.
    by_hand = [cosine(0.01, step / 3, first_cycle, mult) for step in range(3 * num_epochs)]
    assert rates == pytest.approx(by_hand, rel=1e-6)
    history = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["history"]
    assert [row["learning_rate"] for row in history] == pytest.approx(by_hand[2::3], rel=1e-6)


@pytest.mark.usefixtures("tiny")
def test_the_schedule_stands_still_on_a_skipped_step(coco_root, tmp_path, monkeypatch):
    rates, batch, forward = [], itertools.count(1), LossCalculator.forward

    def second_is_broken(self, *args):
        loss, terms = forward(self, *args)
        return loss * (math.nan if next(batch) == 2 else 1), terms

    monkeypatch.setattr(LossCalculator, "forward", second_is_broken)
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    trainer.main(small(coco_root, tmp_path / "run", learning_rate=0.01, num_epochs=2))
    hook.remove()
    epochs = [0, 1 / 3, 1 / 3, 2 / 3, 4 / 3, 5 / 3]  # the next epoch begins where it would have begun
    assert rates == pytest.approx([cosine(0.01, epoch, 2, 1) for epoch in epochs], rel=1e-6)
    history = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["history"]
    assert [row["skipped_steps"] for row in history] == [1, 0]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({}, [1e-4, 1e-3]),
        ({"decoder_rate": 3.0, "learning_rate": 2e-4}, [2e-4, 6e-4]),
        ({"decoder_rate": 1.0}, [1e-4]),
        ({"pretrained": False}, [1e-4]),  # the encoder starts from random values as well
    ],
)
def test_what_starts_from_random_values_beside_a_pretrained_encoder_learns_faster(changes, rates):
    run = trainer.start_run(Config(device="cpu", **changes), ALONE)
    assert run.scheduler.base_lrs == pytest.approx(rates)
    run.scheduler.step(30)
    now = [group["lr"] for group in run.optimizer.param_groups]
    assert now == pytest.approx([cosine(rate, 30, run.scheduler.T_0, run.scheduler.T_mult) for rate in rates])


@pytest.mark.usefixtures("tiny")
def test_the_average_of_the_weights_is_what_is_measured_and_saved(coco_root, tmp_path, monkeypatch):
    measured, validate = [], trainer.validate

    def noting(run, *args):
        measured.append(copy.deepcopy(run.average.module.state_dict()))
        assert run.evaluated is run.average.module
        return validate(run, *args)

    monkeypatch.setattr(trainer, "validate", noting)
    trainer.main(small(coco_root, tmp_path / "run", learning_rate=0.01, num_epochs=1))
    best, last = (torch.load(tmp_path / "run" / name, weights_only=True) for name in ("best_model.pth", "last.pth"))
    saved, weights = best["model"], last["model"]
    assert all(torch.equal(saved[name], value) for name, value in measured[0].items())
    assert not torch.equal(saved["0.weight"], weights["0.weight"])
    assert last["average"]["steps"] == 3  # ten photos in batches of four


@pytest.mark.usefixtures("tiny")
def test_without_an_average_the_weights_themselves_are_saved(coco_root, tmp_path):
    trainer.main(small(coco_root, tmp_path / "run", learning_rate=0.01, num_epochs=1, average_decay=0.0))
    best, last = (torch.load(tmp_path / "run" / name, weights_only=True) for name in ("best_model.pth", "last.pth"))
    assert "average" not in last
    assert torch.equal(best["model"]["0.weight"], last["model"]["0.weight"])


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("changes", "cycles"),
    [
        ({}, [25, 75]),
        ({"num_epochs": 12}, [3, 9]),
        ({"num_epochs": 12, "restart_mult": 1}, [6, 6]),
        ({"num_epochs": 10, "restart_mult": 4}, [2, 8]),
        ({"num_epochs": 10}, [10]),  # not divisible by four
        ({"num_epochs": 1}, [1]),
        ({"restart_period": 20, "restart_mult": 1}, [20] * 5),
        ({"restart_period": 100}, [100]),
    ],
)
def test_by_default_the_rate_is_reset_once_and_the_run_ends_with_a_cycle(changes, cycles):
    config = Config(device="cpu", **changes)
    scheduler = trainer.start_run(config, ALONE).scheduler
    assert report.cycles(scheduler, config.num_epochs) == cycles
    assert report.unfinished_cycle(scheduler, config.num_epochs) == ""
    resets = []
    for epoch in range(config.num_epochs + 1):  # the schedule itself, and not our reading of it
        scheduler.step(epoch)
        if scheduler.get_last_lr()[0] == config.learning_rate:
            resets.append(epoch)
    assert resets == [0, *itertools.accumulate(cycles)]


@pytest.mark.parametrize(
    ("period", "mult", "epochs", "ends"),
    [
        (100, 1, 100, None), (10, 1, 100, None), (10, 2, 70, None), (1, 3, 40, None), (10, 2, 10, None),
        (30, 1, 100, (90, 120)), (10, 2, 100, (70, 150)), (1, 3, 14, (13, 40)), (10, 2, 29, (10, 30)),
    ],
)  # fmt: skip
def test_a_run_that_ends_within_a_cycle_is_told_so(period, mult, epochs, ends):
    note = report.unfinished_cycle(SimpleNamespace(T_0=period, T_mult=mult), epochs)
    assert bool(note) == bool(ends)
    assert not ends or (f"{epochs} epochs" in note and "{} and {}".format(*ends) in note)


def test_a_first_cycle_longer_than_the_run_is_named_once():
    assert report.unfinished_cycle(SimpleNamespace(T_0=200, T_mult=1), 100).endswith("(cycles end after 200)")


@pytest.mark.parametrize(
    ("wanted", "cores", "processes", "workers"),
    [(12, 64, 4, 12), (12, 64, 8, 8), (12, 2, 1, 2), (12, 8, 8, 1), (12, 4, 8, 1), (0, 8, 1, 0), (3, 4, 1, 3)],
)
def test_workers_share_the_cores(wanted, cores, processes, workers):
    assert trainer.workers_per_process(wanted, cores, processes) == workers


def test_seeds_of_different_numbers_differ():
    triples = list(itertools.product(range(8), repeat=3))
    assert len({trainer.seed_from(*triple) for triple in triples}) == len(triples)


def test_to_device_keeps_values_and_channels():
    batch = torch.arange(256, dtype=torch.uint8).view(1, 4, 8, 8)
    images, target = step.to_device(batch, torch.device("cpu"))
    exact = np.arange(256, dtype=np.float32).reshape(1, 4, 8, 8) / np.float32(255)
    assert target.dtype == images.dtype == torch.float32
    assert np.array_equal(target.numpy(), exact)
    assert np.array_equal(images.numpy(), exact[:, :3])


def test_half_of_the_samples_show_the_persons_of_the_one_in_front_of_them():
    batch = torch.randint(0, 256, (400, 4, 6, 5), dtype=torch.uint8)
    batch[:, 3] = torch.randint(0, 2, (400, 6, 5)) * 255
    pasted = step.copy_paste(batch, 0.5)
    changed = 0
    for number, (before, after) in enumerate(zip(batch, pasted, strict=True)):
        expected = before.clone()
        for y, x in (batch[number - 1, 3] == 255).nonzero().tolist():
            expected[:, y, x] = batch[number - 1, :, y, x]
        assert after.equal(before) or after.equal(expected)
        changed += after.equal(expected)
    assert 150 < changed < 250
    assert step.copy_paste(batch, 0) is batch
    assert step.copy_paste(batch[:1], 1).equal(batch[:1])


def test_persons_are_pasted_for_the_training_and_not_for_the_validation(coco_root, monkeypatch):
    loader = make_loader(COCOPersonDataset(coco_root, "train2017", 32), 5, 0, training=True)
    plain, run, seen = list(batches(loader, 0)), run_of(nn.Conv2d(3, 4, 1)), []
    forward = LossCalculator.forward
    monkeypatch.setattr(LossCalculator, "forward", lambda *given: seen.append(given[2] * 255) or forward(*given))
    trainer.train_one_epoch(run, loader, 0, Config(batch_size=5, copy_paste=1), unwatched(run))
    for batch, target in zip(plain, seen, strict=True):
        assert not torch.equal(target.round().byte(), batch)
        assert torch.equal(target.round().byte(), step.copy_paste(batch, 1))
    seen.clear()
    trainer.validate(run, loader, unwatched(run))
    assert torch.equal(torch.cat(seen).round().byte(), torch.cat(plain))


def move(coco_root, grad_clip: float) -> tuple[float, float]:
    """How far one step of plain descent at rate 1 moves the weights, and the norm of the true gradient."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 1)
    loader = make_loader(COCOPersonDataset(coco_root, "train2017", 32), 10, 0, training=True)
    criterion = LossCalculator()
    target = torch.stack([loader.dataset[index] for index in range(10)]).float() / 255
    gradients = torch.autograd.grad(criterion(model(target[:, :3]), target)[0], list(model.parameters()))
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    run = run_of(model)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.train_one_epoch(run, loader, 0, Config(grad_clip=grad_clip, copy_paste=0), unwatched(run))
    moved = nn.utils.parameters_to_vector(model.parameters()) - before
    return moved.norm().item(), torch.cat([gradient.flatten() for gradient in gradients]).norm().item()


def test_gradients_are_clipped_after_they_are_unscaled(coco_root):
    unclipped, gradient = move(coco_root, 0)
    assert unclipped == pytest.approx(gradient, rel=1e-4)
    assert move(coco_root, 2 * gradient)[0] == pytest.approx(gradient, rel=1e-4)
    assert move(coco_root, gradient / 10)[0] == pytest.approx(gradient / 10, rel=1e-3)


def test_evaluate_is_the_mean_over_photos_and_changes_nothing(coco_root):
    torch.manual_seed(1)
    model, criterion = Tiny(), LossCalculator(0.5, 2, 1)
    dataset = COCOPersonDataset(coco_root, "val2017", 32)
    with torch.no_grad():  # averages that are not those of the photos
        model.train()(torch.rand(4, 3, 32, 32))
        model[-1].bias[3] = 0.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ious, losses = [], []
    with torch.no_grad():
        for index in range(5):
            sample = dataset[index][None].float() / 255
            raw = model.eval()(sample[:, :3])
            found, truth = raw[0, 3].numpy() > 0, sample[0, 3].numpy() == 1
            ious.append((found & truth).sum() / (found | truth).sum())
            losses.append(criterion(raw, sample)[0].item())
    assert len(set(ious)) == 5
    for batch_size in (1, 2, 5, 8):
        loader = make_loader(dataset, batch_size, 0, training=False)
        run = run_of(model.train())
        run.criterion = criterion
        figures = trainer.validate(run, loader, unwatched(run))
        assert figures["iou"] == pytest.approx(np.mean(ious), rel=1e-9)
        assert figures["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
        assert figures["images"] == 5
        assert not model.training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- a batch in parts -------------------------------------------------------------------------------------


def run_of(model: nn.Module, parts: int = 1) -> Run:
    """Plain descent at rate 1, so that the weights move by the gradient."""
    optimizer = torch.optim.SGD(model.parameters(), 1.0, fused=True)
    scheduler = CosineAnnealingWarmRestarts(optimizer, 10**6)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Run(ALONE, {}, model, model, LossCalculator(), optimizer, scheduler, scaler, None, parts)


def train_once(model: nn.Module, coco_root, batch_size: int, parts: int = 1, **settings) -> dict[str, float]:
    loader = make_loader(COCOPersonDataset(coco_root, "train2017", 32), batch_size, 0, training=True)
    config = Config(batch_size=batch_size, grad_clip=0, copy_paste=0, **settings)
    run = run_of(model, parts)
    return trainer.train_one_epoch(run, loader, 0, config, unwatched(run))


@pytest.mark.parametrize(("accumulate", "parts"), [(1, 1), (1, 2), (2, 1), (2, 3), (3, 4), (7, 1)])
def test_a_step_takes_the_mean_over_its_photos_however_they_are_cut(accumulate, parts, coco_root):
    # Ten photos in batches of four, the last of two: with accumulate=2 a step has eight photos, and the next one two.
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 1).double()
    by_hand = copy.deepcopy(model)
    double = functools.partial(torch.Tensor.to, dtype=torch.float64)
    model.register_forward_pre_hook(lambda _, inputs: double(inputs[0]))
    figures = train_once(model, coco_root, 4, parts, accumulate=accumulate)

    loader = make_loader(COCOPersonDataset(coco_root, "train2017", 32), 4, 0, training=True)
    photos = torch.cat(list(batches(loader, 0))).double() / 255
    losses = 0.0
    for group in photos.split(4 * accumulate):
        one_by_one = [LossCalculator()(by_hand(photo[None, :3]), photo[None])[0] for photo in group]
        losses += sum(loss.item() for loss in one_by_one)
        gradients = torch.autograd.grad(sum(one_by_one) / len(group), list(by_hand.parameters()))
        with torch.no_grad():
            for weights, gradient in zip(by_hand.parameters(), gradients, strict=True):
                weights -= gradient
    assert figures["loss"] == pytest.approx(losses / 10, rel=1e-6)
    assert figures["images"] == 10
    for weights, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(weights, expected, rtol=0, atol=1e-7)


def test_a_step_seeds_no_gpu_but_its_own(coco_root, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", Mock())
    train_once(nn.Conv2d(3, 4, 1), coco_root, 5)
    torch.cuda.manual_seed_all.assert_not_called()


def test_gradients_are_shared_with_the_last_part_only(coco_root):
    model = nn.Conv2d(3, 4, 1)
    model.no_sync = Mock(side_effect=contextlib.nullcontext)
    train_once(model, coco_root, 5, parts=2, accumulate=2)
    assert model.no_sync.call_count == 3  # of four parts of one step


def test_a_batch_in_parts_trains_the_real_model_like_the_whole_up_to_batchnorm(coco_root, monkeypatch):
    torch.manual_seed(0)
    start = UNetAutoencoder("resnet18", pretrained=False).double().eval()
    whole, cut = copy.deepcopy(start), copy.deepcopy(start)
    for model in (whole, cut):  # BatchNorm goes by its averages: the only difference is left out
        monkeypatch.setattr(model, "train", Mock())
    figures = [train_once(model, coco_root, 10, parts)["loss"] for model, parts in ((whole, 1), (cut, 4))]
    assert figures[1] == pytest.approx(figures[0], abs=1e-6)
    moved = 0.0
    for before, one, other in zip(*(model.parameters() for model in (start, whole, cut)), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-6)
        moved = max(moved, (one - before).abs().max().item())
    assert moved > 1e-2


class Cramped(Tiny):
    """As if the device's memory held no more than `room` photos."""

    room = 2

    def forward(self, images):
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(images)


def test_a_run_in_parts_says_so_and_trains_and_validates(coco_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "UNetAutoencoder", Cramped)
    config = small(coco_root, tmp_path / "run", num_epochs=1, accumulate=2)
    run = trainer.start_run(config, ALONE)
    run.parts = step.find_parts(run.model, 4, 32, ALONE.device, None)
    monkeypatch.setattr(trainer, "start_run", lambda *_: run)
    trainer.main(config)
    told = " ".join(capsys.readouterr().out.split())
    assert "4 photos at once do not fit in the free memory of cpu: each batch is computed in 2 parts" in told
    assert "8 photos a step, 2 steps an epoch" in told
    assert run.epochs_done == 1


@pytest.mark.parametrize(("device", "sample", "tried"), [("cuda:0", False, True), ("cuda:0", True, False),
                                                         ("cpu", False, None)])  # fmt: skip
def test_on_a_gpu_convolutions_are_tuned_before_the_memory_is_tried(device, sample, tried, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(trainer, "find_parts", lambda *_: seen.append(torch.backends.cudnn.benchmark) or 1)
    monkeypatch.setattr(trainer, "build_model", lambda *_, **__: Tiny())
    trainer.start_run(Config(sample=sample, pretrained=False, amp=False), Processes(torch.device(device)))
    assert seen == ([] if tried is None else [tried])
    assert torch.backends.cudnn.benchmark is bool(tried)


@pytest.mark.usefixtures("tiny")
def test_the_schedule_counts_steps_not_batches(coco_root, tmp_path):
    rates = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=2, learning_rate=0.01, accumulate=2))
    hook.remove()
    assert rates == pytest.approx([cosine(0.01, step / 2, 2, 1) for step in range(4)], rel=1e-6)


class Fetched(TorchDispatchMode):
    """Counts the times that Python asks a tensor for figures: on a GPU it would wait for each."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        fetches = function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += fetches and args[0].is_floating_point()
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        real = torch.Tensor.tolist  # which no dispatch sees

        def counted(tensor):
            self.count += tensor.is_floating_point() and tensor.dtype != torch.float64  # the epoch's sums, at its end
            return real(tensor)

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(torch.Tensor, "tolist", counted)
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)


@pytest.mark.usefixtures("tiny")
def test_the_loop_waits_for_the_device_only_where_it_logs(coco_root):
    config = small(coco_root, "unused", batch_size=2, log_every=2)
    run = trainer.start_run(config, ALONE)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # as with float16
    loader = make_loader(COCOPersonDataset(coco_root, "train2017", 32), 2, 0, training=True)
    with Fetched() as fetched:
        trainer.train_one_epoch(run, loader, 0, config, unwatched(run))
    assert fetched.count == 2  # of five steps the second and the fourth


@pytest.mark.usefixtures("tiny")
def test_a_scaled_step_that_overflows_changes_nothing(coco_root):
    config = small(coco_root, "unused", batch_size=10)
    run = trainer.start_run(config, ALONE)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    before = [weights.clone() for weights in run.model.parameters()]
    loader = make_loader(COCOPersonDataset(coco_root, "train2017", 32), 10, 0, training=True)
    run.criterion = LossCalculator(10**6, 10**6, 10**6)
    trainer.train_one_epoch(run, loader, 0, config, unwatched(run))
    assert all(torch.equal(one, other) for one, other in zip(before, run.model.parameters(), strict=True))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("cut", [{"accumulate": 5}, {"parts": 5}])
def test_a_step_is_skipped_whichever_of_its_parts_is_broken(coco_root, cut, scaled):
    batch_size = PHOTOS // cut.get("accumulate", 1)
    config = small(coco_root, "unused", batch_size=batch_size, accumulate=cut.get("accumulate", 1))
    run = trainer.start_run(config, ALONE)
    run.parts, run.scaler = cut.get("parts", 1), torch.amp.GradScaler("cpu", enabled=scaled)
    before = {name: value.clone() for name, value in run.model.state_dict().items() if "num" not in name}
    loader, losses = make_loader(COCOPersonDataset(coco_root, "train2017", 32), batch_size, 0, training=True), []

    class SecondIsBroken(LossCalculator):
        def forward(self, raw, target):
            loss, terms = super().forward(raw, target)
            losses.append(loss)
            return loss + (math.inf if len(losses) == 2 else 0), terms  # the gradient stays finite

    run.criterion = SecondIsBroken()

    with Fetched() as fetched:
        figures = trainer.train_one_epoch(run, loader, 0, config, unwatched(run))
    assert fetched.count == 0
    assert len(losses) == 5
    assert figures["skipped_steps"] == 1
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items() if name in before)


@pytest.mark.usefixtures("tiny")
def test_a_checkpoint_of_an_unfused_adam_goes_on_fused(coco_root, tmp_path):
    run = trainer.start_run(small(coco_root, tmp_path), ALONE)
    run.optimizer = torch.optim.Adam(run.model.parameters())  # as it was written before there was the setting
    run.model(torch.rand(2, 3, 32, 32)).sum().backward()
    run.optimizer.step()
    content = run.checkpoint()
    for missing in ("accumulate", "compile", "bfloat16_on_cpu"):
        del content["config"][missing]
    save(content, tmp_path / "old.pth")
    settings, defaults = small(coco_root, tmp_path), dataclasses.asdict(Config())
    found = resuming.find_checkpoint(tmp_path, str(tmp_path / "old.pth"), defaults)
    resumed = trainer.start_run(settings, ALONE, found=found)
    assert resumed.optimizer.param_groups[0]["fused"]
    moments = [state["exp_avg"] for state in resumed.optimizer.state.values()]
    assert all(map(torch.equal, moments, [state["exp_avg"] for state in run.optimizer.state.values()]))
    now = dataclasses.asdict(settings) | {"accumulate": 2}
    with pytest.raises(ResumeError, match="--accumulate 1 and cannot go on with 2"):  # what it does not know is as ever
        resuming.settings_to_go_on_with(found, now, ["accumulate"])


# --- compiled ---------------------------------------------------------------------------------------------


def test_compiled_the_model_gives_the_same_loss_and_gradients(monkeypatch, coco_root):
    # Captured whole, with its backward pass, but run as it is: to translate it into C++ as well takes minutes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    run = trainer.start_run(small(coco_root, "unused", compile=True), ALONE)
    assert run.parallel_model is not run.model
    target = torch.rand(2, 4, 32, 32, generator=torch.Generator().manual_seed(0)).round()
    results = []
    for model in (copy.deepcopy(run.model), run.parallel_model):
        loss, _ = LossCalculator()(model(target[:, :3]), target)
        loss.backward()
        results.append([loss.detach(), *(weights.grad for weights in model.parameters())])
    for plain, compiled in zip(*results, strict=True):
        assert torch.allclose(plain, compiled, rtol=1e-3, atol=1e-5)
    assert not any("_orig_mod" in key for key in run.model.state_dict())


@pytest.mark.usefixtures("tiny")
def test_compiled_for_a_shorter_last_batch_it_stays_static(monkeypatch, coco_root):
    compiled = []

    def as_it_is(graph, inputs):
        compiled.append([type(value) for value in inputs if not isinstance(value, torch.Tensor)])
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=as_it_is))
    run = trainer.start_run(small(coco_root, "unused", compile=True), ALONE)
    for photos in (4, 2, 4, 3):
        run.parallel_model(torch.rand(photos, 3, 32, 32))
    assert compiled == [[], [], []]  # one for each size, none of which takes the size as an argument


# --- data that cannot be used -----------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
class TestBadData:
    def refused(self, capsys, root, tmp_path, **changes) -> str:
        return refusal(capsys, *flags(small(root, tmp_path / "run", **changes)))

    def test_no_coco_says_where_to_get_it(self, capsys, tmp_path):
        error = self.refused(capsys, tmp_path / "nowhere", tmp_path)
        assert all(words in error for words in (str(tmp_path / "nowhere"), "--sample", "--annotations"))
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(("photos", "processes", "refused"), [(1, 1, True), (2, 1, False), (2, 2, True)])
    def test_a_single_photo_at_the_smallest_size(self, photos, processes, refused, capsys, coco_root, tmp_path):
        write_split(coco_root, "train2017", photos, first_id=1)
        place = dataclasses.replace(ALONE, world_size=processes)
        if refused:
            with pytest.raises(UsageError, match="one training photo a process at --image-size 32"):
                trainer.open_data(small(coco_root, tmp_path / "run"), place)
        if refused and processes == 1:
            assert "make --image-size larger" in self.refused(capsys, coco_root, tmp_path)
            assert not (tmp_path / "run").exists()
        smallest = 33 if refused else 32
        loader, _ = trainer.open_data(small(coco_root, tmp_path / "run", image_size=smallest), place)
        model = UNetAutoencoder("resnet18", pretrained=False)
        shapes = [model(batch[:, :3] / 255).shape for batch in batches(loader, 0)]
        assert shapes == [(photos // processes, 4, smallest, smallest)]

    def test_an_annotation_file_cut_short(self, capsys, coco_root, tmp_path):
        path = coco_root / "annotations" / "instances_val2017.json"
        path.write_text(path.read_text()[:-20])
        assert f"{path} is cut short" in self.refused(capsys, coco_root, tmp_path)

    def test_no_photo(self, capsys, coco_root, tmp_path):
        for photo in (coco_root / "train2017").iterdir():
            photo.unlink()
        assert str(coco_root / "train2017") in self.refused(capsys, coco_root, tmp_path)

    @pytest.mark.parametrize("split", ["train2017", "val2017"])
    def test_an_unreadable_photo_is_named(self, split, capsys, coco_root, tmp_path):  # by a worker: test_runs.py
        photo = sorted((coco_root / split).iterdir())[2]
        photo.write_bytes(b"no photo at all")
        assert str(photo) in self.refused(capsys, coco_root, tmp_path, max_bad_photos=0.0)

    def test_a_sample_is_not_drawn_over_something_else(self, capsys, coco_root, tmp_path):
        error = self.refused(capsys, coco_root, tmp_path, sample=True)
        assert "sample" in error
        assert str(coco_root) in error

    def test_a_checkpoint_folder_that_is_a_file(self, capsys, coco_root, tmp_path):
        (tmp_path / "run").touch()
        assert f"--checkpoint-dir {tmp_path / 'run'}" in self.refused(capsys, coco_root, tmp_path)
