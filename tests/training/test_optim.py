"""Learning rates, their schedule, skipped steps and the EMA, against torch's own and values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from tiny_runs import same
from torch import nn
from torch.optim import SGD, Adam, NAdam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from models import UNetAutoencoder
from training import optim
from training.optim import FiniteGuard, ModelEma, Schedule

CPU = torch.device("cpu")


def test_the_encoder_has_its_learning_rate_and_all_others_a_multiple():
    model = UNetAutoencoder("resnet18", pretrained=False)
    encoder, others = optim.build_param_groups(model, 1e-4, 30.0)
    assert (encoder["lr"], others["lr"]) == (1e-4, pytest.approx(3e-3))
    assert {*encoder["params"]} == {*model.encoder.parameters()}
    assert {*others["params"]} == {*model.parameters()} - {*encoder["params"]}
    (group,) = optim.build_param_groups(model, 1e-4, 1.0)
    assert {*group["params"]} == {*model.parameters()}


LRS = (0.01, 0.1)


def schedule(first: int = 3, mult: int = 3, kind: type = Schedule) -> CosineAnnealingWarmRestarts:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in LRS]
    return kind(SGD(groups), first, mult)


def lrs_at(scheduler: Schedule, epoch: float) -> list[float]:
    scheduler.step(epoch)
    return [group["lr"] for group in scheduler.optimizer.param_groups]


@pytest.mark.parametrize(("first", "mult"), [(3, 3), (1, 1), (25, 2)])
def test_schedule_is_torchs_bit_for_bit_and_lr_factor_all_of_it(first, mult, monkeypatch):
    ours, torchs = schedule(first, mult), schedule(first, mult, CosineAnnealingWarmRestarts)
    for step in range(60 * 7):
        torchs.step(step / 7)
        assert lrs_at(ours, step / 7) == torchs.get_last_lr(), step
    monkeypatch.setattr(Schedule, "lr_factor", lambda _, epoch: 1 - epoch / 12)
    assert lrs_at(ours, 2.5) == [lr * (1 - 2.5 / 12) for lr in LRS]


@pytest.mark.parametrize(
    ("settings", "words"),
    [((100, 0, 3), "25 and 75 epochs"), ((10, 0, 3), "10 epochs"), ((1, 0, 3), "1 epoch"),
     ((100, 20, 1), "20, 20, 20, ... and 20 epochs"), ((14, 2, 2), "2, 4 and 8 epochs"),
     ((14, 1, 3), "1, 3, 9 and 27 epochs, the last of which is cut off after 14")],
)  # fmt: skip
def test_the_banner_names_the_cycles_that_the_schedule_has(settings, words):
    num_epochs, _, mult = settings
    lrs = "0.01 for the encoder, 0.1 for the decoder"
    described = optim.describe_schedule(schedule(optim.first_cycle(*settings), mult), num_epochs)
    assert described == f"{lrs}, in cosine cycles of {words}"


def guarded_steps(
    optimizer: Callable[..., Optimizer], scaler: torch.amp.GradScaler, steps: list[str], skipped: int = 0
) -> tuple[dict, dict, list]:
    """Trains on inputs that depend on the step's number; of each step is told what is broken in it, or "".

    Returns the states of the model and of the optimiser, and the guard's counts after each step.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer, guard, counts = optimizer(model.parameters(), 0.1), FiniteGuard(model, CPU, skipped), []
    for batch, broken in zip(torch.randn(20, 5, 3), steps, strict=False):
        if broken == "left out":
            continue
        guard.begin_step()
        optimizer.zero_grad()
        raw = model(batch * math.nan if broken == "input" else batch)  # BatchNorm's averages become NaN as well
        loss = raw.square().mean()
        scaler.scale(loss).backward()
        if broken == "gradient":
            model[0].weight.grad[0, 0] = math.inf
        scaler.unscale_(optimizer)
        losses = [loss, loss + (math.inf if broken == "loss" else 0)]  # of two micro-batches
        if guard.should_step(optimizer, losses, nn.utils.clip_grad_norm_(model.parameters(), 1.0), scaler):
            optimizer.step()
        scaler.update()
        guard.fetch()
        counts.append((guard.skipped, guard.skipped_in_a_row, guard.most_in_a_row))
    weights = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    return weights, optimizer.state_dict()["state"], counts


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("optimizer", [partial(Adam, fused=True), NAdam, partial(SGD, momentum=0.9, fused=True)])
def test_a_broken_step_leaves_no_trace_and_is_counted(optimizer, scaled, monkeypatch):
    monkeypatch.setattr(torch, "empty_like", lambda like, **kind: torch.full_like(like, math.nan, **kind))
    steps = ["input", "", "loss" if scaled else "gradient", "input", ""]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, enabled=scaled)
    *state, counts = guarded_steps(optimizer, scaler, steps, skipped=7)
    assert counts == [(8, 1, 1), (8, 0, 1), (9, 1, 1), (10, 2, 2), (10, 0, 2)]
    *expected, _ = guarded_steps(optimizer, scaler, ["left out" if broken else "" for broken in steps])
    assert same(state, expected)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("scale", "skipped"), [(2.0**4, 10 - 4), (1.0, 10), (2.0**20, 0)])
def test_overflows_by_which_float16_finds_its_scale_are_not_counted(scale, skipped, fused):
    scaler, adam = torch.amp.GradScaler("cpu", init_scale=scale), partial(Adam, fused=fused)
    weights, _, counts = guarded_steps(adam, scaler, ["gradient"] * 10)
    assert counts[-1] == (skipped, skipped, skipped)
    assert scaler.get_scale() == scale / 2**10
    assert torch.equal(weights["0.weight"], guarded_steps(adam, scaler, [])[0]["0.weight"])


@pytest.mark.parametrize("decay", [0.999, 0.3])
def test_ema_warms_up_and_then_follows_the_decay(decay):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    ema, average = ModelEma(model, decay), 1.0
    for step, value in enumerate([1.0, 3.0, 2.0, 7.0]):
        nn.init.constant_(model[0].weight, value)
        model[1].running_mean.fill_(-value)
        model[1].num_batches_tracked.fill_(step)
        ema.update(model)
        average += (1 - min(decay, (1 + step) / (10 + step))) * (value - average)
    averages = ema.module[0].weight.item(), -ema.module[1].running_mean.item()
    assert averages == pytest.approx((average, average), rel=1e-6)
    assert ema.module[1].num_batches_tracked == 3
    assert [p.requires_grad for m in (model, ema.module) for p in m.parameters()] == [True] * 3 + [False] * 3
