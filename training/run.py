"""What is trained and how far it has come: the state of a run, as it is saved and gone on with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Adam

from loading.unreadable import TolerantDataset
from training.board import Board
from training.schedule import Schedule
from training.step import FiniteGuard, Tally
from training.weights import WeightAverage, keep_statistics
from utils import CheckpointError, LossCalculator, Processes, from_all

STATEFUL = ("model", "optimizer", "scheduler", "scaler")
NUMBERS = ("learning_rate", "best_iou", "history", "broken_in_a_row", "keeps_statistics")
REQUIRED = {*STATEFUL, "config", "epoch", "step", "tallies", "photos", "learning_rate", "best_iou", "history"}


@dataclass
class Run:
    """A training between two steps. `checkpoint` is all that it goes on from, `restore` the way back."""

    processes: Processes
    settings: dict  # by name, the values that its checkpoints tell
    model: nn.Module
    parallel_model: nn.Module  # the same, wrapped where several processes share the work
    criterion: LossCalculator
    optimizer: Adam
    scheduler: Schedule
    scaler: GradScaler
    amp_dtype: torch.dtype | None
    parts: int = 1  # that a batch is computed in, one after another, where the GPU's memory does not hold all of it
    keeps_statistics: bool = False  # BatchNorm of what came trained uses what it was trained with
    average: WeightAverage | None = None  # of the weights over the steps
    board: Board = dataclasses.field(default_factory=Board)  # where TensorBoard's figures go, if anywhere
    dataset: TolerantDataset | None = None  # of the training, which knows the photos that could not be read
    data: dict[str, str] | None = None  # what there is to train on and to validate: `resuming.contents`
    source: Path | None = None  # the checkpoint that it goes on from

    epochs_done: int = 0
    step: int = 0  # of the epoch that has begun, so many are done
    tally: Tally | None = None  # and these are its figures so far
    guard: FiniteGuard | None = None
    bad_photos: list[int] = dataclasses.field(default_factory=list)  # that this epoch had met when it was stopped
    skipped: int = 0  # steps of it, when it was stopped
    broken_in_a_row: int = 0  # of the last steps, so many had no finite loss or gradient
    learning_rate: float = 0.0  # of the last step
    best_iou: float = -1.0
    history: list[dict] = dataclasses.field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.processes.device

    @property
    def evaluated(self) -> nn.Module:
        """The model that is measured and saved: that of the averaged weights, where they are averaged."""
        return self.model if self.average is None else self.average.module

    @property
    def came_trained(self) -> nn.Module:
        """All of the model where it started from another one's weights, else its encoder."""
        return self.model if self.settings.get("start_from") else self.model.encoder

    def broken(self) -> int:
        """The most steps in a row without a finite number, as far as that is known without waiting for a GPU."""
        return self.guard.most_in_a_row if self.guard else self.broken_in_a_row

    # --- an epoch ---

    def begin_epoch(self) -> None:
        """Or what is left of one."""
        self.model.train()
        if self.keeps_statistics:
            keep_statistics(self.came_trained)
        self.tally = self.tally or Tally(self.criterion, self.device)
        self.guard = FiniteGuard(self.model, self.device, self.skipped, self.broken_in_a_row)
        if self.dataset is not None:
            self.dataset.go_on(self.bad_photos)

    def end_step(self, epoch: int, steps: int, fetch_every: int) -> None:
        """Counts a step and moves the learning rate on, for which a step that was skipped does not count.

        Args:
            epoch: that it belongs to, from 0.
            steps: of the whole epoch.
            fetch_every: steps after which a GPU is waited for, to learn what was skipped, as after the epoch's last; a
                CPU tells at once.
        """
        self.step += 1
        if self.average is not None:
            self.average.update(self.model)
        if self.device.type == "cpu" or self.step % fetch_every == 0 or self.step == steps:
            self.guard.fetch()
        self.learning_rate = self.scheduler.get_last_lr()[0]
        self.scheduler.step(epoch + (self.step - self.guard.skipped) / steps)

    def end_training(self) -> dict[str, float]:
        """The figures of an epoch whose steps are done, over all processes."""
        self.guard.fetch()
        encoder, decoder = self.scheduler.base_lrs[0], self.scheduler.base_lrs[-1]  # one and the same for one group
        rates = {"learning_rate": self.learning_rate, "decoder_learning_rate": self.learning_rate * decoder / encoder}
        return {**self.tally.compute(), **rates, "skipped_steps": self.guard.skipped}

    def end_epoch(self, row: dict) -> None:
        """Once it is validated as well."""
        self.broken_in_a_row = self.guard.in_a_row
        self.epochs_done, self.step, self.tally, self.guard = self.epochs_done + 1, 0, None, None
        self.bad_photos, self.skipped = [], 0
        self.history.append(row)

    # --- what is saved ---

    def _parts(self) -> dict[str, Any]:
        """What has a state of its own."""
        parts = {name: getattr(self, name) for name in STATEFUL}
        return parts if self.average is None else parts | {"average": self.average}

    def checkpoint(self, tallies: list[dict] | None = None) -> dict:
        """Everything that a run goes on from; `tallies` are the `unfinished` of all processes."""
        place = {"epoch": self.epochs_done, "step": self.step, "tallies": tallies or []}
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        numbers = {name: getattr(self, name) for name in NUMBERS}
        photos = len(self.dataset) if self.dataset is not None else 0
        run = {"config": self.settings, "data": self.data, "photos": photos, "world_size": self.processes.world_size}
        return {**place, **run, **parts, **numbers}

    def result(self, metrics: dict[str, float]) -> dict:
        """What best_model.pth holds: enough to predict with, and what it is worth."""
        model = self.evaluated.state_dict()
        return {"epoch": self.epochs_done, "config": self.settings, "model": model, "metrics": metrics}

    def unfinished(self) -> list[dict]:
        """All processes' figures of an epoch that has begun; none between two epochs."""
        if self.tally is None:
            return []
        self.guard.fetch()
        self.broken_in_a_row = self.guard.in_a_row
        bad_photos = self.dataset.bad() if self.dataset is not None else []
        return from_all([{**self.tally.state(), "skipped": self.guard.skipped, "bad_photos": bad_photos}])

    def restore(self, source: Path, content: dict) -> None:
        """Takes over a checkpoint, the content of that file.

        Raises:
            CheckpointError: it does not fit this model.
        """
        self.source = source
        try:
            self._restore(content)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"the checkpoint does not fit this program's model: {reason}") from None

    def _restore(self, content: dict) -> None:
        rates, decays = self.scheduler.base_lrs, [group["weight_decay"] for group in self.optimizer.param_groups]
        for group, decay in zip(content["optimizer"]["param_groups"], decays, strict=True):
            group["fused"] = self.optimizer.defaults["fused"]  # how the step is computed is this program's business
            group["weight_decay"] = decay  # and this is a setting, as the rates are
        for name, part in self._parts().items():
            if content.get(name):  # a scaler or an average that there was not has no state, and starts anew
                part.load_state_dict(content[name])
        if self.average is not None and not content.get("average"):
            self.average.module.load_state_dict(content["model"])
        self._lay_out_moments()
        for name in NUMBERS:
            setattr(self, name, content.get(name, getattr(self, name)))  # an older one lacks the newer of them
        self.epochs_done, tallies = content["epoch"], content["tallies"]
        photos_done = content["step"] * len(tallies) * photos_a_step(content["config"])
        self.step = photos_done // (self.processes.world_size * photos_a_step(self.settings))
        if tallies:
            self._restore_figures(tallies)
        self._follow_settings(rates, content["config"])

    def _follow_settings(self, rates: list[float], before: dict) -> None:
        """Other learning rates than those of before, and another number of epochs, are gone on with."""
        if rates != self.scheduler.base_lrs:
            self.scheduler.take_rates(rates)
        planned, epochs = before.get("num_epochs"), self.settings.get("num_epochs")
        if epochs != planned and epochs > self.epochs_done and not self.settings["restart_period"]:
            self.scheduler.end_with(epochs, planned, self.epochs_done)

    def _lay_out_moments(self) -> None:
        """Like their weights: they come in the layout of the run that saved them; a fused Adam expects one for all."""
        for weights, moments in self.optimizer.state.items():
            for name, values in moments.items():
                if name != "step" and values.stride() != weights.stride():
                    moments[name] = torch.empty_like(weights).copy_(values)

    def _restore_figures(self, tallies: list[dict]) -> None:
        """Each process its own, or the main one all where their number changed."""
        world_size, rank = self.processes.world_size, self.processes.rank
        same, self.tally = len(tallies) == world_size, Tally(self.criterion, self.device)
        for state in tallies[rank : rank + 1] if same else tallies if self.processes.is_main else []:
            self.tally.add(state)
            self.bad_photos = self.bad_photos + state.get("bad_photos", [])  # an older checkpoint does not know them
        self.skipped = tallies[0]["skipped"]


def photos_a_step(settings: dict) -> int:
    """Of one process."""
    return settings["batch_size"] * settings["accumulate"]
