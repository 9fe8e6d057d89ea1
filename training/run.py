"""The state of a run between two steps: what is trained, how far it has come, what a checkpoint holds of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from loading.unreadable import SkipUnreadable
from models import CheckpointError, UNetAutoencoder
from training.epoch_metrics import EpochMetrics
from training.loggers import Logger, Progress, log_all
from training.optim import FiniteGuard, ModelEma, Schedule, freeze_batchnorm
from utils import VERSION, LossCalculator, Processes, all_gather_list, reason

STATEFUL = ("model", "optimizer", "scaler")  # the EMA as well, if there is one
PLAIN = ("schedule_epoch", "learning_rate", "history", "skipped_in_a_row")
# Of a checkpoint that a run can resume from.
REQUIRED = {"epoch", "step", "partial_metrics", "config", "photos", "optimizer_class", *STATEFUL, *PLAIN}
# How an optimiser computes its step: this program's choice, not a checkpoint's.
OPTIMIZER_OPTIONS = ("fused", "foreach", "capturable", "differentiable")


@dataclass
class Run:
    """A training between two steps. `checkpoint` returns all that it resumes from, `restore` takes it back."""

    processes: Processes
    settings: dict  # by name; its checkpoints hold them
    model: UNetAutoencoder
    ddp_model: Callable[..., Tensor]  # the same, wrapped where several processes train it together, or compiled
    criterion: LossCalculator
    optimizer: Optimizer
    scheduler: Schedule
    scaler: GradScaler
    amp_dtype: torch.dtype | None = None
    ema: ModelEma | None = None
    micro_batches: int = 1  # that a batch is split into, where the GPU's memory does not hold all of it
    frozen_bn: bool = False  # whether the pretrained part's BatchNorm keeps its statistics
    loggers: list[Logger] = dataclasses.field(default_factory=list)  # on rank 0: where metrics go
    dataset: SkipUnreadable | None = None  # of the training; it knows the photos that could not be read
    data: dict[str, str] | None = None  # what there is to train on and to validate: `resuming.describe_data`
    source: Path | None = None  # the checkpoint that it resumed from
    steps_per_epoch: int = 0  # optimiser steps

    epochs_done: int = 0
    step: int = 0  # optimiser steps done of the current epoch
    metrics: EpochMetrics = dataclasses.field(init=False)  # of the current epoch so far
    guard: FiniteGuard = dataclasses.field(init=False)  # of the current epoch
    skipped: int = 0  # steps of the current epoch that were skipped before this start
    skipped_in_a_row: int = 0  # steps that were skipped since the last good one, before this epoch or start
    unreadable: list[int] = dataclasses.field(default_factory=list)  # photos, met in this epoch before this start
    schedule_epoch: float = 0.0  # the epoch with its fraction by which the learning rates are set
    learning_rate: float = 0.0  # the encoder's, of the last step
    history: list[dict] = dataclasses.field(default_factory=list)  # a row an epoch

    def __post_init__(self) -> None:
        self.metrics, self.guard = EpochMetrics(self.criterion, self.device), FiniteGuard(self.model, self.device)

    @property
    def device(self) -> torch.device:
        return self.processes.device

    @property
    def eval_model(self) -> UNetAutoencoder:
        """The model that is validated and saved: the EMA's, if there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def pretrained_module(self) -> nn.Module:
        """What started from trained weights: the whole model with `start_from`, else its encoder."""
        return self.model if self.settings.get("start_from") else self.model.encoder

    @property
    def best_metric(self) -> str:
        """The column of the history by which the best model is picked."""
        return f"val_{self.settings['best_metric']}"

    def best_row(self) -> dict:
        """Returns the history's row of the epoch that best_model.pth is of; an empty one before the first epoch."""
        return next((row for row in reversed(self.history) if row["best"]), {})

    def most_skipped_in_a_row(self) -> int:
        """Returns the longest streak of skipped steps, as far as it is known without waiting for a GPU."""
        return self.guard.most_in_a_row

    def begin_epoch(self) -> None:
        """Starts an epoch, or what is left of one."""
        self.model.train()
        if self.frozen_bn:
            freeze_batchnorm(self.pretrained_module)
        self.guard = FiniteGuard(self.model, self.device, self.skipped, self.skipped_in_a_row)
        if self.dataset is not None:
            self.dataset.continue_epoch(self.unreadable)

    @property
    def global_step(self) -> int:
        """Optimiser steps since the run's beginning."""
        return self.epochs_done * self.steps_per_epoch + self.step

    def count_step(self, fetch_every: int) -> float:
        """Counts a step and returns the epoch with its fraction, in which skipped steps do not count.

        A GPU is waited for every `fetch_every` steps, to learn what was skipped, and after the epoch's last.
        """
        self.step += 1
        if self.device.type == "cpu" or self.step % fetch_every == 0 or self.step == self.steps_per_epoch:
            self.guard.fetch()
        self.learning_rate = float(self.scheduler.get_last_lr()[0])
        self.schedule_epoch = self.epochs_done + (self.step - self.guard.skipped) / self.steps_per_epoch
        return self.schedule_epoch

    def log_step(self, progress: Progress, loss: Tensor, terms: dict[str, Tensor], every: int) -> None:
        """Logs the loss and its terms on rank 0 every `every` steps, for which it waits for the device."""
        if not self.processes.is_rank0 or self.global_step % every:
            return
        values = torch.stack([loss.detach(), *terms.values()]).tolist()
        named = {f"step/{name}": value for name, value in zip(("loss", *terms), values, strict=True)}
        named["step/learning_rate"] = self.learning_rate
        log_all([progress], named, self.global_step)
        log_all(self.loggers, named, self.global_step)  # of which one that fails is removed

    def training_metrics(self) -> dict[str, float]:
        """Returns the training metrics of an epoch whose steps are done, over all processes."""
        self.guard.fetch()
        ratio = float(self.scheduler.base_lrs[-1] / self.scheduler.base_lrs[0])  # 1 for a single group
        lrs = {"learning_rate": self.learning_rate, "decoder_learning_rate": self.learning_rate * ratio}
        return {**self.metrics.compute(), **lrs, "skipped_steps": self.guard.skipped}

    def end_epoch(self, row: dict, has_best: bool) -> bool:
        """Ends an epoch that is validated, with its row of the history. Returns whether it is the best so far.

        If there is no best_model.pth, as after going back, it is the best, whatever earlier epochs had.
        """
        best = self.best_row() if has_best else {}
        is_best = not best or row[self.best_metric] > best[self.best_metric]
        self.skipped_in_a_row = self.guard.skipped_in_a_row
        self.metrics.reset()
        self.epochs_done, self.step = self.epochs_done + 1, 0
        self.unreadable, self.skipped = [], 0
        self.history.append(row | {"best": int(is_best)})
        return is_best

    def _stateful(self) -> dict[str, Any]:
        objects = {name: getattr(self, name) for name in STATEFUL}
        return objects if self.ema is None else objects | {"ema": self.ema}

    def checkpoint(self, partial_metrics: list[dict] | None = None) -> dict:
        """Returns everything that a run resumes from; in mid-epoch with `gather_partial_metrics`' result."""
        return {
            "epoch": self.epochs_done, "step": self.step, "partial_metrics": partial_metrics or [],
            "version": VERSION, "config": self.settings, "data": self.data, "world_size": self.processes.world_size,
            "photos": len(self.dataset) if self.dataset is not None else 0,
            "optimizer_class": type(self.optimizer).__name__,
            **{name: it.state_dict() for name, it in self._stateful().items()},
            **{name: getattr(self, name) for name in PLAIN},
        }  # fmt: skip

    def best_model(self, metrics: dict[str, float]) -> dict:
        """Returns what best_model.pth holds: the validated model, its settings and its metrics."""
        model = self.eval_model.state_dict()
        return {"version": VERSION, "epoch": self.epochs_done, "config": self.settings, "model": model,
                "metrics": metrics}  # fmt: skip

    def gather_partial_metrics(self) -> list[dict]:
        """Returns all processes' metrics of the current epoch; an empty list between two epochs."""
        if not self.step:
            return []
        self.guard.fetch()
        self.skipped_in_a_row = self.guard.skipped_in_a_row
        unreadable = self.dataset.unreadable() if self.dataset is not None else []
        own = {**self.metrics.state_dict(), "skipped": self.guard.skipped, "unreadable": unreadable}
        return all_gather_list([own])

    def restore(self, source: Path, content: dict) -> None:
        """Restores a checkpoint's content; raises a CheckpointError if it does not fit the model or the optimiser."""
        self.source = source
        before, now = content["optimizer_class"], type(self.optimizer).__name__
        if before != now:
            raise CheckpointError(f"{source} was trained with {before} and cannot go on with {now}: restore "
                                  "build_optimizer, or begin a new run with --start-from")  # fmt: skip
        try:
            self._restore(content)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint does not fit this program's model: {reason(error)}") from None

    def _restore(self, content: dict) -> None:
        for group, own in zip(content["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
            group |= {name: own[name] for name in ("weight_decay", *OPTIMIZER_OPTIONS) if name in own}
        for name, stateful in self._stateful().items():
            if content.get(name):  # a scaler or an EMA that is new has no state there
                stateful.load_state_dict(content[name])
        if self.ema is not None and not content.get("ema"):
            self.ema.module.load_state_dict(content["model"])
        self._match_memory_format()
        for name in PLAIN:
            setattr(self, name, content[name])
        self.scheduler.step(self.schedule_epoch)  # by the learning rates and the number of epochs of this start
        self.epochs_done, partial = content["epoch"], content["partial_metrics"]
        photos_done = content["step"] * len(partial) * photos_per_step(content["config"])
        self.step = photos_done // (self.processes.world_size * photos_per_step(self.settings))
        if partial:
            self._restore_metrics(partial)

    def _match_memory_format(self) -> None:
        """Lays out the optimiser's moments like their weights: a fused Adam expects one format for both."""
        for weights, state in self.optimizer.state.items():
            for name, values in state.items():
                if isinstance(values, Tensor) and values.shape == weights.shape and values.stride() != weights.stride():
                    state[name] = torch.empty_like(weights).copy_(values)

    def _restore_metrics(self, partial: list[dict]) -> None:
        """Restores each process's own metrics, or all on rank 0 where the number of processes has changed."""
        world_size, rank = self.processes.world_size, self.processes.rank
        same, self.metrics = len(partial) == world_size, EpochMetrics(self.criterion, self.device)
        for state in partial[rank : rank + 1] if same else partial if self.processes.is_rank0 else []:
            self.metrics.add(state)
            self.unreadable = self.unreadable + state["unreadable"]
        self.skipped = partial[0]["skipped"]


def photos_per_step(settings: dict) -> int:
    """Returns the photos of an optimiser step of one process."""
    return settings["batch_size"] * settings["grad_accum_steps"]
