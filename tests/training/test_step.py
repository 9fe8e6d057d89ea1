"""The pieces of a step, against what a plain training does: broken numbers leave no trace, sums go on."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import Adam
from torch.utils._python_dispatch import TorchDispatchMode

from training.step import FiniteGuard, Tally, seed_dice
from utils import LossCalculator, largest_of_each


def test_without_other_processes_the_largest_are_the_own():
    assert largest_of_each([3, 0]) == [3, 0]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


BROKEN = {1: "loss", 3: "gradient", 4: "input"}


def train(one: nn.Module, step) -> Adam:
    """Six steps on the same inputs; `step(number, optimizer, loss, backward)` takes each."""
    optimizer = Adam(one.parameters(), 0.1, weight_decay=0.01, fused=True)
    inputs = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(1))
    for number in range(6):
        step(number, optimizer, inputs[number])
    return optimizer


def test_broken_steps_leave_no_trace():
    one, naive = model(), model()
    finite, scaler, counts = FiniteGuard(one, torch.device("cpu"), skipped=7), torch.amp.GradScaler(enabled=False), []

    def guarded(number, optimizer, inputs):
        finite.begin_step()
        optimizer.zero_grad()
        inputs = inputs * math.nan if BROKEN.get(number) == "input" else inputs  # BatchNorm's averages become NaN
        loss = one(inputs).square().mean() * (float("nan") if BROKEN.get(number) == "loss" else 1)
        loss.backward()
        if BROKEN.get(number) == "gradient":
            one[0].weight.grad[0, 0] = float("inf")
        finite.add_loss(loss)
        finite.step(optimizer, scaler, nn.utils.clip_grad_norm_(one.parameters(), 1.0))
        finite.fetch()
        counts.append((finite.skipped, finite.in_a_row))

    def plain(number, optimizer, inputs):
        if number not in BROKEN:
            optimizer.zero_grad()
            naive(inputs).square().mean().backward()
            nn.utils.clip_grad_norm_(naive.parameters(), 1.0)
            optimizer.step()

    optimizers = train(one, guarded), train(naive, plain)
    for name, value in naive.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(one.state_dict()[name], value), name
    states = [list(optimizer.state.values()) for optimizer in optimizers]
    for ours, theirs in zip(*states, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert counts == [(7, 0), (8, 1), (8, 0), (9, 1), (10, 2), (10, 0)]


@pytest.mark.parametrize("losses", [[math.inf], [math.nan, 1.0], [1.0, -math.inf, 1.0]])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is(losses, scaled):
    one = model()
    before = copy.deepcopy(one.state_dict())
    optimizer, finite = Adam(one.parameters(), 0.1, fused=True), FiniteGuard(one, torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, enabled=scaled)
    for broken in (losses, [1.0, 1.0], losses):
        finite.begin_step()
        optimizer.zero_grad()
        scaler.scale(one(torch.ones(2, 3)).sum()).backward()
        scaler.unscale_(optimizer)
        for loss in broken:
            finite.add_loss(torch.tensor(loss))
        finite.step(optimizer, scaler, torch.tensor(1.0))
        same = [torch.equal(value, before[name]) for name, value in one.state_dict().items() if "num" not in name]
        assert all(same) == (broken == losses)
        before = copy.deepcopy(one.state_dict())
    finite.fetch()
    assert finite.skipped == 2
    assert scaler.get_scale() == (2.0**4 if scaled else 1)  # the scale is not what broke the loss


def test_an_overflow_by_which_float16_finds_its_scale_is_no_broken_step():
    one = model()
    finite, scaler = FiniteGuard(one, torch.device("cpu")), torch.amp.GradScaler("cpu", init_scale=2.0**4)
    optimizer = Adam(one.parameters(), 0.1, fused=True)
    finite.begin_step()
    loss = one(torch.ones(2, 3)).sum()
    scaler.scale(loss).backward()
    one[0].weight.grad[0, 0] = float("inf")
    scaler.unscale_(optimizer)
    finite.add_loss(loss)
    finite.step(optimizer, scaler, torch.tensor(float("inf")))
    finite.fetch()
    assert finite.skipped == 0
    assert scaler.get_scale() == 2.0**3


def scaled_steps(scaler: torch.amp.GradScaler, gradients: list[float]) -> FiniteGuard:
    """Steps with such a value in the gradient, of which a GPU is not asked before the end."""
    one = model()
    guard, optimizer = FiniteGuard(one, torch.device("cpu")), Adam(one.parameters(), 0.1, fused=True)
    for gradient in gradients:
        guard.begin_step()
        optimizer.zero_grad()
        loss = one(torch.ones(2, 3)).sum()
        scaler.scale(loss).backward()
        one[0].weight.grad[0, 0] = gradient
        scaler.unscale_(optimizer)
        guard.add_loss(loss)
        guard.step(optimizer, scaler, nn.utils.clip_grad_norm_(one.parameters(), 1.0))
    guard.fetch()
    return guard


@pytest.mark.parametrize(("scale", "counted"), [(2.0**4, 10 - 4), (1.0, 10), (2.0**20, 0)])
def test_an_overflow_is_broken_once_the_scale_is_at_one(scale, counted):
    guard = scaled_steps(torch.amp.GradScaler("cpu", init_scale=scale), [math.inf] * 10)
    assert guard.skipped == guard.in_a_row == guard.most_in_a_row == counted


def test_the_longest_row_of_broken_steps_is_known_whatever_follows_it():
    guard = scaled_steps(torch.amp.GradScaler("cpu", enabled=False), [math.nan] * 3 + [1.0] + [math.nan] * 2 + [1.0])
    assert (guard.skipped, guard.in_a_row, guard.most_in_a_row) == (5, 0, 3)


class Counted(TorchDispatchMode):
    """Counts the operations: on a GPU each would be started by itself."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(layers: int) -> int:
    """Of a guarded step of a model with so much BatchNorm."""
    one = nn.Sequential(nn.Linear(3, 4), *(nn.BatchNorm1d(4) for _ in range(layers)))
    guard, optimizer = FiniteGuard(one, torch.device("cpu")), Adam(one.parameters(), 0.1, fused=True)
    with Counted() as counted:
        guard.begin_step()
        guard.add_loss(torch.tensor(1.0))
        guard.step(optimizer, torch.amp.GradScaler("cpu", enabled=False), torch.tensor(1.0))
    return counted.count


