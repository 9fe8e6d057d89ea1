"""What each weight learns at, and the average of the weights, against values worked out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import Adam

from models import UNetAutoencoder
from training.weights import WeightAverage, weight_groups


def test_the_encoder_has_the_rate_and_all_others_so_many_times_it():
    model = UNetAutoencoder("resnet18", pretrained=False)
    encoder, others = weight_groups(model, 1e-4, 30.0)
    assert (encoder["lr"], others["lr"]) == (1e-4, pytest.approx(3e-3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].split(".")[0] for p in encoder["params"]} == {"encoder"}
    assert {names[id(p)].split(".")[0] for p in others["params"]} == {"decoder"}
    assert len(encoder["params"]) + len(others["params"]) == len(names)


def test_one_rate_for_all_is_one_group_in_the_models_order():
    model = UNetAutoencoder("resnet18", pretrained=False)
    (group,) = weight_groups(model, 1e-4, 1.0)
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]


@pytest.mark.parametrize("decay", [0.999, 0.3])
def test_the_average_follows_the_ramp_and_then_the_decay(decay):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    average = WeightAverage(model, decay)
    by_hand = None
    for step, (weight, mean) in enumerate([(1.0, 4.0), (3.0, -2.0), (2.0, 0.5), (7.0, 1.0)]):
        nn.init.constant_(model[0].weight, weight)
        model[1].running_mean.fill_(mean)
        model[1].num_batches_tracked.fill_(step)
        average.update(model)
        share = 1 - min(decay, (1 + step) / (10 + step))
        found = torch.tensor([weight, mean])
        by_hand = found if by_hand is None else by_hand + share * (found - by_hand)
    assert average.module[0].weight.item() == pytest.approx(by_hand[0].item(), rel=1e-6)
    assert average.module[1].running_mean.item() == pytest.approx(by_hand[1].item(), rel=1e-6)
    assert average.module[1].num_batches_tracked == 3


def test_the_average_goes_on_where_its_state_was_saved():
    model = nn.Linear(2, 2)
    straight, saved = WeightAverage(model, 0.9), WeightAverage(model, 0.9)
    optimizer = Adam(model.parameters(), 0.1)
    for step in range(6):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        straight.update(model)
        saved.update(model)
        if step == 2:
            state = copy.deepcopy(saved.state_dict())
            saved = WeightAverage(nn.Linear(2, 2), 0.9)
            saved.load_state_dict(state)
    assert torch.equal(straight.module.weight, saved.module.weight)


def test_the_average_asks_for_no_gradient_and_leaves_the_model_its_own():
    model = nn.Linear(1, 1)
    average = WeightAverage(model, 0.9)
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
