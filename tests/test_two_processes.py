"""Trainings on two processes, of which something happens to one: they stay together, step by step."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import write_split
from test_resume import break_first
from test_runs import TIMES, history, same
from test_trainer import Tiny, small

import trainer
from training import slurm
from training.checkpoints import claim
from utils import LossCalculator, UserError, read_checkpoint


def take_part(rank: int, environment: dict[str, str], folder: Path, settings, event: tuple) -> None:
    """A rank of the training; leaves what it ends with. `event` is (rank, batch, what happens there)."""
    torch.set_num_threads(1)
    os.environ.update({name: value.replace("{rank}", str(rank)) for name, value in environment.items()})
    runs, start_run = [], trainer.start_run
    trainer.UNetAutoencoder = Tiny
    trainer.LossCalculator = lambda *weights: Eventful(event[1:] if event and event[0] == rank else None, *weights)
    trainer.start_run = lambda *args: (runs.append(start_run(*args)), runs[0])[1]
    with open(folder / f"rank{rank}.log", "w") as log, contextlib.redirect_stdout(log):
        try:
            trainer.main(settings)
            code = 0
        except trainer.Stopped as stop:
            code = stop.code
        except BaseException as error:
            print("refused:", error)
            raise
        finally:
            assert not dist.is_initialized()
    (run,) = runs
    state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()["state"]}
    place = {"epoch": run.epochs_done, "step": run.step, "rates": run.scheduler.get_last_lr()}
    torch.save({"code": code, **place, **state}, folder / f"rank{rank}.pth")


class Eventful(LossCalculator):
    """The loss, and at one of its batches something else."""

    def __init__(self, event: tuple[int, str] | None, *weights: float):
        super().__init__(*weights)
        self.event, self.batches = event, 0

    def forward(self, raw, target):
        loss, terms = super().forward(raw, target)
        self.batches += 1
        what = self.event[1] if self.event and self.batches == self.event[0] else ""
        if what == "error":
            raise UserError("an error of its own")
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what in signal.Signals.__members__:
            os.kill(os.getpid(), signal.Signals[what])
        if what == "inf":
            loss = loss + math.inf  # its gradient is finite
        return (loss * math.nan if what == "nan" else loss), terms


def train(
    folder: Path, settings, event: tuple = (), codes: tuple[int, int] | None = (0, 0), place: dict | None = None
) -> list[dict]:
    """What each of the two ranks ends with; `codes` are those of the processes, if it is known whose is which."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the launcher's, as torchrun has it
    place = place or {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "{rank}", "LOCAL_RANK": "{rank}",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
    start = multiprocessing.get_context("forkserver")  # imports everything once, and computes nothing before it forks
    ranks = [start.Process(target=take_part, args=(rank, {**os.environ, **place}, folder, settings, event))
             for rank in (0, 1)]  # fmt: skip
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        rank.kill()
    found = tuple(rank.exitcode for rank in ranks)
    assert found == codes if codes else sorted(found) == [1, 2]
    return [torch.load(path) for path in sorted(folder.glob("rank*.pth"))]


@pytest.fixture(scope="module", autouse=True)
def preloaded():
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent)]))
        multiprocessing.set_forkserver_preload([__name__])
        yield


@pytest.fixture
def root(coco_root) -> Path:
    write_split(coco_root, "train2017", 12, first_id=1)  # with batches of two, three steps a process and epoch
    return coco_root


@pytest.mark.parametrize("what", ["nan", "inf"])
def test_a_broken_loss_on_one_rank_lets_both_skip_the_step(what, root, tmp_path):
    ranks = train(tmp_path, small(root, tmp_path / "run", batch_size=2, num_epochs=1), (1, 2, what))
    assert same(*ranks)
    assert {int(state["step"]) for state in ranks[0]["optimizer"].values()} == {2}
    assert all(value.isfinite().all() for value in ranks[0]["model"].values())
    assert history(tmp_path / "run")[0]["skipped_steps"] == "1"


def test_a_signal_to_one_rank_stops_both_at_the_same_step_and_nothing_is_lost(root, tmp_path):
    break_first(root, (0, 1, 7))  # each of the first two is the first photo of a process
    settings = {"batch_size": 2, "num_epochs": 2, "restart_period": 2, "max_bad_photos": 0.5, "resume": "newest"}
    straight = train(tmp_path, small(root, tmp_path / "straight", **settings))
    stopped = train(tmp_path, small(root, tmp_path / "run", **settings), (1, 1, "SIGTERM"))  # told to both a step later
    assert [(rank["code"], rank["epoch"], rank["step"]) for rank in stopped] == [(143, 0, 2)] * 2
    last = read_checkpoint(tmp_path / "run" / "last.pth")
    assert (last["epoch"], last["step"]) == (0, 2)
    assert all(tally["bad_photos"] for tally in last["tallies"])
    assert same(train(tmp_path, small(root, tmp_path / "run", **settings)), straight)
    rows, expected = ([{k: v for k, v in row.items() if k not in TIMES} for row in history(tmp_path / name)]
                      for name in ("run", "straight"))  # fmt: skip
    assert rows == expected
    assert [row["train_bad_photos"] for row in rows] == ["3", "3"]


