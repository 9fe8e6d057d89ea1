"""Learning rates, their schedule, skipped steps and the EMA, against torch's own and values worked out by hand."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from models import UNetAutoencoder
from training import optim
from training.optim import FiniteGuard, ModelEma, Schedule

CPU = torch.device("cpu")


def test_the_encoder_has_its_learning_rate_and_all_others_a_multiple():
    model = UNetAutoencoder("resnet18", pretrained=False)
    encoder, others = optim.build_param_groups(model, 1e-4, 30.0)
    assert (encoder["lr"], others["lr"]) == (1e-4, pytest.approx(3e-3))
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p].split(".")[0] for p in encoder["params"]} == {"encoder"}
    assert {names[p].split(".")[0] for p in others["params"]} == {"decoder"}
    assert len(encoder["params"]) + len(others["params"]) == len(names)
    (group,) = optim.build_param_groups(model, 1e-4, 1.0)
    assert all(one is other for one, other in zip(group["params"], model.parameters(), strict=True))


# --- schedule ---------------------------------------------------------------------------------------------

LRS = (0.01, 0.1)


def schedule(first: int = 3, mult: int = 3, kind: type = Schedule) -> CosineAnnealingWarmRestarts:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in LRS]
    return kind(SGD(groups), first, mult)


def lrs_at(scheduler: Schedule, epoch: float) -> list[float]:
    scheduler.step(epoch)
    lrs = [group["lr"] for group in scheduler.optimizer.param_groups]
    assert lrs == scheduler.get_last_lr()
    return lrs


@pytest.mark.parametrize(("first", "mult"), [(3, 3), (1, 1), (2, 2), (25, 3)])
def test_schedule_is_torchs_bit_for_bit(first, mult):
    ours, torchs = schedule(first, mult), schedule(first, mult, CosineAnnealingWarmRestarts)
    for step in range(60 * 7):
        torchs.step(step / 7)
        assert lrs_at(ours, step / 7) == torchs.get_last_lr(), step


def test_lr_factor_is_the_whole_schedule():
    class Linear(Schedule):
        def lr_factor(self, epoch: float) -> float:
            return 1 - epoch / 12

    scheduler = schedule(kind=Linear)
    for epoch in (0, 2.5, 3, 11.75):
        assert lrs_at(scheduler, epoch) == [lr * (1 - epoch / 12) for lr in LRS]


@pytest.mark.parametrize(
    ("settings", "cycles", "words"),
    [
        ((100, 0, 3), [25, 75], "25 and 75 epochs"), ((12, 0, 1), [6, 6], "6 and 6 epochs"),
        ((10, 0, 4), [2, 8], "2 and 8 epochs"), ((10, 0, 3), [10], "10 epochs"), ((1, 0, 3), [1], "1 epoch"),
        ((100, 20, 1), [20] * 5, "20, 20, 20, ... and 20 epochs"), ((14, 2, 2), [2, 4, 8], "2, 4 and 8 epochs"),
        ((100, 30, 1), [30] * 4, "30, 30, 30 and 30 epochs, the last of which is cut off after 100"),
        ((14, 1, 3), [1, 3, 9, 27], "1, 3, 9 and 27 epochs, the last of which is cut off after 14"),
    ],
)  # fmt: skip
def test_the_banner_names_the_cycles_that_the_schedule_has(settings, cycles, words):
    num_epochs, _, mult = settings
    scheduler = schedule(optim.first_cycle(*settings), mult)
    lrs = "0.01 for the encoder, 0.1 for the decoder"
    assert optim.describe_schedule(scheduler, num_epochs) == f"{lrs}, in cosine cycles of {words}"
    restarts = [epoch for epoch in range(num_epochs + 1) if lrs_at(scheduler, epoch) == [*LRS]]
    assert restarts == [epoch for epoch in itertools.accumulate([0, *cycles]) if epoch <= num_epochs]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def guarded_steps(
    model: nn.Module, steps: list[str], scaler: torch.amp.GradScaler, fused: bool = True, skipped: int = 0
) -> tuple[FiniteGuard, Adam, list]:
    """Trains on inputs that depend on the step's number; of each step is told what is broken in it, or "".

    Returns the guard, the optimiser, and the guard's counts after each step.
    """
    optimizer, guard = Adam(model.parameters(), 0.1, weight_decay=0.01, fused=fused), FiniteGuard(model, CPU, skipped)
    inputs, counts = torch.randn(20, 5, 3, generator=torch.Generator().manual_seed(1)), []
    for batch, broken in zip(inputs, steps, strict=False):
        if broken == "left out":
            continue
        guard.begin_step()
        optimizer.zero_grad()
        raw = model(batch * math.nan if broken == "input" else batch)  # BatchNorm's averages become NaN as well
        loss = raw.square().mean()
        scaler.scale(loss * (math.nan if broken == "loss" else 1)).backward()
        if broken == "gradient":
            model[0].weight.grad[0, 0] = math.inf
        scaler.unscale_(optimizer)
        losses = {"loss": [loss * math.nan], "infinite loss": [loss, loss + math.inf]}.get(broken, [loss, loss])
        if guard.should_step(optimizer, losses, nn.utils.clip_grad_norm_(model.parameters(), 1.0), scaler):
            optimizer.step()
        scaler.update()
        guard.fetch()
        counts.append((guard.skipped, guard.skipped_in_a_row, guard.most_in_a_row))
    return guard, optimizer, counts


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_broken_step_leaves_no_trace_and_is_counted(fused, scaled):
    steps = ["", "loss", "", "infinite loss", "input", ""] if scaled else ["", "loss", "", "gradient", "input", ""]
    one, other = model(), model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, enabled=scaled)
    guarded = guarded_steps(one, steps, scaler, fused, skipped=7)
    without = guarded_steps(other, ["left out" if broken else "" for broken in steps], scaler, fused)
    for name, value in other.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(one.state_dict()[name], value), name
    for ours, expected in zip(guarded[1].state.values(), without[1].state.values(), strict=True):
        assert all(torch.equal(ours[name], expected[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert guarded[2] == [(7, 0, 0), (8, 1, 1), (8, 0, 1), (9, 1, 1), (10, 2, 2), (10, 0, 2)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("scale", "skipped"), [(2.0**4, 10 - 4), (1.0, 10), (2.0**20, 0)])
def test_overflows_by_which_float16_finds_its_scale_are_not_counted(scale, skipped, fused):
    one, scaler = model(), torch.amp.GradScaler("cpu", init_scale=scale)
    before = copy.deepcopy(one[0].weight)
    guard, *_ = guarded_steps(one, ["gradient"] * 10, scaler, fused)
    assert guard.skipped == guard.skipped_in_a_row == guard.most_in_a_row == skipped
    assert scaler.get_scale() == scale / 2**10
    assert torch.equal(one[0].weight, before)


@pytest.mark.parametrize("decay", [0.999, 0.3])
def test_ema_warms_up_and_then_follows_the_decay(decay):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    ema, by_hand = ModelEma(model, decay), None
    for step, values in enumerate([(1.0, 4.0), (3.0, -2.0), (2.0, 0.5), (7.0, 1.0)]):
        nn.init.constant_(model[0].weight, values[0])
        model[1].running_mean.fill_(values[1])
        model[1].num_batches_tracked.fill_(step)
        ema.update(model)
        weight = 1 - min(decay, (1 + step) / (10 + step))
        values = torch.tensor(values)
        by_hand = values if by_hand is None else by_hand + weight * (values - by_hand)
    assert ema.module[0].weight.item() == pytest.approx(by_hand[0].item(), rel=1e-6)
    assert ema.module[1].running_mean.item() == pytest.approx(by_hand[1].item(), rel=1e-6)
    assert ema.module[1].num_batches_tracked == 3
    assert [p.requires_grad for m in (model, ema.module) for p in m.parameters()] == [True] * 3 + [False] * 3
