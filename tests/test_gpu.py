"""What must hold on a CUDA GPU as on a CPU: tools/gpu_check.py runs this file on a GPU, or on the CPU to try it."""

from __future__ import annotations

import gc
import math
import os
import signal
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_runs import free_port
from torch import Tensor

if "GPU_TEST_DEVICE" not in os.environ and not torch.cuda.is_available():
    pytest.skip("no CUDA GPU is visible", allow_module_level=True)

import trainer
from cutting.cutter import load
from datasets import COCOPersonDataset
from loading.workers import SIGNALS
from tools import make_sample
from tools.gpu_check import Loop, computing_in, noise, precisions
from trainer import Config
from training import distributed
from training.batches import copy_paste
from training.checkpoints import BEST, LAST, newest_usable
from training.interruptions import BrokenNumbersError, Stopped
from training.run import Run
from utils import LossCalculator, Processes

pytestmark = pytest.mark.gpu
DEVICE = torch.device(os.environ.get("GPU_TEST_DEVICE", "cuda:0"))
ON_GPU, PRECISIONS = DEVICE.type == "cuda", precisions(DEVICE)
SHAPE = ("resnet18", 64, 16) if ON_GPU else ("mobilenet_v2", 32, 4)  # encoder, image size, batch size
needs_cuda = pytest.mark.skipif(not ON_GPU, reason="it needs CUDA")


@pytest.fixture
def photos(tmp_path) -> Path:
    return make_sample.draw_sample(tmp_path / "photos", *((96, 32) if ON_GPU else (12, 4)))


def settings(root: Path, folder: Path, **changes: object) -> Config:
    """Returns the settings of a short training."""
    encoder, size, batch_size = SHAPE
    short = {
        "data_root": str(root), "checkpoint_dir": str(folder), "pretrained": False, "encoder": encoder,
        "image_size": size, "batch_size": batch_size, "device": str(DEVICE), "num_epochs": 2, "restart_period": 10,
        "num_workers": 2 if ON_GPU else 0, "learning_rate": 2e-3, "ema_decay": 0.9, "log_every": 5,
    }  # fmt: skip
    return Config(**short | changes)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_steps_have_the_losses_of_a_cpu(precision):
    cpu = Loop(torch.device("cpu"), "float32", SHAPE, copy_paste=0.0).steps(3)
    assert Loop(DEVICE, precision, SHAPE, copy_paste=0.0).steps(3)["loss"] == pytest.approx(cpu["loss"], rel=0.02)


def test_copy_paste_is_that_of_a_cpu():
    batch = noise(64, 32)
    pasted = copy_paste(batch, 1.0)
    assert torch.equal(copy_paste(batch.to(DEVICE), 1.0).cpu(), pasted)
    chosen = [torch.equal(a, b) for a, b in zip(copy_paste(batch.to(DEVICE), 0.5).cpu(), pasted, strict=True)]
    assert 12 < sum(chosen) < 52


@needs_cuda
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_never_waits_for_the_gpu(precision):
    loop, counts = Loop(DEVICE, precision, SHAPE, log_every=10**6), []
    loop.steps(3)
    for number in (5, 15):  # what the longer epoch has more of is the steps'
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            loop.steps(number)
            torch.cuda.set_sync_debug_mode("default")
        waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA" in str(w.message)]
        counts.append(sorted(waits))
    assert counts[1] == counts[0]


