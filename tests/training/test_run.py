"""What a run takes up from a checkpoint, worked out by hand."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from test_trainer import ALONE, run_of
from torch import nn
from torch.optim import Adam

from training.checkpoints import RunFolder
from training.interruptions import BrokenNumbersError, Watch
from training.run import Run
from training.weights import WeightAverage
from utils import CheckpointError, LossCalculator, weights_of


def stopped_run(model: nn.Module) -> dict:
    """What two processes left after two steps of an epoch, with five and six photos that could not be read."""
    run = run_of(model)
    run.settings, run.step = {"batch_size": 4, "accumulate": 1}, 2
    run.begin_epoch()
    states = []
    for rank in (0, 1):
        run.tally.losses.sums += rank + 1
        states.append({**run.tally.state(), "skipped": 2, "bad_photos": [rank + 5]})
        states[-1]["losses"] = states[-1]["losses"].clone()
        states[-1]["metrics"] = states[-1]["metrics"].clone()
    return run.checkpoint(states) | {"world_size": 2}


def restored(content: dict, rank: int, world_size: int) -> Run:
    run = run_of(nn.Conv2d(3, 4, 1))
    run.settings = {"batch_size": 4, "accumulate": 1}
    run.processes = dataclasses.replace(ALONE, rank=rank, world_size=world_size)
    run.restore("last.pth", content)
    return run


@pytest.mark.parametrize(
    ("rank", "world_size", "losses", "bad_photos", "step"),
    [(0, 2, 1, [5], 2), (1, 2, 3, [6], 2), (0, 1, 4, [5, 6], 4), (0, 3, 4, [5, 6], 1), (1, 3, 0, [], 1)],
)
def test_each_process_takes_its_own_and_the_main_one_all_of_another_number(rank, world_size, losses, bad_photos, step):
    run = restored(stopped_run(nn.Conv2d(3, 4, 1)), rank, world_size)
    assert run.tally.losses.sums[0] == losses
    assert (run.bad_photos, run.skipped, run.step) == (bad_photos, 2, step)


def test_a_checkpoint_that_is_older_than_a_number_goes_on():
    content = stopped_run(nn.Conv2d(3, 4, 1))
    del content["broken_in_a_row"]
    for state in content["tallies"]:
        del state["bad_photos"]
    run = restored(content, 0, 2)
    assert (run.broken_in_a_row, run.bad_photos) == (0, [])


@pytest.mark.parametrize("weights", [{}, {"contour_weight": 3.0}])
def test_the_figures_of_an_older_checkpoint_are_those_of_its_terms(weights):
    """Before the terms were named there were these, and the images last."""
    content = stopped_run(nn.Conv2d(3, 4, 1))
    for state in content["tallies"]:
        del state["names"]
        state["losses"] = torch.tensor([8.0, 1.0, 3.0, 4.0, 2.0], dtype=torch.float64)
    run = run_of(nn.Conv2d(3, 4, 1))
    run.criterion, run.settings = LossCalculator(**weights), {"batch_size": 4, "accumulate": 1}
    run.processes = dataclasses.replace(ALONE, rank=0, world_size=2)
    run.restore("last.pth", content)
    found = run.tally.compute()
    expected = {"loss": 4.0, "colour_loss": 0.5, "bce_loss": 1.5, "dice_loss": 2.0}
    assert {name: found[name] for name in expected} == expected
    assert found.get("contour_loss", 0.0) == 0.0


def test_an_average_that_a_checkpoint_lacks_begins_with_its_weights():
    model, content = nn.Conv2d(3, 4, 1), stopped_run(nn.Conv2d(3, 4, 1))
    run = run_of(model)
    run.average, run.settings = WeightAverage(model, 0.999), {"batch_size": 4, "accumulate": 1}
    run.restore("last.pth", content)
    assert torch.equal(run.evaluated.weight, content["model"]["weight"])


def test_what_a_checkpoint_is_worth_is_its_average():
    model = nn.Conv2d(3, 4, 1)
    run = run_of(model)
    assert torch.equal(weights_of(run.checkpoint())["weight"], model.weight)
    run.average = WeightAverage(model, 0.999)
    nn.init.zeros_(model.weight)
    saved = run.checkpoint()
    assert torch.equal(weights_of(saved)["weight"], run.average.module.weight)
    assert not torch.equal(saved["model"]["weight"], weights_of(saved)["weight"])
    assert weights_of(run.result({})).keys() == weights_of(saved).keys()


def test_whether_the_encoder_keeps_its_statistics_is_as_it_was():
    content = stopped_run(nn.Conv2d(3, 4, 1))
    assert restored(content, 0, 2).keeps_statistics is False
    assert restored({**content, "keeps_statistics": True}, 0, 2).keeps_statistics is True


def one_step(run: Run, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for weights in run.model.parameters():
        weights.grad = torch.empty_like(weights).copy_(torch.randn(weights.shape, generator=random))
    run.optimizer.step()


def test_adams_moments_take_the_layout_of_the_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))  # of the second one both layouts are the same memory
    before, after = run_of(model), run_of(copy.deepcopy(model).to(memory_format=torch.channels_last))
    for run in (before, after):
        run.settings = {"batch_size": 4, "accumulate": 1}
        run.optimizer = Adam(run.model.parameters(), 0.1, fused=run is after)
    one_step(before, seed=0)
    after.restore("last.pth", copy.deepcopy(before.checkpoint()))
    for run in (before, after):
        one_step(run, seed=1)
    for one, other in zip(before.model.parameters(), after.model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-6)
        for name in ("exp_avg", "exp_avg_sq"):
            moments, expected = after.optimizer.state[other][name], before.optimizer.state[one][name]
            assert moments.stride() == other.stride()
            assert torch.allclose(moments, expected, rtol=1e-5)


def test_other_weights_do_not_fit():
    content = stopped_run(nn.Conv2d(3, 4, 1))
    content["model"]["weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="does not fit"):
        restored(content, 0, 1)


class Gpu:
    """A device that is waited for only where it must be; its tensors lie on the CPU."""

    type = "cuda"


@pytest.mark.parametrize("fetch_every", [1, 4, 100])
def test_ten_broken_steps_in_a_row_end_the_run_wherever_in_the_epoch_they_lie(fetch_every):
    run, steps = run_of(nn.Conv2d(3, 4, 1)), 14
    run.begin_epoch()
    run.processes = dataclasses.replace(ALONE, device=Gpu())
    watch, met = Watch(run, RunFolder("unused", 0), 0), None
    for step in range(steps):
        run.guard.begin_step()
        run.guard.add_loss(torch.tensor(math.nan if 1 <= step < 11 else 1.0))
        run.guard.step(run.optimizer, run.scaler, torch.tensor(1.0))
        run.end_step(0, steps, fetch_every)
        try:
            watch.between_steps()
        except BrokenNumbersError:
            met = met or step + 1
    assert met == {1: 11, 4: 12, 100: 14}[fetch_every]
    run.end_epoch({})
    assert run.broken_in_a_row == 0  # a row that has ended is not gone on with
