"""The metrics of an epoch so far: means over images, and sums that go on from what others have added up."""

from __future__ import annotations

import math

import pytest
import torch

from training.epoch_metrics import EpochMetrics, LossMeter
from utils import LossCalculator


def test_loss_is_a_mean_over_images_without_those_of_broken_steps():
    meter = LossMeter(("bce", "dice"))
    assert meter.compute() == {"loss": 0, "bce": 0, "dice": 0}
    for loss, images in ((2.0, 1), (math.nan, 5), (6.0, 3)):
        meter.update(torch.tensor(loss), {"bce": torch.tensor(loss + 1), "dice": torch.tensor(loss + 2)}, images)
    assert meter.compute() == {"loss": 5.0, "bce": 6.0, "dice": 7.0}


def metrics_of(criterion: LossCalculator, seed: int) -> EpochMetrics:
    """Returns those of three pictures of noise."""
    metrics, rng = EpochMetrics(criterion), torch.Generator().manual_seed(seed)
    raw, target = torch.randn(3, 4, 8, 8, generator=rng), torch.rand(3, 4, 8, 8, generator=rng)
    loss, terms = LossCalculator()(raw, target)
    metrics.update(loss, dict.fromkeys(criterion.weights, torch.tensor(2.0)) | terms, raw[:, 3] > 0, target[:, 3] > 0.5)
    return metrics


def test_metrics_go_on_from_others_state_which_may_lack_a_new_loss_term():
    newer = LossCalculator()
    newer.weights["edge"] = 0.5
    total = metrics_of(newer, 0)
    total.add(metrics_of(LossCalculator(), 1).state_dict())
    one, other = (metrics_of(LossCalculator(), seed).compute() for seed in (0, 1))
    assert total.compute()["images"] == 6
    assert total.compute()["edge_loss"] == 1.0  # 2 of three pictures, none of the others
    for name in ("loss", "colour_loss", "bce_loss", "dice_loss", "contour_loss", "iou", "dice"):
        assert total.compute()[name] == pytest.approx((one[name] + other[name]) / 2)
