"""What a run takes up from a checkpoint, worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_trainer import ALONE, run_of
from torch import nn

from training.run import Run
from utils import CheckpointError


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


def test_other_weights_do_not_fit():
    content = stopped_run(nn.Conv2d(3, 4, 1))
    content["model"]["weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="does not fit"):
        restored(content, 0, 1)
