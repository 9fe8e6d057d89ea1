"""Signals, the clock and numbers that break, one at a time."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Adam

from training import interruptions
from training.interruptions import BrokenNumbersError, Stopped, Watch
from training.step import FiniteSteps, Tally
from utils import LossCalculator, Processes, largest_of_each

ALONE = Processes(torch.device("cpu"))
ROOT = Path(interruptions.__file__).parents[1]


@pytest.mark.parametrize("number", interruptions.SIGNALS)
def test_a_signal_is_met_at_the_next_question_and_the_handlers_come_back(number):
    before = {n: signal.getsignal(n) for n in interruptions.SIGNALS}
    with pytest.raises(Stopped, match=signal.Signals(number).name) as stop, Watch(ALONE, 0) as watch:  # noqa: PT012
        assert not watch.ask()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # at once: the same one by another way
        watch.ask()
    assert stop.value.code == 128 + number
    assert {n: signal.getsignal(n) for n in interruptions.SIGNALS} == before


def test_a_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal, torch; from training import interruptions; from utils import Processes\n"
        "interruptions.SAME_SIGNAL = -1.0\n"
        "with interruptions.Watch(Processes(torch.device('cpu')), 0):\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('first', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('second', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM
    assert "first" in done.stdout
    assert "second" not in done.stdout


def test_a_checkpoint_is_due_by_the_clock_and_sooner_after_a_failure(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = Watch(ALONE, 15)
    due = []
    for now[0], saved in ((899, None), (900, False), (959, None), (960, True), (1859, None), (1860, None)):
        due.append(watch.ask())
        if saved is not None:
            watch.saved(saved)
    assert due == [False, True, False, True, False, True]
    assert not Watch(ALONE, 0).ask()


def test_ten_broken_steps_in_a_row_are_too_many():
    watch = Watch(ALONE, 0)
    assert not watch.ask(9)
    with pytest.raises(BrokenNumbersError, match="10 steps in a row"):
        watch.ask(10)


def test_without_other_processes_the_largest_are_the_own():
    assert largest_of_each([3, 0]) == [3, 0]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


BROKEN = {1: "loss", 3: "gradient", 4: "loss"}


def train(one: nn.Module, step) -> Adam:
    """Six steps on the same inputs; `step(number, optimizer, loss, backward)` takes each."""
    optimizer = Adam(one.parameters(), 0.1, weight_decay=0.01, fused=True)
    inputs = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(1))
    for number in range(6):
        step(number, optimizer, inputs[number])
    return optimizer


def test_broken_steps_leave_no_trace():
    one, naive = model(), model()
    finite, scaler, counts = FiniteSteps(one, torch.device("cpu"), skipped=7), torch.amp.GradScaler(enabled=False), []

    def guarded(number, optimizer, inputs):
        finite.remember()
        optimizer.zero_grad()
        loss = one(inputs).square().mean() * (float("nan") if BROKEN.get(number) == "loss" else 1)
        loss.backward()
        if BROKEN.get(number) == "gradient":
            one[0].weight.grad[0, 0] = float("inf")
        finite.step(optimizer, scaler, loss, nn.utils.clip_grad_norm_(one.parameters(), 1.0))
        counts.append((finite.fetch(), finite.in_a_row))

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
    optimizer, finite = Adam(one.parameters(), 0.1, fused=True), FiniteSteps(one, torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, enabled=scaled)
    for broken in (losses, [1.0, 1.0], losses):
        finite.remember()
        optimizer.zero_grad()
        scaler.scale(one(torch.ones(2, 3)).sum()).backward()
        scaler.unscale_(optimizer)
        finite.step(optimizer, scaler, torch.tensor(broken), torch.tensor(1.0))
        same = [torch.equal(value, before[name]) for name, value in one.state_dict().items() if "num" not in name]
        assert all(same) == (broken == losses)
        before = copy.deepcopy(one.state_dict())
    assert finite.fetch() == 2
    assert scaler.get_scale() == (2.0**4 if scaled else 1)  # the scale is not what broke the loss


def test_an_overflow_by_which_float16_finds_its_scale_is_no_broken_step():
    one = model()
    finite, scaler = FiniteSteps(one, torch.device("cpu")), torch.amp.GradScaler("cpu", init_scale=2.0**4)
    optimizer = Adam(one.parameters(), 0.1, fused=True)
    loss = one(torch.ones(2, 3)).sum()
    scaler.scale(loss).backward()
    one[0].weight.grad[0, 0] = float("inf")
    scaler.unscale_(optimizer)
    finite.step(optimizer, scaler, loss, torch.tensor(float("inf")))
    assert finite.fetch() == 0
    assert scaler.get_scale() == 2.0**3


def tally(seed: int) -> Tally:
    one, random = Tally(), torch.Generator().manual_seed(seed)
    raw, target = torch.randn(3, 4, 8, 8, generator=random), torch.rand(3, 4, 8, 8, generator=random)
    one.update(*LossCalculator()(raw, target), raw, target)
    one.skipped, one.bad_photos = 2, [seed + 5]
    return one


def test_a_tally_goes_on_from_what_it_wrote_and_the_main_process_takes_all_of_another_number():
    states, device = [tally(0).state(), tally(1).state()], torch.device("cpu")
    for rank in (0, 1):
        own = Tally.of(states, Processes(device, rank=rank, world_size=2))
        assert own.compute() == tally(rank).compute()
        assert own.bad_photos == [rank + 5]
    both, three = tally(0), Processes(device, world_size=3)
    both.losses.sums += tally(1).losses.sums
    both.metrics.sums += tally(1).metrics.sums
    assert Tally.of(states, three).compute() == both.compute()
    other = Tally.of(states, Processes(device, rank=1, world_size=3))
    assert other.compute()["images"] == 0
    assert (other.bad_photos, Tally.of(states, three).bad_photos) == ([], [5, 6])
    assert other.skipped == Tally.of(states, three).skipped == 2