@pytest.mark.parametrize("batch", [3, 4])  # of the epoch's last step, and of the last that both have in the validation
def test_a_signal_at_the_last_step_is_met_before_the_work_goes_on(batch, root, tmp_path):
    settings = small(root, tmp_path / "run", batch_size=2, num_epochs=1)
    stopped = train(tmp_path, settings, (1, batch, "SIGTERM"))
    assert [(rank["code"], rank["epoch"], rank["step"]) for rank in stopped] == [(143, 0, 3)] * 2
    assert read_checkpoint(tmp_path / "run" / "last.pth")["step"] == 3
    assert not (tmp_path / "run" / "history.csv").exists()


def said(folder: Path) -> list[str]:
    """What each rank has said last."""
    return [(folder / f"rank{rank}.log").read_text().splitlines()[-1:] for rank in (0, 1)]


@pytest.mark.parametrize(
    ("event", "codes", "told"),
    [((0, 2, "error"), (1, 2), ["an error of its own", "2"]), ((1, 2, "error"), (2, 1), ["2", "an error of its own"]),
     ((1, 4, "error"), (2, 1), ["2", "an error of its own"]),  # in the validation
     ((1, 2, "kill"), (1, -9), ["another process has ended without a word", None]),
     ((0, 2, "kill"), (-9, 1), [None, "another process has ended without a word"])],
)  # fmt: skip
def test_one_ranks_error_ends_both_and_is_said_once(event, codes, told, root, tmp_path):
    train(tmp_path, small(root, tmp_path / "run", batch_size=2, num_epochs=1), event, codes)
    for lines, text in zip(said(tmp_path), told, strict=True):
        assert text is None or lines[0].startswith(f"refused: {text}")


def test_data_that_only_the_first_process_looks_at_ends_both_and_is_said_once(tmp_path):
    train(tmp_path, small(tmp_path / "nowhere", tmp_path / "run", num_epochs=1), codes=(1, 2))
    (first,), second = said(tmp_path)
    assert first.startswith("refused: no COCO data")
    assert second == ["refused: 2"]


@pytest.mark.parametrize("device", ["toaster", "cuda:0"])
def test_a_device_that_all_are_refused_is_said_once(device, root, tmp_path):
    train(tmp_path, small(root, tmp_path / "run", device=device), codes=None)
    other, told = sorted((line for (line,) in said(tmp_path)), key=len)
    assert other == "refused: 2"
    assert device in told


def test_what_the_main_process_is_refused_ends_both_and_is_said_once(root, tmp_path):
    settings = small(root, tmp_path / "run", num_epochs=1)
    train(tmp_path, settings)
    with claim(tmp_path / "run"):
        train(tmp_path, settings, codes=(1, 2))
    (first,), second = said(tmp_path)
    assert first.startswith("refused: another run is writing")
    assert second == ["refused: 2"]  # its exit code, and nothing to read


def free_job() -> int:
    """The number of a SLURM job whose port is free."""
    for job in range(70_000, 71_000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", slurm.PORTS[job % len(slurm.PORTS)]))
            return job
    raise AssertionError


def test_the_tasks_of_srun_train_together_and_one_is_enough_to_stop_them(root, tmp_path):
    srun = {"SLURM_JOB_ID": str(free_job()), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2",
            "SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}"}  # fmt: skip
    settings = small(root, tmp_path / "run", batch_size=2, num_epochs=1, resume="newest")
    stopped = train(tmp_path, settings, (1, 1, "SIGUSR1"), place=srun)  # as by #SBATCH --signal=USR1@120
    assert [(rank["code"], rank["step"]) for rank in stopped] == [(128 + signal.SIGUSR1, 2)] * 2
    ranks = train(tmp_path, settings, place=srun)
    assert same(*ranks)
    assert {int(state["step"]) for state in ranks[0]["optimizer"].values()} == {3}
    assert "2 processes" in (tmp_path / "rank0.log").read_text()
    assert len(history(tmp_path / "run")) == 1
