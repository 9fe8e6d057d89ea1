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
from pathlib import Path

import pytest
from helpers import edit, write_split
from tiny_runs import HANG, flags, free_port, history, position, small, wait_for

from training.checkpoints import LAST, newest_usable

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")]
HOST, OTHER = "127.0.0.2", "127.0.0.1"  # rank 0 is where the address sorts first: not on the rendezvous's host


@pytest.fixture
def root(coco_root) -> Path:
    write_split(coco_root, "train2017", 32, first_id=1)  # four steps an epoch
    return coco_root


def settings(root: Path, folder: Path, **changes: object) -> list[str]:
    """Returns the flags of a run that has hundreds of epochs before it, of half a second each."""
    model = {"encoder": "mobilenet_v2", "batch_size": 2, "num_epochs": 500, "learning_rate": 1e-2, "ema_decay": 0.0}
    return flags(small(root, folder, **{**model, "resume": "newest", **changes}))


def test_a_run_outlives_one_of_two_machines_and_is_saved_by_a_signal_to_one(root, start_process, tmp_path):
    run, port = tmp_path / "run", free_port()

    def start(address: str) -> subprocess.Popen:
        options = {"nnodes": 2, "nproc-per-node": 2, "max-restarts": 1, "local-addr": address, "rdzv-backend": "c10d",
                   "rdzv-endpoint": f"{HOST}:{port}",
                   # As on two machines only one is the host. A dead machine is noticed in 3 s and not in 15.
                   "rdzv-conf": f"is_host={int(address == HOST)},keep_alive_interval=1"}  # fmt: skip
        torchrun = [f"--{name}={value}" for name, value in options.items()]
        command = "-m", "torch.distributed.run", *torchrun, "trainer.py", *settings(root, run, num_workers=1)
        # By default a surviving agent looks for the store where the dead one had it, and waits for ever.
        return start_process(*command, GLOO_SOCKET_IFNAME="lo", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

    agents = [start(OTHER), start(HOST)]
    wait_for(run / "epoch_0001.pth", *agents)
    workers = Path(f"/proc/{agents[0].pid}/task/{agents[0].pid}/children").read_text().split()
    assert len(workers) == 2
    for pid in (agents[0].pid, *map(int, workers)):  # as of a machine that loses its power
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    agents[0].communicate(timeout=HANG)
    path, content = newest_usable(run)
    agents[0] = start(OTHER)
    epoch = content["epoch"] + 1
    wait_for(run / f"epoch_{epoch:04d}.pth", *agents)
    pids = agents[0].descendants()
    assert len(pids) >= 2 * (1 + 2 + 2)  # torchrun, two ranks, a loader worker each
    agents[0].terminate()
    outputs = [agent.communicate(timeout=HANG)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [1, 1], outputs  # torchrun's own
    assert not agents[0].descendants()
    memory = os.listdir("/dev/shm")  # of other programs too
    assert not [name for name in memory if any(name.startswith(f"torch_{pid}_") for pid in pids)]
    assert re.search(r"exitcode *: 143", outputs[1]), outputs[1]  # of the processes that no signal was sent to
    log = (run / "run.log").read_text()
    assert re.findall(r"(?<!\] )going on from (\S+), after epoch (\d+)", log) == [(str(path), str(content["epoch"]))]
    assert log.count("4 processes") == 2  # in the banner of each start
    last, step = position(run / LAST)
    assert f"stopped by SIGTERM after epoch {last}, step {step}: --resume goes on from there" in log
    assert last >= epoch
    assert [int(row["epoch"]) for row in history(run)] == [*range(1, last + 1)]
    assert not list(run.glob("earlier_*"))


# `trainer.py` in a folder of its own: a relative path then means another disk. It waits only shortly for a shared one.
IMPATIENT = """
import os, sys, trainer
from training import checkpoints
checkpoints.SHARED_SECONDS = 0.5
os.chdir(sys.argv.pop(1))
sys.exit(trainer.run_command(["trainer.py", *sys.argv[1:]]))
"""


def train_apart(start_process, machines: list[Path], code: int, *folders: Path) -> list[str]:
    """Trains in a process on each machine, as torchrun would start it there. Returns what each has printed."""
    torchrun = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    arguments = settings(*folders, num_epochs=1)
    processes = [start_process("-c", IMPATIENT, machine, *arguments, **torchrun, RANK=str(rank))
                 for rank, machine in enumerate(machines)]  # fmt: skip
    outputs = [process.communicate(timeout=HANG)[0] for process in processes]
    assert [process.returncode for process in processes] == [code, code], outputs
    return outputs


@pytest.fixture
def machines(root, tmp_path) -> list[Path]:
    """Two folders with the same data, in which relative paths mean two disks."""
    folders = [tmp_path / "machine0", tmp_path / "machine1"]
    for folder in folders:
        shutil.copytree(root, folder / "coco")
    return folders


def test_other_data_on_another_machine_are_refused_in_one_line(machines, start_process, tmp_path):
    edit(machines[1] / "coco", lambda content: content["annotations"].__delitem__(slice(0, 3)))  # a photo less
    outputs = train_apart(start_process, machines, 2, Path("coco"), tmp_path / "run")
    error = outputs[0].splitlines()[-1]
    assert error.startswith("trainer.py: error: ")
    assert f"coco of {socket.gethostname()}" in error
    assert "error" not in outputs[1]
    assert not [*tmp_path.glob("run/*")]


def test_a_checkpoint_folder_that_another_machine_does_not_see_is_said(machines, root, start_process):
    outputs = train_apart(start_process, machines, 0, root, Path("run"))
    assert f"run, where rank 0 writes, is not seen by {socket.gethostname()}" in outputs[0]
    assert [folder.exists() for folder in (machines[0] / "run" / LAST, machines[1] / "run")] == [True, False]
    assert not [*machines[0].glob("run/.shared_*")]
