"""What each weight learns at, and the average of all weights over the steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

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


def keep_statistics(encoder: nn.Module) -> None:
    """Lets the BatchNorm of a trained encoder use its stored averages, which a small batch's own would only blur."""
    for layer in encoder.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()


class WeightAverage(AveragedModel):
    """The exponential moving average of a model's weights, and of BatchNorm's averages with them.

    It reaches back over a tenth of the steps so far, and over 1 / (1 - decay) steps at most: a short training has
    one as well (the ramp is that of Tarvainen and Valpola 2017 and of TensorFlow's ExponentialMovingAverage).

    Args:
        model: not wrapped for several processes; on each of them the same weights give the same average.
        decay: of the average, below 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, multi_avg_fn=self._mix, use_buffers=True)
        self.decay = decay
        self.requires_grad_(False)

    def _mix(self, averages: list[Tensor], values: list[Tensor], _number: Tensor) -> None:
        steps = int(self.n_averaged)  # on the CPU, where no GPU has to be waited for
        weight = 1 - min(self.decay, (1 + steps) / (10 + steps))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, weight)
        else:  # BatchNorm's counts of batches
            torch._foreach_copy_(averages, values)
