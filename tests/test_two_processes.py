"""Trainings on two processes, of which something happens to one: they stay together, step by step."""

from __future__ import annotations

import contextlib
import json
import multiprocessing.forkserver
import os
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny_runs
import torch
import torch.distributed as dist
from helpers import write_split
from tiny_runs import HANG, Tiny, assert_same_run, history, position, same, small

import loading.augmentation  # noqa: F401 - takes a second, which each rank would wait
import trainer
from models import model_weights, read_checkpoint
from training.checkpoints import claim
from training.interruptions import Stopped
from utils import UserError


def take_part(rank: int, environment: dict, folder: Path, config: trainer.Config, explicit: list, event: tuple) -> None:
    """Trains as one of the ranks, and saves what it ends with."""
    torch.set_num_threads(1)
    os.environ.update({name: value.replace("{rank}", str(rank)) for name, value in environment.items()})
    tiny_runs.make_tiny()
    patch, runs, start_run, photos = pytest.MonkeyPatch(), [], trainer.start_run, []
    trainer.start_run = lambda *args: (runs.append(start_run(*args)), runs[0])[1]
    getitem = trainer.COCOPersonDataset.__getitem__
    trainer.COCOPersonDataset.__getitem__ = lambda data, index: (
        photos.extend([index] if data._augment else []), getitem(data, index))[1]  # fmt: skip
    trainer.pictures.save_samples = lambda *_: None  # it reads training photos as well
    if event and event[0] == rank:
        _, batch, what = event
        if what == "inf":
            tiny_runs.spoil_losses(patch, [batch])
        elif what == "error":
            tiny_runs.at_batch(patch, batch, Mock(side_effect=UserError("an error of its own")))
        else:
            tiny_runs.at_batch(patch, batch, lambda: signal.raise_signal(signal.Signals[what]))
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
        print(photos)
    (run,) = runs
    state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()["state"]}
    state |= {"code": code, "epoch": run.epochs_done, "step": run.step, "lrs": run.scheduler.get_last_lr()}
    torch.save({**state, "image_size": run.settings["image_size"]}, folder / f"rank{rank}.pth")


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

    `event` is (rank, batch, what happens there); `environment` is the launcher's, by default torchrun's.
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
        assert [rank.exitcode for rank in ranks] == [*codes]
        return [torch.load(path) for path in sorted(tmp_path.glob("rank*.pth"))]

    yield train
    for rank in started:
        rank.kill()
        rank.join()


def last_lines(folder: Path) -> list[str]:
    """Returns what each rank has printed last."""
    logs = [path.read_text() for path in sorted(folder.glob("rank*.log"))]
    return [log.splitlines()[-1] if log else "" for log in logs]


def test_two_processes_skip_a_step_together_and_measure_what_one_does(train, root, tmp_path):
    ranks = train((1, 2, "inf"))
    assert same(*ranks)
    assert {int(state["step"]) for state in ranks[0]["optimizer"].values()} == {2}
    assert all(value.isfinite().all() for value in ranks[0]["model"].values())
    assert history(tmp_path / "run")[0]["skipped_steps"] == "1"
    best, last = (read_checkpoint(tmp_path / "run" / name) for name in ("best_model.pth", "last.pth"))
    assert same(best["model"], model_weights(last))
    assert [log.read_text().count("1/1 |") for log in sorted(tmp_path.glob("rank*.log"))] == [1, 0]
    tiny_runs.assert_measured_alone(tmp_path / "run", root, Tiny())  # there is no module. before its keys


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
    assert all(metrics["unreadable"] for metrics in last["partial_metrics"])
    assert same(train(**settings), straight)
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    assert [row["train_unreadable"] for row in history(tmp_path / "run")] == ["3", "3"]


def test_one_process_more_goes_on_with_the_photos_that_are_left(train, root, tmp_path):
    (alone,) = train((0, 2, "SIGTERM"), codes=(0,))
    order = [*trainer.make_loader(trainer.COCOPersonDataset(root, "train2017", 32), 2, 0, training=True).sampler]
    assert (alone["code"], alone["step"]) == (143, 2)
    assert last_lines(tmp_path) == [str(order[:4])]  # the photos that it has trained on
    ranks = train(resume="newest", image_size=64, explicit=[])  # all have the settings of rank 0's checkpoint
    assert [rank["image_size"] for rank in ranks] == [32, 32]
    assert "after epoch 0, step 2, processes 1 is now 2 (so not bit for bit" in (tmp_path / "rank0.log").read_text()
    assert sorted(photo for line in last_lines(tmp_path) for photo in json.loads(line)) == sorted(order[4:])


@pytest.mark.parametrize("batch", [3, 4])  # of the epoch's last step, and of the last that both have in the validation
def test_a_signal_at_the_last_step_is_met_before_the_work_goes_on(batch, train, tmp_path):
    stopped = train((1, batch, "SIGTERM"))
    assert [(rank["code"], rank["epoch"], rank["step"]) for rank in stopped] == [(143, 0, 3)] * 2
    assert position(tmp_path / "run" / "last.pth") == (0, 3)
    assert not (tmp_path / "run" / "history.csv").exists()


@pytest.mark.parametrize(
    ("settings", "codes", "message"),
    [({"event": (0, 2, "error")}, (1, 2), ["an error of its own", "2"]),  # its exit code, and nothing to read
     ({"event": (1, 4, "error")}, (2, 1), ["2", "an error of its own"]),  # in the validation
     ({"event": (1, 2, "SIGKILL")}, (1, -9), ["another process ended without an error message", None]),
     ({"data": "nowhere"}, (1, 2), ["no data of", "2"]),  # rank 0 alone looks
     ({"folder": "claimed"}, (1, 2), ["another run", "2"])],
)  # fmt: skip
def test_one_ranks_error_ends_both_and_is_reported_once(settings, codes, message, train, tmp_path):
    (tmp_path / "claimed").mkdir()
    with claim(tmp_path / "claimed"):
        train(codes=codes, **settings)
    for line, text in zip(last_lines(tmp_path), message, strict=True):
        assert text is None or line.startswith(f"refused: {text}")


def test_the_tasks_of_srun_train_together_and_one_is_enough_to_stop_them(train, tmp_path):
    srun = {"SLURM_JOB_ID": "70000", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0",
            "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_PROCID": "{rank}",
            "SLURM_LOCALID": "{rank}", "MASTER_PORT": str(tiny_runs.free_port())}  # fmt: skip
    stopped = train((1, 1, "SIGUSR1"), environment=srun, resume="newest")  # as by #SBATCH --signal=USR1@120
    assert [(rank["code"], rank["step"]) for rank in stopped] == [(128 + signal.SIGUSR1, 2)] * 2
    ranks = train(environment=srun, resume="newest")
    assert same(*ranks)
    assert {int(state["step"]) for state in ranks[0]["optimizer"].values()} == {3}
    assert "2 processes" in (tmp_path / "rank0.log").read_text()
    assert len(history(tmp_path / "run")) == 1
