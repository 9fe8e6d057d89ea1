"""A run between its steps: any optimiser, the metric that picks the best model, what a checkpoint brings back."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from helpers import write_split
from tiny_runs import ALONE, TIMES, run_of, same, small
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop

import trainer
from models import CheckpointError, model_weights, read_checkpoint
from training.checkpoints import RunFolder, save, snapshot
from training.interruptions import BrokenNumbersError, Watch
from training.optim import ModelEma
from training.run import Run

# --- any optimiser ----------------------------------------------------------------------------------------

OPTIMIZERS = [(Adam, {}), (AdamW, {}), (SGD, {"momentum": 0.9, "dampening": 0.5}), (RMSprop, {}), (NAdam, {}),
              (Adagrad, {})]  # fmt: skip
HAVE_FUSED = (Adam, AdamW, SGD, Adagrad)  # on a CPU
ALL = [*OPTIMIZERS, *((kind, {**options, "fused": True}) for kind, options in OPTIMIZERS if kind in HAVE_FUSED)]
every_optimizer = pytest.mark.parametrize(
    ("kind", "options"), ALL, ids=[f"{kind.__name__}{' fused' if 'fused' in options else ''}" for kind, options in ALL]
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Five steps of two photos an epoch."""
    root = tmp_path_factory.mktemp("coco")
    write_split(root, "train2017", 10, first_id=1)
    write_split(root, "val2017", 2, first_id=101)
    return root


class Recorder:
    """Takes a Watch's place: keeps the model after each step, and saves a checkpoint after one of them."""

    def __init__(self, run: Run, path: Path, save_after: int):
        self.run, self.path, self.save_after = run, path, save_after
        self.states = [copy.deepcopy(run.model.state_dict())]

    def between_steps(self) -> None:
        self.states.append(copy.deepcopy(self.run.model.state_dict()))
        if self.run.step == self.save_after:
            save(snapshot(self.run.checkpoint(self.run.gather_partial_metrics())), self.path)

    def after_steps(self) -> None:
        pass


def train(monkeypatch, root: Path, path: Path, kind: type, options: dict, broken: int = -1, **resume):
    """Trains an epoch, of which the loss of a step may be NaN, or the rest of one; saves it after its third step."""
    config = small(root, path.parent, batch_size=2, learning_rate=0.01)
    monkeypatch.setattr(trainer, "build_optimizer", lambda model, _: kind(model.parameters(), 0.01, **options))
    loader, _ = trainer.open_data(config, ALONE)
    run = trainer.start_run(config, ALONE, **resume)
    run.steps_per_epoch, run.dataset, recorder = len(loader), loader.dataset, Recorder(run, path, 3)
    forward = run.criterion.forward

    def criterion(*pictures):
        loss, terms = forward(*pictures)
        return loss * (math.nan if len(recorder.states) == broken + 1 else 1), terms

    monkeypatch.setattr(run.criterion, "forward", criterion)
    return run, trainer.train_one_epoch(run, loader, 0, config, recorder), recorder.states


def changed(before: dict, after: dict) -> bool:
    """Returns whether a step has changed a model's state, but for the number of batches."""
    return not all(torch.equal(value, after[name]) for name, value in before.items() if "num_batches" not in name)


@pytest.mark.usefixtures("tiny")
@every_optimizer
@pytest.mark.parametrize("broken", [0, 1])
def test_a_broken_step_leaves_no_trace_and_a_resume_gives_the_same_bits(
    broken, kind, options, root, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "empty_like", lambda like, **kind: torch.full_like(like, math.nan, **kind))
    path = tmp_path / "last.pth"
    straight, metrics, states = train(monkeypatch, root, path, kind, options, broken)
    assert metrics["skipped_steps"] == 1
    assert [changed(*pair) for pair in itertools.pairwise(states)] == [step != broken for step in range(5)]
    assert all(value.isfinite().all() for value in straight.model.state_dict().values())
    if broken:
        checkpoint = path, read_checkpoint(path)
        resumed, after, states = train(monkeypatch, root, tmp_path / "b.pth", kind, options, checkpoint=checkpoint)
        assert len(states) == 1 + 2  # steps that were left
        for name in ("model", "optimizer", "ema"):
            assert same(getattr(resumed, name).state_dict(), getattr(straight, name).state_dict()), name
        assert {**after, **dict.fromkeys(TIMES)} == {**metrics, **dict.fromkeys(TIMES)}


