"""What each weight learns at, and the average of all weights over the steps."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from models import UNetAutoencoder


def weight_groups(model: UNetAutoencoder, learning_rate: float, decoder_rate: float) -> list[dict]:
    """The groups of parameters for an optimiser: the encoder's, and with a rate of their own all others.

    Args:
        learning_rate: of the encoder.
        decoder_rate: times as fast as it everything else learns, which starts from random values: a rate that this
            needs spoils what the encoder was trained for. With 1 there is one group of all.
    """
    if decoder_rate == 1:
        return [{"params": [*model.parameters()], "lr": learning_rate}]
    pretrained = set(model.encoder.parameters())
    others = [parameter for parameter in model.parameters() if parameter not in pretrained]
    return [
        {"params": [*model.encoder.parameters()], "lr": learning_rate},
        {"params": others, "lr": decoder_rate * learning_rate},
    ]


def keep_statistics(trained: nn.Module) -> None:
    """Lets the BatchNorm of what is trained use its stored averages, which a small batch's own would only blur."""
    for layer in trained.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()


class WeightAverage:
    """The exponential moving average of a model's weights, and of BatchNorm's averages with them.

    It reaches back over a tenth of the steps so far, and over 1 / (1 - decay) steps at most: a short training has
    one as well (the ramp is that of TensorFlow's ExponentialMovingAverage). It never waits for a GPU.

    Args:
        model: not wrapped for several processes; on each of them the same weights give the same average.
        decay: of the average, below 1.

    Attributes:
        module: the model with the averaged weights.
        steps: that are in them.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module = deepcopy(model).requires_grad_(False)
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After a step of the model."""
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 1.0
        averages, values = ([*it.parameters(), *it.buffers()] for it in (self.module, model))
        real = [place for place, value in enumerate(values) if value.is_floating_point()]
        torch._foreach_lerp_([averages[it] for it in real], [values[it] for it in real], weight)
        for place in {*range(len(values))} - {*real}:  # BatchNorm's counts of batches
            averages[place].copy_(values[place])
        self.steps += 1

    def state_dict(self) -> dict:
        return {"model": self.module.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.module.load_state_dict(state["model"])
        self.steps = state["steps"]
