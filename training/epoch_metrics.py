"""The metrics of an epoch so far: the loss and its terms, IoU and Dice, as sums that add up over processes."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from utils import LossCalculator, SegmentationMetrics, all_reduce_sum_, zero_sums


class LossMeter:
    """The means of the loss and its terms over images, added up on the device.

    The terms' names are known before the first batch: a process that gets no image takes part as well.
    """

    def __init__(self, terms: list[str], device: torch.device | str = "cpu"):
        self.names = ("loss", *terms)
        self.sums = zero_sums(len(self.names) + 1, device)  # the losses, then the images

    def update(self, loss: Tensor, terms: dict[str, Tensor], images: int) -> None:
        """Adds a batch's means, weighted by its number of images, unless one of them is not finite."""
        means = torch.stack([loss.detach(), *(terms[name] for name in self.names[1:]), torch.ones_like(loss)])
        usable = torch.isfinite(means).all()  # a step that is skipped must not spoil the epoch's mean
        self.sums += torch.where(usable, means.detach() * images, 0)

    def synchronize(self) -> None:
        all_reduce_sum_(self.sums)

    def compute(self) -> dict[str, float]:
        """Returns the means by name, 0 without any image."""
        *sums, images = self.sums.tolist()
        return {name: total / images if images else 0.0 for name, total in zip(self.names, sums, strict=True)}


class EpochMetrics:
    """The loss and its terms, and the segmentation metrics, of an epoch so far on this process."""

    def __init__(self, criterion: LossCalculator, device: torch.device | str = "cpu"):
        self.losses, self.scores = LossMeter([*criterion.weights], device), SegmentationMetrics(device)

    def update(self, loss: Tensor, terms: dict[str, Tensor], alpha: Tensor, mask: Tensor) -> None:
        """Counts a batch: its loss and terms as `LossCalculator` returns them, predicted and true mask (N, H, W)."""
        self.losses.update(loss, terms, len(mask))
        self.scores.update(alpha, mask)

    def compute(self) -> dict[str, float]:
        """Returns the metrics over all processes: "loss", "colour_loss" and so on, and the segmentation metrics."""
        total = deepcopy(self)  # this one stays this process's own
        total.losses.synchronize()
        total.scores.synchronize()
        losses = total.losses.compute()
        named = {name if name == "loss" else f"{name}_loss": value for name, value in losses.items()}
        return named | total.scores.compute()

    def reset(self) -> None:
        """Begins again, with the sums of no image."""
        self.losses.sums.zero_()
        self.scores.sums.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Returns this process's sums and the names of its losses."""
        return {"losses": self.losses.sums.cpu(), "names": [*self.losses.names], "scores": self.scores.sums.cpu()}

    def add(self, state: dict[str, Any]) -> None:
        """Adds the sums of a `state_dict`; a term of the loss that it lacks counts as 0."""
        *sums, images = state["losses"].to(self.losses.sums.device)
        by_name = dict(zip(state["names"], sums, strict=True))
        self.losses.sums += torch.stack([*(by_name.get(name, 0 * images) for name in self.losses.names), images])
        self.scores.sums += state["scores"].to(self.scores.sums.device)
