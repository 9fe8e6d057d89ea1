"""The metrics of an epoch so far: means over images, and sums that go on from what others have added up."""

from __future__ import annotations

import math

import torch

from training.epoch_metrics import EpochMetrics, LossMeter
from utils import LossCalculator


def test_loss_is_a_mean_over_images_without_those_of_broken_steps():
    meter = LossMeter(("bce", "dice"))
    assert meter.compute() == {"loss": 0, "bce": 0, "dice": 0}
    for loss, images in ((2.0, 1), (math.nan, 5), (6.0, 3)):
        meter.update(torch.tensor(loss), {"bce": torch.tensor(loss + 1), "dice": torch.tensor(loss + 2)}, images)
    assert meter.compute() == {"loss": 5.0, "bce": 6.0, "dice": 7.0}


def test_metrics_go_on_from_others_state_which_may_lack_a_new_loss_term():
    newer, mask = LossCalculator(), torch.ones(3, 8, 8, dtype=torch.bool)
    newer.weights = {"edge": 0.5, **newer.weights}
    total, others = EpochMetrics(newer), EpochMetrics(LossCalculator())
    for metrics, loss, alpha in ((total, 2.0, mask), (others, 4.0, ~mask)):
        terms = {name: torch.tensor(loss + len(name)) for name in metrics.losses.names[1:]}
        metrics.update(torch.tensor(loss), terms, alpha, mask)
    total.add(others.state_dict())
    losses = {"loss": 3, "colour_loss": 9, "bce_loss": 6, "dice_loss": 7, "contour_loss": 10, "edge_loss": 3}
    assert {**losses, "images": 6, "iou": 0.5, "dice": 0.5}.items() <= total.compute().items()
