"""A run between its steps: any optimiser, the metric that picks the best model, what a checkpoint brings back."""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from tiny_runs import ALONE, run_of, same, script, small
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam

import trainer
from models import CheckpointError, model_weights, read_checkpoint
from training.optim import ModelEma
from training.run import Run

KINDS = [AdamW, partial(Adam, fused=True), partial(SGD, momentum=0.9, dampening=0.5, fused=True), NAdam, Adagrad]


def step(run: Run) -> None:
    """Steps along a gradient that depends on the weights alone."""
    for weights in run.model.parameters():
        weights.grad = weights.detach().cos()
    run.optimizer.step()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_any_optimizer_goes_on_with_the_same_bits(kind):
    straight, resumed = run_of(nn.Conv2d(3, 4, 1)), run_of(nn.Conv2d(3, 4, 1))
    for run in (straight, resumed):
        run.optimizer = kind(run.model.parameters(), lr=0.01)
        step(run)
    resumed.restore(Path("last.pth"), copy.deepcopy(straight.checkpoint()))
    for run in (straight, resumed):
        step(run)
    for name in ("model", "optimizer"):
        assert same(getattr(resumed, name).state_dict(), getattr(straight, name).state_dict())


def test_fused_is_the_programs_choice_not_the_checkpoints():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))  # of the second one both layouts are the same memory
    before, after = run_of(model), run_of(copy.deepcopy(model).to(memory_format=torch.channels_last))
    before.optimizer = Adam(before.model.parameters(), 0.1)
    after.optimizer = Adam(after.model.parameters(), 0.1, fused=True, weight_decay=0.1)
    step(before)
    content = copy.deepcopy(before.checkpoint())
    for state in content["optimizer"]["state"].values():
        state["step"] = state["step"].double()
    after.restore(Path("last.pth"), content)
    # PyTorch makes float32 of the steps where it puts them beside the weights, on which a GPU's fused kernel insists.
    assert {state["step"].dtype for state in after.optimizer.state.values()} == {torch.float32}
    (group,) = after.optimizer.param_groups
    assert (group["fused"], group["weight_decay"], group["lr"]) == (True, 0.1, 0.1)
    for weights, before_it in zip(after.model.parameters(), before.model.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert after.optimizer.state[weights][name].stride() == weights.stride()
            assert torch.equal(after.optimizer.state[weights][name], before.optimizer.state[before_it][name])


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("metric", "values", "stars", "name"),
    [("iou", [0.9, 0.2, 0.3], [1], "IoU"), ("global_iou", [0.1, 0.2, 0.2], [1, 2], "global IoU")],
)
def test_the_best_metric_picks_the_model_the_star_and_the_last_line(
    metric, values, stars, name, coco_root, tmp_path, monkeypatch, capsys
):
    script(monkeypatch, [0.9, 0.8, 0.7])
    script(monkeypatch, values, metric)
    run, best, score = tmp_path / "run", stars[-1], max(values)
    trainer.main(small(coco_root, run, num_epochs=3, best_metric=metric, keep_checkpoints=0))
    saved = read_checkpoint(run / "best_model.pth")
    assert (saved["epoch"], saved["metrics"][metric]) == (best, score)
    assert same(saved["model"], model_weights(read_checkpoint(run / f"epoch_{best:04d}.pth")))
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split("/")[0]) for line in lines if line.endswith(" *")] == stars
    assert lines[-1] == f"the best epoch was {best} of 3: validation {name} {score:.3f}, in {run / 'best_model.pth'}"


def stopped() -> dict:
    """What two processes leave after two steps of an epoch, with photos 5 and 6 that could not be read."""
    run, states = run_of(nn.Conv2d(3, 4, 1)), []
    run.settings["batch_size"], run.step = 4, 2
    for rank in (0, 1):
        run.metrics.losses.sums += rank + 1
        states.append(copy.deepcopy(run.metrics.state_dict()) | {"skipped": 2, "unreadable": [rank + 5]})
    return run.checkpoint(states)


def restored(content: dict, rank: int = 0, world_size: int = 1) -> Run:
    run = run_of(nn.Conv2d(3, 4, 1))
    run.settings["batch_size"], run.ema = 4, ModelEma(run.model, 0.999)
    run.processes = dataclasses.replace(ALONE, rank=rank, world_size=world_size)
    run.restore(Path("last.pth"), content)
    return run


@pytest.mark.parametrize(
    ("rank", "world_size", "losses", "unreadable", "step"),
    [(1, 2, 3, [6], 2), (0, 1, 4, [5, 6], 4), (0, 3, 4, [5, 6], 1), (1, 3, 0, [], 1)],
)
def test_each_process_restores_its_own_metrics_or_rank_0_all(rank, world_size, losses, unreadable, step):
    run = restored(stopped(), rank, world_size)
    run.begin_epoch()
    assert run.metrics.losses.sums[0] == losses
    assert (run.unreadable, run.guard.skipped, run.step) == (unreadable, 2, step)
    assert torch.equal(run.eval_model.weight, run.model.weight)  # of an EMA that the checkpoint lacks


@pytest.mark.parametrize(
    ("change", "line"),
    [({"model": {"weight": torch.zeros(1)}}, "the checkpoint does not fit this program's model: .+"),
     ({"optimizer": {"state": {}}}, "the checkpoint does not fit this program's model: .+"),
     ({"optimizer_class": "AdamW"}, "last.pth was trained with AdamW and cannot go on with SGD: .+")],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(change, line):
    with pytest.raises(CheckpointError, match=f"^{line}$"):
        restored(stopped() | change)


@pytest.mark.parametrize(("fetch_every", "end"), [(1, 11), (4, 12), (100, 14)])
def test_skipped_steps_in_a_row_are_known_without_waiting_for_a_gpu_at_each(fetch_every, end):
    run, gpu = run_of(nn.Conv2d(3, 4, 1)), SimpleNamespace(type="cuda")  # which is waited for only where it must be
    run.steps_per_epoch, run.skipped_in_a_row = 14, 1
    run.begin_epoch()
    run.processes, most = dataclasses.replace(ALONE, device=gpu), []
    for number in range(1, 15):
        run.guard.begin_step()
        loss = torch.tensor(math.nan if 2 <= number <= 11 else 1.0)
        run.guard.should_step(run.optimizer, [loss], torch.tensor(1.0), run.scaler)
        run.count_step(fetch_every)
        most.append(run.most_skipped_in_a_row())
    assert most.index(10) + 1 == end
    run.end_epoch({"val_iou": 0.0}, has_best=False)
    assert run.skipped_in_a_row == 0  # the row has ended


@pytest.mark.usefixtures("tiny")
def test_a_users_own_logger_gets_steps_and_epochs(coco_root, tmp_path, monkeypatch):
    mine, build = Mock(), trainer.build_loggers
    monkeypatch.setattr(trainer, "build_loggers", lambda *args: [mine, *build(*args)])
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=2, batch_size=2, log_every=2))
    logged = [call.args for call in mine.log.mock_calls]
    assert [step for _, step in logged] == [2, 4, 5, 6, 8, 10, 10]
    names = {"step/loss", "step/colour", "step/bce", "step/dice", "step/contour", "step/learning_rate"}
    assert [values.keys() for values, _ in logged if "epoch" not in values] == [names] * 5
    rows = [values for values, _ in logged if "epoch" in values]
    assert rows == read_checkpoint(tmp_path / "run" / "last.pth")["history"]
    mine.close.assert_called_once()
