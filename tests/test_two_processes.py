"""Trainings on two processes, of which something happens to one: they stay together, step by step."""

from __future__ import annotations

import contextlib
import math
import multiprocessing.forkserver
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import write_split
from tiny_runs import HANG, Tiny, assert_same_run, history, make_tiny, run_of, same, small, unwatched

import loading.augmentation  # noqa: F401 - takes a second, which each rank would wait
import trainer
from models import model_weights, read_checkpoint
from training.checkpoints import claim
from training.interruptions import Stopped
from utils import LossCalculator, UserError


class Eventful(LossCalculator):
    """The loss; at one of its batches something else happens: `event` is (batch, what) or None."""

    def __init__(self, event: tuple[int, str] | None, **weights: float):
        super().__init__(**weights)
        self.event, self.batches = event, 0

    def forward(self, raw, target):
        loss, terms = super().forward(raw, target)
        self.batches += 1
        what = self.event[1] if self.event and self.batches == self.event[0] else ""
        if what == "error":
            raise UserError("an error of its own")
        if what in signal.Signals.__members__:
            os.kill(os.getpid(), signal.Signals[what])
        if what == "inf":
            loss = loss + math.inf  # its gradient is finite
        return loss, terms


def take_part(
    rank: int, environment: dict[str, str], folder: Path, config: trainer.Config, explicit: list[str], event: tuple
) -> None:
    """Trains as one of the ranks, and saves what it ends with."""
    torch.set_num_threads(1)
    os.environ.update({name: value.replace("{rank}", str(rank)) for name, value in environment.items()})
    make_tiny()
    runs, start_run, photos, getitem = [], trainer.start_run, [], trainer.COCOPersonDataset.__getitem__
    trainer.start_run = lambda *args: (runs.append(start_run(*args)), runs[0])[1]
    trainer.LossCalculator = lambda **weights: Eventful(event[1:] if event and event[0] == rank else None, **weights)
    trainer.COCOPersonDataset.__getitem__ = lambda data, index: (
        photos.extend([index] if data._augment else []), getitem(data, index))[1]  # fmt: skip
    trainer.pictures.save_samples = lambda *_: None  # it reads training photos as well
    code = 0
    with open(folder / f"rank{rank}.log", "w") as log, contextlib.redirect_stdout(log):
        try:
            trainer.main(config, explicit)
        except Stopped as stop:
            code = stop.code
        except BaseException as error:
            print("refused:", error)
            raise
        finally:
            assert not dist.is_initialized()
        print("photos", *photos)
    (run,) = runs
    state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()["state"]}
    position = {"code": code, "epoch": run.epochs_done, "step": run.step, "lrs": run.scheduler.get_last_lr()}
    torch.save({**position, **state, "image_size": run.settings["image_size"]}, folder / f"rank{rank}.pth")


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    """Lets the server whose children the ranks are import everything once."""
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent)]))
        multiprocessing.set_forkserver_preload([__name__])
        yield
    multiprocessing.forkserver._forkserver._stop()


@pytest.fixture
def root(coco_root) -> Path:
    write_split(coco_root, "train2017", 12, first_id=1)  # with batches of two, three steps a process and epoch
    return coco_root


