"""What SLURM's variables mean, in situations written down by hand; test_two_processes.py has two real tasks."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from training import launching, slurm
from utils import EACH_ITS_GPU, LaunchError, Processes

# Task 5 of 7 on the second of two machines: srun --nodes=2 --ntasks=7
STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "7",
}  # fmt: skip
# python in a batch script, and in the shell of salloc, of a job of as many tasks
BATCH = {
    "SLURM_JOB_ID": "4711", "SLURM_NTASKS": "7", "SLURM_JOB_NODELIST": "node[07-08]", "SLURM_TASKS_PER_NODE": "4,3",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
}  # fmt: skip
SALLOC = {name: value for name, value in BATCH.items() if name in ("SLURM_JOB_ID", "SLURM_NTASKS")}


def test_a_task_of_srun_gets_the_place_that_torchrun_would_give_it():
    assert slurm.place(STEP) == {
        "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "node07", "MASTER_PORT": "14711",
    }  # fmt: skip


@pytest.mark.parametrize(
    "environ",
    [
        {}, BATCH, SALLOC,
        BATCH | {"SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "7"},  # what an older SLURM calls the script
        STEP | {"SLURM_STEP_ID": "4294967290"},  # the shell of salloc, where it is started as a step
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash, or srun --ntasks=1, in a job of seven
        STEP | {"RANK": "0"}, STEP | {"TORCHELASTIC_RUN_ID": "none"},  # srun torchrun
    ],
)  # fmt: skip
def test_what_srun_has_not_started_with_others_is_left_alone(environ, monkeypatch):
    assert slurm.place(environ) == {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with launching.joined("cpu") as processes:  # and waits for nobody
        assert processes.world_size == 1


def test_an_address_and_a_port_that_the_user_has_chosen_stay():
    chosen = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert slurm.place(STEP | chosen).items() >= chosen.items()


def test_jobs_and_steps_beside_one_another_have_ports_of_their_own():
    ports = {slurm.place(STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"]
             for job in range(19_000, 21_000) for step in (0, 1)}  # fmt: skip
    assert len(ports) == 4000
    assert all(10_000 <= int(port) < 30_000 for port in ports)


@pytest.mark.parametrize("name", sorted(STEP.keys() - {"SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "SLURM_PROCID",
                                                       "SLURM_NTASKS"}))  # fmt: skip
def test_a_variable_that_is_kept_out_is_named(name):
    with pytest.raises(LaunchError, match=f"7 processes, and {name} is not set"):
        slurm.place({key: value for key, value in STEP.items() if key != name})


@pytest.mark.parametrize(
    ("text", "tasks"), [("4", [4]), ("4(x2)", [4, 4]), ("2(x3),1", [2, 2, 2, 1]), ("16,8(x2),1", [16, 8, 8, 1])]
)
def test_tasks_of_nodes(text, tasks):
    assert slurm.tasks_of_nodes(text) == tasks


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu3", "gpu3"), ("gpu3,gpu4", "gpu3"), ("node[01-04,07]", "node01"), ("node[12,15],gpu1", "node12"),
     ("a-b[7-9].local", "a-b7.local"), ("rack[2-3]n[005,007]", "rack2n005"), ("login,node[1-2]", "login")],
)  # fmt: skip
def test_first_host(nodes, first):
    assert slurm.first_host(nodes) == first


# --- the machine's GPUs and cores -------------------------------------------------------------------------


@pytest.mark.parametrize(("gpus", "indices"), [(4, [0, 1, 2, 3]), (1, [0, 0, 0, 0]), (2, [0, 0, 0, 0])])
def test_each_task_takes_a_gpu_of_its_own_however_many_it_sees(gpus, indices, monkeypatch):
    assert take_gpus(monkeypatch, gpus, [f"GPU-{rank}" for rank in range(4)]) == indices


def test_tasks_that_see_the_same_gpu_are_all_refused(monkeypatch):
    with pytest.raises(LaunchError, match=r"4 processes share 2 GPUs of .*--gpus-per-task=1"):
        take_gpus(monkeypatch, 1, ["GPU-a", "GPU-a", "GPU-b", "GPU-b"])


def take_gpus(monkeypatch, gpus: int, uuids: list[str]) -> list[int]:
    """The indices that the four tasks of a machine take, of GPUs that are not there; `uuids` are theirs."""
    for name, value in (STEP | {"SLURM_STEP_NUM_TASKS": "4"}).items():
        monkeypatch.setenv(name, value)
    store, properties = dist.HashStore(), iter(uuids)
    store.set_timeout(timedelta(seconds=10))
    monkeypatch.setattr(launching, "visible_gpus", lambda _: gpus)
    monkeypatch.setattr(launching, "take_gpu", lambda _: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=next(properties)))

    def join(rank: int) -> int:
        place = {"rank": rank, "local_rank": rank, "world_size": 4, "local_world_size": 4}
        return launching._join(EACH_ITS_GPU, place, store).device.index

    with ThreadPoolExecutor(4) as threads:  # they wait for one another
        return list(threads.map(join, range(4)))


@pytest.mark.parametrize(
    ("environ", "cores", "sharing"),
    [({}, 32, 4), (STEP, 32, 4), (STEP | {"SLURM_CPUS_PER_TASK": "8"}, 8, 1),  # bound to its own
     (STEP | {"SLURM_CPUS_PER_TASK": "8"}, 32, 4),  # not bound: it may use those of the others as well
     (STEP | {"SLURM_CPUS_PER_TASK": "7"}, 8, 1),  # whole cores, of two threads
     ({"SLURM_CPUS_PER_TASK": "32", "TORCHELASTIC_RUN_ID": "none", **STEP}, 32, 4)],
)  # fmt: skip
def test_cores_that_srun_gave_a_task_are_not_shared_once_more(environ, cores, sharing, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launching, "usable_cores", lambda: cores)
    assert launching.sharing_cores(Processes(torch.device("cpu"), world_size=7, local_world_size=4)) == sharing
