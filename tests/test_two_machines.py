"""Runs on two machines: two torchrun agents, and two processes without one, that meet on the loopback address."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import edit, write_split
from tiny_runs import flags, history, run_of, small, unwatched

import trainer
from models import UNetAutoencoder, read_checkpoint
from training.checkpoints import BEST, LAST, newest_usable

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")]
HANG = 300  # seconds: only a run that hangs takes so long
HOST, OTHER = "127.0.0.2", "127.0.0.1"  # rank 0 is where the address sorts first: not on the rendezvous's host


@pytest.fixture
def port() -> int:
    """A free port, for the rendezvous or the store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def root(coco_root) -> Path:
    write_split(coco_root, "train2017", 32, first_id=1)  # four steps an epoch
    return coco_root


def settings(root: Path, folder: Path, **changes: object) -> list[str]:
    """Returns the flags of a run that has hundreds of epochs before it, of half a second each."""
    model = {"encoder": "mobilenet_v2", "batch_size": 2, "num_epochs": 500, "learning_rate": 1e-2, "ema_decay": 0.0}
    return flags(small(root, folder, **{**model, "resume": "newest", **changes}))


def wait_for(condition: Callable[[], object], agents: list[subprocess.Popen]) -> None:
    """Waits until the condition holds; fails with what an agent has printed if that ends before."""
    end = time.monotonic() + HANG
    while not condition():
        for agent in agents:
            assert agent.poll() is None, agent.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def kill_machine(agent: subprocess.Popen) -> None:
    """Kills an agent and the processes that it has started, as a machine does that loses its power."""
    workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    assert len(workers) == 2
    for pid in (agent.pid, *map(int, workers)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    agent.communicate(timeout=HANG)


def test_a_run_outlives_one_of_two_machines_and_is_saved_by_a_signal_to_one(root, port, start_process, tmp_path):
    run = tmp_path / "run"

    def start(address: str) -> subprocess.Popen:
        options = {"nnodes": 2, "nproc-per-node": 2, "max-restarts": 1, "local-addr": address, "rdzv-backend": "c10d",
                   "rdzv-endpoint": f"{HOST}:{port}",
                   # As on two machines only one is the host. A dead machine is noticed in 3 s and not in 15.
                   "rdzv-conf": f"is_host={int(address == HOST)},keep_alive_interval=1"}  # fmt: skip
        torchrun = [f"--{name}={value}" for name, value in options.items()]
        command = "-m", "torch.distributed.run", *torchrun, "trainer.py", *settings(root, run)
        # By default a surviving agent looks for the store where the dead one had it, and waits for ever.
        return start_process(*command, GLOO_SOCKET_IFNAME="lo", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

    agents = [start(OTHER), start(HOST)]
    wait_for((run / "epoch_0001.pth").exists, agents)
    kill_machine(agents[0])
    path, content = newest_usable(run)
    agents[0] = start(OTHER)
    epoch = content["epoch"] + 1
    wait_for((run / f"epoch_{epoch:04d}.pth").exists, agents)
    agents[0].terminate()
    outputs = [agent.communicate(timeout=HANG)[0] for agent in agents]

    assert [agent.returncode for agent in agents] == [1, 1], outputs  # torchrun's own
    assert re.search(r"exitcode *: 143", outputs[1]), outputs[1]  # of the processes that no signal was sent to
    log = (run / "run.log").read_text()
    assert re.findall(r"(?<!\] )going on from (\S+), after epoch (\d+)", log) == [(str(path), str(content["epoch"]))]
    assert log.count("4 processes") == 2  # in the banner of each start
    last = read_checkpoint(run / LAST)
    assert f"stopped by SIGTERM after epoch {last['epoch']}, step {last['step']}: --resume goes on from there" in log
    assert last["epoch"] >= epoch
    assert [int(row["epoch"]) for row in history(run)] == [*range(1, last["epoch"] + 1)]
    assert not list(run.glob("earlier_*"))
    assert_measured_as_by_one_process(run, root)


def assert_measured_as_by_one_process(run: Path, root: Path) -> None:
    """Asserts that the best model has the metrics that this process measures alone."""
    best, model = read_checkpoint(run / BEST), UNetAutoencoder("mobilenet_v2", pretrained=False)
    model.load_state_dict(best["model"])
    loader = trainer.make_loader(trainer.COCOPersonDataset(root, "val2017", 32), 2, 0, training=False)
    alone = trainer.validate(one := run_of(model), loader, unwatched(one))
    assert alone["images"] == 5
    assert best["metrics"] == pytest.approx(alone, abs=1e-5)


# `trainer.py` in a folder of its own: a relative path then means another disk. It waits only shortly for a shared one.
IMPATIENT = """
import os, sys, trainer
from training import checkpoints
checkpoints.SHARED_SECONDS = 0.5
os.chdir(sys.argv.pop(1))
sys.exit(trainer.run_command(["trainer.py", *sys.argv[1:]]))
"""


def start_apart(start_process, machines: list[Path], port: int, *folders: Path) -> list:
    """Starts a process of one training on each machine: what torchrun would start there."""
    torchrun = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    arguments = settings(*folders, num_epochs=1)
    return [start_process("-c", IMPATIENT, machine, *arguments, **torchrun, RANK=str(rank))
            for rank, machine in enumerate(machines)]  # fmt: skip


@pytest.fixture
def machines(root, tmp_path) -> list[Path]:
    """Two folders with the same data, in which relative paths mean two disks."""
    folders = [tmp_path / "machine0", tmp_path / "machine1"]
    for folder in folders:
        shutil.copytree(root, folder / "coco")
    return folders


def test_other_data_on_another_machine_are_refused_in_one_line(machines, port, start_process, tmp_path):
    edit(machines[1] / "coco", lambda content: content["annotations"].__delitem__(slice(0, 3)))  # a photo less
    processes = start_apart(start_process, machines, port, Path("coco"), tmp_path / "run")
    outputs = [process.communicate(timeout=HANG)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    error = outputs[0].splitlines()[-1]
    assert error.startswith("trainer.py: error: ")
    assert f"coco of {socket.gethostname()}" in error
    assert "error" not in outputs[1]
    assert not [*tmp_path.glob("run/*")]


def test_a_checkpoint_folder_that_another_machine_does_not_see_is_said(machines, root, port, start_process):
    processes = start_apart(start_process, machines, port, root, Path("run"))
    outputs = [process.communicate(timeout=HANG)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert f"run, where rank 0 writes, is not seen by {socket.gethostname()}" in outputs[0]
    assert [folder.exists() for folder in (machines[0] / "run" / LAST, machines[1] / "run")] == [True, False]
    assert not [*machines[0].glob("run/.shared_*")]