class Breakable(LossCalculator):
    """The loss; not a number in the calls with these numbers, counted from 1."""

    calls, broken_calls = 0, range(0)

    def forward(self, raw: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = super().forward(raw, target)
        self.calls += 1
        return (loss * math.nan if self.calls in self.broken_calls else loss), terms


def weights_of(run: Run) -> Tensor:
    return torch.cat([value.detach().flatten() for value in run.model.parameters()])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_broken_step_is_skipped_and_counted_and_ten_in_a_row_end_the_run(precision):
    loop = Loop(DEVICE, precision, SHAPE, learning_rate=1e-3, log_every=5)
    loop.run.criterion = criterion = Breakable()
    loop.steps(30 if precision == "float16" else 2)  # float16 finds its scale first
    before = weights_of(loop.run)
    criterion.broken_calls = range(criterion.calls + 1, criterion.calls + 2)
    assert loop.steps(1)["skipped_steps"] == 1
    assert torch.equal(weights_of(loop.run), before)
    hook = next(loop.run.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    can_rescale = loop.run.scaler.get_scale() > 1  # float16 takes it for a scale that is too high
    assert loop.steps(1)["skipped_steps"] == (0 if can_rescale else 1)
    assert torch.equal(weights_of(loop.run), before)
    hook.remove()
    loop.steps(3)
    assert not torch.equal(weights_of(loop.run), before)
    assert all(value.isfinite().all() for value in loop.run.model.state_dict().values())
    criterion.broken_calls = range(criterion.calls + 1, criterion.calls + 16)
    with pytest.raises(BrokenNumbersError):
        loop.steps(15)


@needs_cuda
def test_a_batch_that_does_not_fit_is_split_into_micro_batches():
    loop = Loop(DEVICE, "float32", ("resnet34", 384, 32), copy_paste=0.0)
    whole, peak, before = loop.steps(2), torch.cuda.max_memory_allocated(), loop.run.micro_batches
    del loop
    gc.collect()
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(0.5 * peak / torch.cuda.get_device_properties(0).total_memory)
        loop = Loop(DEVICE, "float32", ("resnet34", 384, 32), copy_paste=0.0)
        split = loop.steps(2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert loop.run.micro_batches > before
    assert split["skipped_steps"] == 0
    assert split["loss"] == pytest.approx(whole["loss"], abs=0.2)  # BatchNorm sees fewer photos at a time


def test_short_trainings_are_as_good_as_on_a_cpu_and_their_files_need_no_gpu(photos, tmp_path):
    epochs = 8 if ON_GPU else 1
    trainer.main(settings(photos, tmp_path / "cpu", device="cpu", num_epochs=epochs))
    for precision in PRECISIONS:
        with computing_in(precision):
            trainer.main(settings(photos, tmp_path / precision, num_epochs=epochs))
    with patch.object(torch.cuda, "is_available", lambda: False):  # else tensors of a GPU would be loaded onto it
        files = {(name, file): torch.load(tmp_path / name / file, weights_only=True)
                 for name in ("cpu", *PRECISIONS) for file in (BEST, LAST)}  # fmt: skip
    scores = {name: content["metrics"]["iou"] for (name, file), content in files.items() if file == BEST}
    assert max(scores.values()) - min(scores.values()) < 0.1, scores


def test_predictions_are_those_of_a_cpu(photos):
    own, cpu = load("bundled", str(DEVICE), 128), load("bundled", "cpu", 128)
    dataset = COCOPersonDataset(photos, "val2017", 128)
    squares = [np.ascontiguousarray(dataset[n][:3].permute(1, 2, 0).numpy()) for n in range(len(dataset))]
    expected = np.concatenate([cpu.probabilities([square]) for square in squares])
    assert expected.max() > 0.5
    assert np.abs(own.probabilities(squares) - expected).mean() < 2e-3  # a CPU's float16 is 6e-4 apart


def test_a_run_that_sigterm_stops_goes_on_with_its_weights(photos, tmp_path, monkeypatch):
    seed_rng, handlers = trainer.seed_rng, {number: signal.getsignal(number) for number in SIGNALS}

    def interrupting(device: torch.device, seed: int, epoch: int, step: int, rank: int) -> None:
        if (epoch, step) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        seed_rng(device, seed, epoch, step, rank)

    monkeypatch.setattr(trainer, "seed_rng", interrupting)
    with pytest.raises(Stopped) as stop:
        trainer.main(settings(photos, tmp_path / "run"))
    for number, handler in handlers.items():  # it leaves its own for a process that is about to end
        signal.signal(number, handler)
    path, content = newest_usable(tmp_path / "run")
    assert (stop.value.code, content["epoch"], content["step"]) == (143, 1, 2)
    run = trainer.start_run(settings(photos, tmp_path / "run"), Processes(DEVICE), (path, content))
    assert (run.epochs_done, run.step) == (1, 2)
    weights, moments = run.model.state_dict(), run.optimizer.state_dict()["state"]
    assert all(torch.equal(weights[name].cpu(), value) for name, value in content["model"].items())
    for number, state in content["optimizer"]["state"].items():
        assert all(torch.equal(moments[number][name].cpu(), value) for name, value in state.items())
    trainer.main(settings(photos, tmp_path / "run", resume="newest"))
    assert len(newest_usable(tmp_path / "run")[1]["history"]) == 2


def test_two_ranks_skip_the_same_step_and_end_with_the_same_weights(photos, tmp_path):
    port = free_port()
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        results = [pool.submit(train_rank, rank, port, photos, tmp_path / "two") for rank in (0, 1)]
        (weights, skipped), (other, other_skipped) = (result.result() for result in results)
    assert all(np.array_equal(weights[name], other[name]) for name in weights)
    assert skipped == other_skipped
    assert sum(skipped) == 1


def train_rank(rank: int, port: int, photos: Path, folder: Path) -> tuple[dict[str, np.ndarray], list[float]]:
    """Trains as one of two ranks on one device, with a loss that is not a number once on rank 1.

    They talk over gloo: NCCL refuses two ranks on one GPU. Returns the weights and the skipped steps of each epoch.
    """
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in ranks.items()}, MASTER_ADDR="127.0.0.1")
    runs: list[Run] = []

    def init_process(_device: str, ranks: dict[str, int], store: dist.Store) -> Processes:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        return Processes(DEVICE, **ranks)

    distributed.init_process, trainer.LossCalculator = init_process, Breakable
    Breakable.broken_calls = range(2, 2 + rank)
    trainer.finish = lambda run, _folder: runs.append(run)
    trainer.main(settings(photos, folder, batch_size=min(SHAPE[2], 8), num_epochs=1))
    weights = {name: value.cpu().numpy() for name, value in runs[0].model.state_dict().items()}
    return weights, [row["skipped_steps"] for row in runs[0].history]
