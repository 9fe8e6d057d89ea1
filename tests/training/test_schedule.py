"""The schedule of a run that is given another number of epochs or another rate, worked out by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from training.report import described_cycles
from training.schedule import Schedule, first_cycle

RATES = (0.01, 0.1)


def schedule(epochs: int = 12) -> Schedule:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in RATES]
    return Schedule(torch.optim.SGD(groups), first_cycle(epochs, 0, 3), 3)


def at(scheduler: Schedule, epoch: float) -> list[float]:
    scheduler.step(epoch)
    rates = [group["lr"] for group in scheduler.optimizer.param_groups]
    assert rates == scheduler.get_last_lr()
    return rates


def cosine(epoch: float, begin: float, end: float) -> list[float]:
    return [rate * (1 + math.cos(math.pi * (epoch - begin) / (end - begin))) / 2 for rate in RATES]


def test_as_it_was_planned_it_is_pytorchs_bit_for_bit():
    ours = schedule()
    theirs = CosineAnnealingWarmRestarts(copy.deepcopy(ours.optimizer), 3, 3)
    for step in range(12 * 7):
        theirs.step(step / 7)
        assert at(ours, step / 7) == theirs.get_last_lr()


@pytest.mark.parametrize(
    ("now", "epochs", "begin", "end"),
    [
        (12, 20, 12, 20),  # it was through
        (5 + 1 / 3, 20, 3, 20), (5, 8, 3, 8), (1.5, 20, 3, 20),  # the second cycle becomes longer, or shorter
        (1.5, 3, 0, 3), (1.5, 2, 0, 2),  # and there is no second one
    ],
)  # fmt: skip
def test_with_another_number_of_epochs_its_last_cycle_ends_with_them(now, epochs, begin, end):
    scheduler = schedule()
    before = at(scheduler, now)
    scheduler.end_with(epochs, 12, int(now))
    rates = [group["lr"] for group in scheduler.optimizer.param_groups]  # of the next step
    assert rates == pytest.approx(cosine(now, begin, end) if now >= begin else before)
    restored = schedule(epochs)
    restored.load_state_dict(scheduler.state_dict())
    for it in (scheduler, restored):
        for epoch in (begin, (begin + end) / 2, end - 0.1):
            assert at(it, epoch) == pytest.approx(cosine(epoch, begin, end))
        assert at(it, end) == pytest.approx([0, 0])
        if begin:
            cycle = (0, 3) if begin == 3 else (3, 12)
            assert at(it, begin - 0.25) == pytest.approx(cosine(begin - 0.25, *cycle))


def test_it_is_lengthened_again_and_again():
    scheduler = schedule()
    scheduler.step(12)
    scheduler.end_with(16, 12, 12)
    assert at(scheduler, 14) == pytest.approx(cosine(14, 12, 16))
    scheduler.end_with(18, 16, 14)  # on its way
    assert at(scheduler, 15) == pytest.approx(cosine(15, 12, 18))
    scheduler.end_with(13 + 3, 18, 15)
    assert at(scheduler, 15) == pytest.approx(cosine(15, 12, 16))
    scheduler.step(16)
    scheduler.end_with(20, 16, 16)
    assert at(scheduler, 16) == pytest.approx(cosine(16, 16, 20))


def test_a_run_that_has_done_more_than_is_asked_for_is_described_as_it_was():
    scheduler = schedule()
    scheduler.step(12)
    scheduler.end_with(20, 12, 12)
    assert described_cycles(scheduler, 20) == "a last cosine cycle from epoch 13 to the end of epoch 20"
    assert described_cycles(scheduler, 18) == described_cycles(scheduler, 20)


def test_a_run_whose_last_step_was_skipped_is_through_all_the_same():
    scheduler = schedule()
    scheduler.step(11.9)
    scheduler.end_with(20, 12, 12)
    assert scheduler.get_last_lr() == pytest.approx(cosine(12, 12, 20))


def test_other_rates_take_effect_at_once_and_for_good():
    scheduler = schedule()
    scheduler.step(4.5)
    scheduler.take_rates([0.02, 0.1])
    assert scheduler.get_last_lr() == [group["lr"] for group in scheduler.optimizer.param_groups]
    for epoch in (4.5, 7.0, 11.0):
        encoder, decoder = cosine(epoch, 3, 12)
        assert at(scheduler, epoch) == pytest.approx([2 * encoder, decoder])
    assert [group["initial_lr"] for group in scheduler.optimizer.param_groups] == [0.02, 0.1]