def test_a_resume_with_another_optimizer_is_refused_in_one_line():
    run, content = run_of(nn.Conv2d(3, 4, 1)), run_of(nn.Conv2d(3, 4, 1)).checkpoint()
    run.optimizer = AdamW(run.model.parameters())
    with pytest.raises(CheckpointError, match=r"^last.pth was trained with SGD and cannot go on with AdamW: .+$"):
        run.restore(Path("last.pth"), content)


@pytest.mark.parametrize("fused", [True, False])
def test_fused_is_the_programs_choice_not_the_checkpoints(fused):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))  # of the second one both layouts are the same memory
    before, after = run_of(model), run_of(copy.deepcopy(model).to(memory_format=torch.channels_last))
    for run in (before, after):
        now = run is after
        run.optimizer = Adam(run.model.parameters(), 0.1, fused=now == fused, weight_decay=0.1 * now)
    for weights in before.model.parameters():
        weights.grad = torch.randn(weights.shape)
    before.optimizer.step()
    content = copy.deepcopy(before.checkpoint())
    for state in content["optimizer"]["state"].values():
        state["step"] = state["step"].double()
    after.restore(Path("last.pth"), content)
    # PyTorch makes float32 of the steps where it puts them beside the weights, on which a GPU's fused kernel insists.
    assert not fused or {state["step"].dtype for state in after.optimizer.state.values()} == {torch.float32}
    (group,) = after.optimizer.param_groups
    assert (group["fused"], group["weight_decay"], group["lr"]) == (fused, 0.1, 0.1)
    for weights, before_it in zip(after.model.parameters(), before.model.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert after.optimizer.state[weights][name].stride() == weights.stride()
            assert torch.equal(after.optimizer.state[weights][name], before.optimizer.state[before_it][name])


SCORES = {"iou": [0.9, 0.2, 0.3], "dice": [0.1, 0.2, 0.2], "global_iou": [0.1, 0.2, 0.3]}  # by epoch


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("metric", "best", "stars", "name"), [("iou", 1, [1], "IoU"), ("dice", 2, [1, 2], "Dice"),
                                          ("global_iou", 3, [1, 2, 3], "global IoU")]
)  # fmt: skip
def test_the_best_metric_picks_the_model_the_star_and_the_last_line(
    metric, best, stars, name, root, tmp_path, monkeypatch, capsys
):
    validate = trainer.validate

    def scripted(run: Run, *args: object) -> dict:
        return {**validate(run, *args), **{score: values[run.epochs_done] for score, values in SCORES.items()}}

    monkeypatch.setattr(trainer, "validate", scripted)
    trainer.main(small(root, tmp_path, num_epochs=3, best_metric=metric, batch_size=10, keep_checkpoints=0))
    saved = read_checkpoint(tmp_path / "best_model.pth")
    assert (saved["epoch"], saved["metrics"][metric]) == (best, SCORES[metric][best - 1])
    assert same(saved["model"], model_weights(read_checkpoint(tmp_path / f"epoch_{best:04d}.pth")))
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split("/")[0]) for line in lines if line.endswith(" *")] == stars
    score = SCORES[metric][best - 1]
    assert lines[-1] == (f"the best epoch was {best} of 3: validation {name} {score:.3f}, in "
                         f"{tmp_path / 'best_model.pth'}")  # fmt: skip


def test_an_epoch_is_the_best_also_where_there_is_no_best_model():
    run = run_of(nn.Conv2d(3, 4, 1))
    for score, has_best, best in ((0.5, False, 0.5), (0.5, True, None), (0.3, False, 0.3), (0.4, True, 0.4)):
        run.begin_epoch()
        assert run.end_epoch({"val_iou": score}, has_best) is (best is not None)
        assert run.best_row()["val_iou"] == (best or 0.5)


