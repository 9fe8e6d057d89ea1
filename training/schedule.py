"""The learning rate over a run: cosine cycles that end with it, and with what is added to it later."""

from __future__ import annotations

import math
from typing import Any

from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts


class Schedule(CosineAnnealingWarmRestarts):
    """Cosine cycles of T_0 epochs, T_0 * T_mult and so on; the last one may be made to end elsewhere: `end_with`.

    Attributes:
        begin, end: the epochs between which that one lies, infinite where all are as T_0 and T_mult say.
    """

    begin, end = math.inf, math.inf

    def get_lr(self) -> list[float]:
        """By group of parameters, at the present place."""
        if self.last_epoch < self.begin:
            return super().get_lr()
        passed = min((self.place - self.begin) / (self.end - self.begin), 1.0)
        return [rate * (1 + math.cos(math.pi * passed)) / 2 for rate in self.base_lrs]

    @property
    def place(self) -> float:
        """In epochs."""
        return self.last_epoch + self.T_cur % 1  # a cycle begins with a whole epoch

    def end_with(self, epochs: int, planned: int, done: int) -> None:
        """Makes the schedule of a run that was to have the `planned` epochs end after `epochs`.

        A run that is through goes on with a cycle of what is added: a restart does no harm where the rate has come
        down again by the end. In any other run the cycle that would have been its last becomes longer or shorter.

        Args:
            done: epochs of the run.
        """
        if done >= planned:
            self.begin = planned
        elif self.begin >= min(epochs, planned):
            self.begin = sum(cycles(self, min(epochs, planned))[:-1])
        self.end = epochs
        self.step(max(self.place, done))  # skipped steps may have held it back at the end of an epoch

    def take_rates(self, base_lrs: list[float]) -> None:
        """Goes on at the same place with other learning rates, one for each group of parameters."""
        self.base_lrs = base_lrs
        for group, rate in zip(self.optimizer.param_groups, base_lrs, strict=True):
            group["initial_lr"] = rate
        self.step(self.place)


def first_cycle(num_epochs: int, restart_period: int, restart_mult: int) -> int:
    """T_0: by default such that a second cycle ends with the run, or one cycle does where its epochs allow no two."""
    whole, rest = divmod(num_epochs, 1 + restart_mult)
    return restart_period or (num_epochs if rest else whole)


def cycles(scheduler: Any, num_epochs: int) -> list[int]:
    """The lengths in epochs of the cosine cycles by T_0 and T_mult, up to the one that the run ends in."""
    lengths = [scheduler.T_0]
    while sum(lengths) < num_epochs:
        lengths.append(lengths[-1] * scheduler.T_mult)
    return lengths