@pytest.fixture
def train(root, tmp_path):
    """Trains on a process for each of the exit codes and returns what each rank ends with; kills them with the test.

    `event` is (rank, batch, what happens there); of an exit code None another rank may have had it. `environment` is
    the launcher's, by default torchrun's.
    """
    started = []

    def train(event: tuple = (), codes: tuple = (0, 0), environment: dict | None = None, **settings) -> list[dict]:
        explicit = settings.pop("explicit", trainer.FIELDS)
        config = small(settings.pop("data", root), tmp_path / settings.pop("folder", "run"),
                       **{"batch_size": 2, "num_epochs": 1, **settings})  # fmt: skip
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        number, torchrun = str(len(codes)), {"RANK": "{rank}", "LOCAL_RANK": "{rank}", "MASTER_ADDR": "127.0.0.1"}
        torchrun |= {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_PORT": str(store.port),
                     "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
        environment = {**os.environ, **(environment or torchrun)}
        context = multiprocessing.get_context("forkserver")  # imports everything, and computes nothing before it forks
        arguments = environment, tmp_path, config, explicit, event
        ranks = [context.Process(target=take_part, args=(rank, *arguments), daemon=True) for rank in range(len(codes))]
        started.extend(ranks)
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(HANG)
        exits = [rank.exitcode for rank in ranks]
        assert sorted(exits) == [1, 2] if None in codes else exits == [*codes], exits
        return [torch.load(path) for path in sorted(tmp_path.glob("rank*.pth"))]

    yield train
    for rank in started:
        rank.kill()
        rank.join()


def last_lines(folder: Path) -> list[str]:
    """Returns what each rank has printed last."""
    logs = [path.read_text() for path in sorted(folder.glob("rank*.log"))]
    return [log.splitlines()[-1] if log else "" for log in logs]


def photos(line: str) -> list[int]:
    """Returns the indices of the photos that a rank has trained on, from its last line."""
    return [*map(int, line.split()[1:])]


def test_two_processes_measure_what_one_does(train, root, tmp_path):
    ranks = train()
    assert same(*ranks)
    best, model = read_checkpoint(tmp_path / "run" / "best_model.pth"), Tiny()
    assert same(best["model"], model_weights(read_checkpoint(tmp_path / "run" / "last.pth")))
    assert (tmp_path / "rank0.log").read_text().count("1/1 |") == 1
    assert "1/1 |" not in (tmp_path / "rank1.log").read_text()
    model.load_state_dict(best["model"])  # no module. before its keys
    loader = trainer.make_loader(trainer.COCOPersonDataset(root, "val2017", 32), 2, 0, training=False)
    metrics = trainer.validate(run := run_of(model), loader, unwatched(run))
    assert metrics["images"] == 5
    assert best["metrics"] == pytest.approx(metrics, abs=1e-6)
    assert float(history(tmp_path / "run")[0]["val_loss"]) == pytest.approx(metrics["loss"], rel=1e-5)


def test_a_broken_loss_on_one_rank_lets_both_skip_the_step(train, tmp_path):
    ranks = train((1, 2, "inf"))
    assert same(*ranks)
    assert {int(state["step"]) for state in ranks[0]["optimizer"].values()} == {2}
    assert all(value.isfinite().all() for value in ranks[0]["model"].values())
    assert history(tmp_path / "run")[0]["skipped_steps"] == "1"


def test_a_signal_to_one_rank_stops_both_at_the_same_step_and_nothing_is_lost(train, root, tmp_path):
    dataset = trainer.COCOPersonDataset(root, "train2017", 32)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()  # of the first epoch
    for index in (0, 1, 7):  # each of the first two is the first photo of a process
        dataset.path(order[index]).write_bytes(b"")
    settings = {"num_epochs": 2, "restart_period": 2, "max_unreadable_fraction": 0.5, "resume": "newest"}
    straight = train(folder="straight", **settings)
    stopped = train((1, 1, "SIGTERM"), **settings)  # known to both a step later
    assert [(rank["code"], rank["epoch"], rank["step"]) for rank in stopped] == [(143, 0, 2)] * 2
    last = read_checkpoint(tmp_path / "run" / "last.pth")
    assert (last["epoch"], last["step"]) == (0, 2)
    assert all(metrics["unreadable"] for metrics in last["partial_metrics"])
    assert same(train(**settings), straight)
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    assert [row["train_unreadable"] for row in history(tmp_path / "run")] == ["3", "3"]


def test_one_process_more_goes_on_with_the_photos_that_are_left(train, root, tmp_path):
    (alone,) = train((0, 2, "SIGTERM"), codes=(0,))
    order = [*trainer.make_loader(trainer.COCOPersonDataset(root, "train2017", 32), 2, 0, training=True).sampler]
    assert (alone["code"], alone["step"]) == (143, 2)
    assert [photos(line) for line in last_lines(tmp_path)] == [order[:4]]
    ranks = train(resume="newest", image_size=64, explicit=[])  # all have the settings of rank 0's checkpoint
    assert [rank["image_size"] for rank in ranks] == [32, 32]
    said = "after epoch 0, step 2, processes 1 is now 2 (so not bit for bit"
    assert said in (tmp_path / "rank0.log").read_text()
    assert sorted(photo for line in last_lines(tmp_path) for photo in photos(line)) == sorted(order[4:])


@pytest.mark.parametrize("batch", [3, 4])  # of the epoch's last step, and of the last that both have in the validation
def test_a_signal_at_the_last_step_is_met_before_the_work_goes_on(batch, train, tmp_path):
    stopped = train((1, batch, "SIGTERM"))
    assert [(rank["code"], rank["epoch"], rank["step"]) for rank in stopped] == [(143, 0, 3)] * 2
    assert read_checkpoint(tmp_path / "run" / "last.pth")["step"] == 3
    assert not (tmp_path / "run" / "history.csv").exists()


@pytest.mark.parametrize(
    ("event", "codes", "message"),
    [((0, 2, "error"), (1, 2), ["an error of its own", "2"]),
     ((1, 4, "error"), (2, 1), ["2", "an error of its own"]),  # in the validation
     ((1, 2, "SIGKILL"), (1, -9), ["another process ended without an error message", None]),
     ((0, 2, "SIGKILL"), (-9, 1), [None, "another process ended without an error message"])],
)  # fmt: skip
def test_one_ranks_error_ends_both_and_is_reported_once(event, codes, message, train, tmp_path):
    train(event, codes)
    for line, text in zip(last_lines(tmp_path), message, strict=True):
        assert text is None or line.startswith(f"refused: {text}")


@pytest.mark.parametrize(
    ("settings", "codes", "message"),
    [({"data": "nowhere", "folder": "new"}, (1, 2), "no data of"), ({}, (1, 2), "another run"),  # rank 0 alone looks
     ({"device": "toaster"}, (None, None), "toaster"), ({"device": "cuda:0"}, (None, None), "cuda:0")],
)  # fmt: skip
def test_what_all_are_refused_for_ends_both_and_is_reported_once(settings, codes, message, train, tmp_path):
    (tmp_path / "run").mkdir()
    with claim(tmp_path / "run"):
        train(codes=codes, **settings)
    first, second = last_lines(tmp_path) if codes[0] else sorted(last_lines(tmp_path), key=len, reverse=True)
    assert message in first
    assert second == "refused: 2"  # its exit code, and nothing to read


def test_the_tasks_of_srun_train_together_and_one_is_enough_to_stop_them(train, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    srun = {"SLURM_JOB_ID": "70000", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": port,
            "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2",
            "SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}"}  # fmt: skip
    stopped = train((1, 1, "SIGUSR1"), environment=srun, resume="newest")  # as by #SBATCH --signal=USR1@120
    assert [(rank["code"], rank["step"]) for rank in stopped] == [(128 + signal.SIGUSR1, 2)] * 2
    ranks = train(environment=srun, resume="newest")
    assert same(*ranks)
    assert {int(state["step"]) for state in ranks[0]["optimizer"].values()} == {3}
    assert "2 processes" in (tmp_path / "rank0.log").read_text()
    assert len(history(tmp_path / "run")) == 1
