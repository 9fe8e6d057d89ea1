"""The metrics of an epoch so far: means over images, and sums that go on from what others have added up."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from training import epoch_metrics
from training.epoch_metrics import EpochMetrics, LossMeter
from utils import LossCalculator

TERMS = ("colour", "bce", "dice")


def losses(loss: float, device: str = "cpu") -> tuple[Tensor, dict[str, Tensor]]:
    return torch.tensor(loss), {name: torch.tensor(loss + n) for n, name in enumerate(TERMS, 1)}


def test_loss_is_a_mean_over_images_without_those_of_broken_steps():
    meter = LossMeter(TERMS)
    assert meter.compute() == {"loss": 0, "colour": 0, "bce": 0, "dice": 0}
    meter.update(*losses(2.0), images=1)
    meter.update(*losses(math.nan), images=5)
    meter.update(*losses(6.0), images=3)
    assert meter.compute() == {"loss": 5.0, "colour": 6.0, "bce": 7.0, "dice": 8.0}


def test_update_does_not_wait_for_the_device():
    with torch.device("meta"):  # where nothing has a value: to ask for one, as `.item()` or an `if` does, raises
        LossMeter(TERMS, "meta").update(*losses(1.0), images=2)


def metrics_of(seed: int) -> EpochMetrics:
    """Of three pictures of noise."""
    metrics, rng = EpochMetrics(LossCalculator()), torch.Generator().manual_seed(seed)
    raw, target = torch.randn(3, 4, 8, 8, generator=rng), torch.rand(3, 4, 8, 8, generator=rng)
    metrics.update(*LossCalculator()(raw, target), raw[:, 3] > 0, target[:, 3] > 0.5)
    return metrics


def test_metrics_go_on_from_the_state_of_others():
    both = EpochMetrics(LossCalculator())
    for seed in (0, 1):
        both.add(metrics_of(seed).state_dict())
    total, one, other = both.compute(), metrics_of(0).compute(), metrics_of(1).compute()
    assert total["images"] == 6
    for name in ("loss", "colour_loss", "bce_loss", "dice_loss", "contour_loss", "iou", "dice"):
        assert total[name] == pytest.approx((one[name] + other[name]) / 2)


def test_compute_adds_up_over_processes_and_leaves_the_own_sums(monkeypatch):
    monkeypatch.setattr(epoch_metrics, "all_reduce_sum_", lambda sums: sums.mul_(3))  # three that are alike
    monkeypatch.setattr("utils.all_reduce_sum_", lambda sums: sums.mul_(3))
    metrics = metrics_of(0)
    before = metrics.state_dict()
    before = {name: before[name].clone() for name in ("losses", "scores")}
    assert metrics.compute()["images"] == metrics.compute()["images"] == 9
    assert all(torch.equal(metrics.state_dict()[name], value) for name, value in before.items())


def test_a_new_loss_term_may_be_missing_before():
    criterion = LossCalculator()
    criterion.weights["edge"] = 0.5
    metrics = EpochMetrics(criterion)
    terms = dict.fromkeys(criterion.weights, torch.tensor(2.0))
    metrics.update(torch.tensor(3.0), terms, torch.zeros(3, 8, 8), torch.zeros(3, 8, 8))
    metrics.add(metrics_of(0).state_dict())
    assert metrics.compute()["edge_loss"] == 1.0
    assert metrics.compute()["images"] == 6