def test_however_much_batchnorm_there_is_its_averages_take_as_many_operations():
    assert operations(2) == operations(20)


def test_the_dice_are_those_of_torch_and_no_other_devices_are_touched(monkeypatch):
    torch.manual_seed(7)
    expected = torch.rand(3)
    touched, module = [], SimpleNamespace(manual_seed=lambda seed: touched.append(seed))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("every GPU is seeded"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module if device.type == "cuda" else None)
    for device, seeded in (("cpu", []), ("cuda:1", [7])):
        seed_dice(7, torch.device(device))
        assert torch.equal(torch.rand(3), expected)
        assert touched == seeded


def tally(seed: int) -> Tally:
    one, random = Tally(LossCalculator()), torch.Generator().manual_seed(seed)
    raw, target = torch.randn(3, 4, 8, 8, generator=random), torch.rand(3, 4, 8, 8, generator=random)
    one.update(*LossCalculator()(raw, target), raw, target)
    return one


def test_a_tally_goes_on_from_what_others_wrote():
    both = Tally(LossCalculator())
    for seed in (0, 1):
        both.add(tally(seed).state())
    one, other = tally(0).compute(), tally(1).compute()
    assert both.compute()["images"] == 6
    for name in ("loss", "colour_loss", "bce_loss", "dice_loss", "iou", "dice"):
        assert both.compute()[name] == pytest.approx((one[name] + other[name]) / 2)


def test_a_new_loss_term_is_counted_by_itself():
    criterion = LossCalculator()
    criterion.weights["edge"] = 0.5
    one = Tally(criterion)
    loss, terms = torch.tensor(3.0), dict.fromkeys(("colour", "bce", "dice", "edge"), torch.tensor(2.0))
    one.update(loss, terms, torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    assert one.compute()["edge_loss"] == 2.0