def stopped(model: nn.Module) -> dict:
    """What two processes leave after two steps of an epoch, with photos 5 and 6 that could not be read."""
    run = run_of(model)
    run.settings |= {"batch_size": 4}
    run.step, states = 2, []
    run.begin_epoch()
    for rank in (0, 1):
        run.metrics.losses.sums += rank + 1
        states.append(copy.deepcopy(run.metrics.state_dict()) | {"skipped": 2, "unreadable": [rank + 5]})
    return run.checkpoint(states) | {"world_size": 2}


def restored(content: dict, rank: int = 0, world_size: int = 1, ema: bool = False) -> Run:
    run = run_of(nn.Conv2d(3, 4, 1))
    run.settings |= {"batch_size": 4}
    run.processes = dataclasses.replace(ALONE, rank=rank, world_size=world_size)
    run.ema = ModelEma(run.model, 0.999) if ema else None
    run.restore(Path("last.pth"), content)
    return run


@pytest.mark.parametrize(
    ("rank", "world_size", "losses", "unreadable", "step"),
    [(0, 2, 1, [5], 2), (1, 2, 3, [6], 2), (0, 1, 4, [5, 6], 4), (0, 3, 4, [5, 6], 1), (1, 3, 0, [], 1)],
)
def test_each_process_restores_its_own_metrics_or_rank_0_all(rank, world_size, losses, unreadable, step):
    run = restored(stopped(nn.Conv2d(3, 4, 1)), rank, world_size)
    assert run.metrics.losses.sums[0] == losses
    assert (run.unreadable, run.skipped, run.step) == (unreadable, 2, step)


def test_an_ema_that_a_checkpoint_lacks_begins_with_its_weights():
    content = stopped(nn.Conv2d(3, 4, 1))
    assert torch.equal(restored(content, ema=True).eval_model.weight, content["model"]["weight"])


@pytest.mark.parametrize("change", [{"model": {"weight": torch.zeros(1)}}, {"optimizer": {"state": {}}}], ids=str)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(change):
    content = {**stopped(nn.Conv2d(3, 4, 1)), **change}
    with pytest.raises(CheckpointError, match=r"^the checkpoint does not fit this program's model: .+$"):
        restored(content)


@pytest.mark.parametrize("fetch_every", [1, 4, 100])
def test_ten_skipped_steps_in_a_row_end_the_run(fetch_every):
    run, steps, ended = run_of(nn.Conv2d(3, 4, 1)), 14, None
    run.begin_epoch()
    gpu = SimpleNamespace(type="cuda")  # which is waited for only where it must be
    run.steps_per_epoch, run.processes = steps, dataclasses.replace(ALONE, device=gpu)
    watch = Watch(run, RunFolder("unused", 0), 0)
    for step in range(steps):
        run.guard.begin_step()
        loss = torch.tensor(math.nan if 1 <= step < 11 else 1.0)
        run.guard.should_step(run.optimizer, [loss], torch.tensor(1.0), run.scaler)
        run.count_step(fetch_every)
        try:
            watch.between_steps()
        except BrokenNumbersError:
            ended = ended or step + 1
    assert ended == {1: 11, 4: 12, 100: 14}[fetch_every]
    run.end_epoch({"val_iou": 0.0}, has_best=False)
    assert run.skipped_in_a_row == 0  # the row has ended


@pytest.mark.usefixtures("tiny")
def test_a_users_own_logger_gets_steps_and_epochs(root, tmp_path, monkeypatch):
    mine, build = Mock(), trainer.build_loggers
    monkeypatch.setattr(trainer, "build_loggers", lambda *args: [mine, *build(*args)])
    trainer.main(small(root, tmp_path, num_epochs=2, batch_size=2, log_every=2))
    logged = [call.args for call in mine.log.mock_calls]
    assert [step for _, step in logged] == [2, 4, 5, 6, 8, 10, 10]
    names = {"step/loss", "step/colour", "step/bce", "step/dice", "step/contour", "step/learning_rate"}
    assert [values.keys() for values, _ in logged if "epoch" not in values] == [names] * 5
    rows = [values for values, _ in logged if "epoch" in values]
    assert rows == read_checkpoint(tmp_path / "last.pth")["history"]
    assert [row["epoch"] for row in rows] == [1, 2]
    mine.close.assert_called_once()
