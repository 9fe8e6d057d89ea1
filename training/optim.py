"""What happens to the weights: learning rates, their schedule, the guard against broken steps, the EMA."""

from __future__ import annotations

import math
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from models import UNetAutoencoder
from utils import all_reduce_max_, counted


def build_param_groups(model: UNetAutoencoder, learning_rate: float, decoder_lr_mult: float) -> list[dict]:
    """Returns an optimiser's parameter groups: the encoder's, and all others' with a multiple of its learning rate.

    These start from random values: the learning rate that they need would spoil what the encoder was trained for.
    With a multiplier of 1 there is a single group.
    """
    if decoder_lr_mult == 1:
        return [{"params": [*model.parameters()], "lr": learning_rate}]
    encoder = dict.fromkeys(model.encoder.parameters())
    others = [parameter for parameter in model.parameters() if parameter not in encoder]
    return [{"params": [*encoder], "lr": learning_rate}, {"params": others, "lr": decoder_lr_mult * learning_rate}]


def freeze_batchnorm(module: nn.Module) -> None:
    """Makes a pretrained module's BatchNorm use its running statistics; those of a small batch would be too noisy."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()


class Schedule(CosineAnnealingWarmRestarts):
    """Cosine annealing with warm restarts (Loshchilov and Hutter 2017, "SGDR"), as a function of the epoch.

    `lr_factor` is the whole schedule: another one is another body of that function.
    """

    def lr_factor(self, epoch: float) -> float:
        """Returns what the base learning rates are multiplied by, at an epoch with its fraction, counted from 0."""
        start, length = 0, self.T_0
        while epoch >= start + length:
            start, length = start + length, length * self.T_mult
        return (1 + math.cos(math.pi * (epoch - start) / length)) / 2

    def get_lr(self) -> list:  # of floats
        """Returns the present learning rate of each parameter group; called by `step`."""
        factor = self.lr_factor(self.last_epoch + self.T_cur % 1)  # a cycle starts with a whole epoch
        return [lr * factor for lr in self.base_lrs]


def first_cycle(num_epochs: int, restart_period: int, restart_mult: int) -> int:
    """Returns T_0; for a period of 0 one that makes a second cycle end with the run, or a single cycle if none can."""
    first, rest = divmod(num_epochs, 1 + restart_mult)
    return restart_period or (num_epochs if rest else first)


def describe_schedule(schedule: Schedule, num_epochs: int) -> str:
    """Returns the base learning rates and the cycles of a run for its banner, with a warning if it ends within one."""
    encoder, *decoder = (f"{lr:.2g}" for lr in schedule.base_lrs)
    lrs = f"{encoder} for the encoder, {decoder[0]} for the decoder" if decoder else encoder
    lengths = [schedule.T_0]
    while sum(lengths) < num_epochs:
        lengths.append(lengths[-1] * schedule.T_mult)
    first = [*map(str, lengths[:3]), "..."] if len(lengths) > 4 else [*map(str, lengths[:-1])]
    text = f"{lrs}, in cosine cycles of {', '.join(first)}{' and ' * bool(first)}{counted(lengths[-1], 'epoch')}"
    return text if sum(lengths) == num_epochs else f"{text}, the last of which is cut off after {num_epochs}"


class FiniteGuard:
    """Skips an optimiser's step whose loss or gradient is not finite, on all processes alike.

    BatchNorm's running statistics are restored as well. float16's own skips, by which the scaler finds its scale, are
    no broken steps: there only the losses count, for as long as the scale can still be lowered.

    The counts, as of the last `fetch`, are of the epoch's skipped steps, of those since the last good step, and of the
    longest row of them.
    """

    def __init__(self, model: nn.Module, device: torch.device, skipped: int = 0, skipped_in_a_row: int = 0):
        self.skipped, self.skipped_in_a_row, self.most_in_a_row = skipped, skipped_in_a_row, skipped_in_a_row
        self._counts = torch.tensor([skipped, skipped_in_a_row, skipped_in_a_row], device=device)
        self._statistics = [b for name, b in model.named_buffers() if name.rpartition(".")[2].startswith("running_")]
        # Concatenated: one kernel launch for all of them.
        self._before = torch.cat(self._statistics) if self._statistics else torch.empty(0)
        self._after = self._before.clone()
        self._lengths = [len(statistic) for statistic in self._statistics]

    def begin_step(self) -> None:
        """Remembers BatchNorm's statistics, before the forward pass."""
        if self._statistics:
            torch.cat(self._statistics, out=self._before)

    def should_step(
        self, optimizer: Optimizer, losses: list[Tensor], norm: Tensor, scaler: torch.amp.GradScaler
    ) -> bool:
        """Checks a step on all processes, undoes and counts it if it is broken; returns whether to call optimizer.step.

        It is broken if a micro-batch's loss or the gradient's norm is not finite. A fused optimiser is told on the
        device and skips the step by itself: for it the answer is True, without waiting for the device as for others.
        """
        can_rescale = scaler.scale(torch.ones_like(norm)) > 1  # 1 without a scaler
        finite = torch.isfinite(torch.stack(losses)).all() & (torch.isfinite(norm) | can_rescale)
        broken = (~finite).float()
        all_reduce_max_(broken)  # each process has losses of its own
        skip = torch.maximum(broken, (~torch.isfinite(norm)).float())
        broken = broken.bool()
        if self._statistics:
            torch.where(broken, self._before, torch.cat(self._statistics), out=self._after)
            torch._foreach_copy_(self._statistics, self._after.split(self._lengths))
        self._counts[:2] += broken
        self._counts[1] *= broken
        self._counts[2] = self._counts[1:].max()
        # A first step of SGD that is skipped on the device would leave its momentum uninitialised.
        is_ready = optimizer.state or not optimizer.defaults.get("momentum")
        if getattr(optimizer, "_step_supports_amp_scaling", False) and is_ready:
            vars(optimizer).update(grad_scale=None, found_inf=skip)
            return True
        return not skip.item()

    def fetch(self) -> None:
        """Updates the counts; waits for the device."""
        self.skipped, self.skipped_in_a_row, self.most_in_a_row = self._counts.tolist()


class ModelEma:
    """The exponential moving average (EMA) of a model's weights, and of BatchNorm's running statistics with them.

    It reaches back over a tenth of the steps so far, and over 1 / (1 - decay) steps at most: a short training has
    one as well (the warm-up of TensorFlow's ExponentialMovingAverage). It never waits for a GPU.
    """

    def __init__(self, model: UNetAutoencoder, decay: float):
        self.module = deepcopy(model).requires_grad_(False)
        self.decay, self.steps = decay, 0  # updates so far

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the model's weights after a step."""
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 1.0
        averages, values = ([*it.parameters(), *it.buffers()] for it in (self.module, model))
        pairs = [*zip(averages, values, strict=True)]
        floats = [pair for pair in pairs if pair[1].is_floating_point()]
        torch._foreach_lerp_([average for average, _ in floats], [value for _, value in floats], weight)
        for average, value in pairs:
            if not value.is_floating_point():  # BatchNorm's number of batches
                average.copy_(value)
        self.steps += 1

    def state_dict(self) -> dict:
        return {"model": self.module.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.module.load_state_dict(state["model"])
        self.steps = state["steps"]
