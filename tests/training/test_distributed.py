"""The processes of a run: they find one another, take a GPU each, and end together."""

from __future__ import annotations

import atexit
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
import torch
import torch.distributed as dist
from tiny_runs import HANG, assert_same_run, flags, small

from training import distributed
from utils import LOCAL_RANK_GPU, LaunchError, Processes

SRUN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}


@pytest.fixture
def environ(monkeypatch) -> dict[str, str]:
    """An environment without a launcher's variables."""
    monkeypatch.setattr(os, "environ", {})
    return os.environ


TRAINING = """
import os, pathlib, signal, sys, torch
from training import launching
gpus, torch.cuda.device_count = torch.cuda.device_count, lambda: 2
launching.spread_over_gpus(sys.argv, "cuda")
import tiny_runs, trainer
torch.cuda.device_count, forward, batches = gpus, trainer.LossCalculator.forward, []
killed = pathlib.Path(sys.argv.pop())
def forward_or_die(*arguments):
    batches.append(1)
    if len(batches) == 3 and os.environ["RANK"] == "1" and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(*arguments)
trainer.LossCalculator.forward = forward_or_die
tiny_runs.make_tiny()
sys.exit(trainer.run_command(sys.argv))
"""


@pytest.mark.slow
def test_torchrun_uses_every_gpu_and_resumes_to_the_same_run_after_a_kill(coco_root, start_process, tmp_path):
    (tmp_path / "script.py").write_text(TRAINING)
    outputs, folders = [], [tmp_path / "restarted", tmp_path / "undisturbed"]
    for option, folder in zip(("--max-restarts=1", "--nproc-per-node=2"), folders, strict=True):
        config = small(coco_root, folder, batch_size=2, num_epochs=1, save_every_minutes=1e-9)
        arguments = option, tmp_path / "script.py", *flags(config), tmp_path / "killed"
        process = start_process("-m", "torch.distributed.run", *arguments)
        outputs.append(process.communicate(timeout=HANG)[0])
        assert process.returncode == 0, outputs[-1]
    assert ["2 processes" in output for output in outputs] == [True, True]
    assert ["last.pth" in output for output in outputs] == [True, False]  # the message of what it resumes from
    assert_same_run(*folders)


def test_processes_of_an_attempt_meet_in_a_store_without_an_earlier_ones_keys(monkeypatch):
    store = dist.HashStore()  # which the launcher keeps for all attempts
    store.set("exception_dump", "0")  # by NCCL in an earlier attempt
    monkeypatch.setattr(dist, "rendezvous", lambda *_: iter([(store, None, None)]))

    def join(rank: int, late: set[int]) -> dist.Store:
        time.sleep(0.1 * (rank in late))
        return distributed.make_store(rank, 3)

    for attempt, late in enumerate([{0}, {1}, {1, 2}, {0}]):
        with ThreadPoolExecutor(3) as threads:
            stores = list(threads.map(join, range(3), [late] * 3))
        assert not any(own.check(["address"]) for own in stores)
        stores[attempt % 3].set("address", str(attempt))
        assert [int(own.get("address")) for own in stores] == [attempt] * 3
    assert not store.check(["exception_dump"])


@pytest.mark.parametrize(("local_rank", "order"), [(0, ["block", "barrier"]), (1, ["barrier", "block"])])
def test_the_other_ranks_wait_for_local_rank_0_for_a_day(local_rank, order, monkeypatch):
    torch_dist = Mock()
    for name in ("is_initialized", "new_group", "barrier"):
        monkeypatch.setattr(dist, name, getattr(torch_dist, name))
    with distributed.local_rank0_first(Processes(torch.device("cpu"), local_rank=local_rank)):
        torch_dist.block()
    assert [name for name, *_ in torch_dist.mock_calls if name in order] == order
    torch_dist.new_group.assert_called_once_with(timeout=timedelta(days=1), backend="gloo")


@pytest.fixture
def taken(monkeypatch, environ) -> list[int]:
    """Two GPUs that do not exist; the list of those that were taken."""
    indices = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: indices.append(device.index))
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))
    return indices


@pytest.mark.parametrize(
    ("setting", "processes", "indices"),
    [(LOCAL_RANK_GPU, 2, [1]), ("cuda", 2, [1]), ("cuda:0", 1, [0]), ("cuda:0", 2, [])],  # two on one are refused
)
def test_a_process_takes_the_gpu_of_its_local_rank_or_the_named_one(setting, processes, indices, taken, environ):
    environ.update(LOCAL_RANK="1", LOCAL_WORLD_SIZE=str(processes))
    refused = pytest.raises(LaunchError, match="--device cuda:0 would put 2 processes on one device")
    with nullcontext() if indices else refused, distributed.process_group(setting):
        pass
    assert taken == indices


@pytest.mark.parametrize(("module", "function"), [(torch.cuda, "set_device"), (torch, "ones")])
@pytest.mark.usefixtures("taken")
def test_a_gpu_that_cannot_be_used_is_an_error_of_one_line(module, function, monkeypatch):
    monkeypatch.setattr(module, function, Mock(side_effect=RuntimeError("CUDA error: busy\nSearch for `cudaErrorD'\n")))
    with pytest.raises(LaunchError, match=r"^cuda:0 cannot be used: CUDA error: busy \(--device.*\)$"):
        distributed.take_gpu(torch.device("cuda:0"))


@pytest.mark.parametrize(
    ("visible", "uuids", "indices"), [(4, "abcd", [0, 1, 2, 3]), (1, "abcd", [0, 0, 0, 0]), (1, "aabb", None)]
)
def test_each_task_of_srun_takes_its_own_gpu_however_many_it_sees(visible, uuids, indices, environ, monkeypatch):
    environ.update(SRUN)
    store, properties = dist.HashStore(), iter([SimpleNamespace(uuid=uuid) for uuid in uuids])
    monkeypatch.setattr(distributed, "visible_gpus", lambda _: visible)
    monkeypatch.setattr(distributed, "take_gpu", lambda _: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: next(properties))

    def join(rank: int) -> int:
        ranks = {"rank": rank, "local_rank": rank, "world_size": 4, "local_world_size": 4}
        return distributed.init_process(LOCAL_RANK_GPU, ranks, store).device.index

    refused = pytest.raises(LaunchError, match=r"^4 processes share 2 GPUs of .*--gpus-per-task=1\)$")
    with nullcontext() if indices else refused, ThreadPoolExecutor(4) as threads:  # they wait for one another
        assert list(threads.map(join, range(4))) == indices


@pytest.mark.parametrize(
    ("variables", "cores", "sharing", "threads"),
    [({}, 32, 4, 8), ({}, 3, 4, 1), ({"OMP_NUM_THREADS": "6"}, 32, 4, None),
     (SRUN | {"SLURM_CPUS_PER_TASK": "8"}, 32, 4, 8),  # not bound: it may use the others' as well
     (SRUN | {"SLURM_CPUS_PER_TASK": "7"}, 8, 1, 8)],  # bound to its own whole cores, of two threads
)  # fmt: skip
def test_processes_on_a_cpu_divide_the_cores_that_they_share(variables, cores, sharing, threads, environ, monkeypatch):
    environ.update(variables)
    limit, processes = Mock(), Processes(torch.device("cpu"), "a note", world_size=7, local_world_size=4)
    monkeypatch.setattr(distributed, "usable_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", limit)
    for other in (replace(processes, local_world_size=1), replace(processes, device=torch.device("cuda"))):
        assert distributed.limit_threads(other) == other
    assert distributed.processes_sharing_cores(processes) == sharing
    note = distributed.limit_threads(processes).note
    assert limit.mock_calls == ([call(threads)] if threads else [])
    assert note.startswith(f"a note; {threads} thread" if threads else "a note")


# As Linux writes it, an address's bytes in reverse: a default route, 10.0.1.0/24, 10.0.0.0/16.
ROUTES = """Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
eth0 00000000 0100000A 0003 0 0 100 00000000 0 0 0
ib0 0001000A 00000000 0001 0 0 0 00FFFFFF 0 0 0
eth1 0000000A 00000000 0001 0 0 0 0000FFFF 0 0 0
"""


@pytest.mark.parametrize(("address", "chosen"), [("10.0.1.9", "ib0"), ("10.0.2.9", "eth1"), ("127.0.1.1", "eth0")])
def test_gloo_uses_the_interface_of_the_route_to_rank_0(address, chosen, environ, tmp_path, monkeypatch):
    (tmp_path / "route").write_text(ROUTES)
    monkeypatch.setattr(distributed, "ROUTES", tmp_path / "route")
    monkeypatch.setattr(distributed, "make_store", lambda *_: dist.HashStore())
    seen = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: seen.append(environ.get("GLOO_SOCKET_IFNAME")))
    for variables in ({"LOCAL_WORLD_SIZE": "2"}, {"LOCAL_WORLD_SIZE": "1"}, {"GLOO_SOCKET_IFNAME": "user0"}):
        environ.update({"MASTER_ADDR": address, "WORLD_SIZE": "2"} | variables)
        with distributed.process_group("cpu"):
            pass
    assert seen == [None, chosen, "user0"]


@pytest.mark.parametrize("error", [None, ValueError, SystemExit])
@pytest.mark.usefixtures("environ")
def test_an_error_leaves_the_group_without_waiting_for_the_others(error, monkeypatch):
    calls, destroy = [], dist.destroy_process_group
    monkeypatch.setattr(dist.ProcessGroup, "abort", lambda _: calls.append("abort"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: (calls.append("destroy"), destroy()))
    with pytest.raises(error) if error else nullcontext(), distributed.process_group("cpu"):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if error:
            raise error
    assert calls == (["abort", "destroy"] if error else ["destroy"])
    assert not dist.is_initialized()


def test_a_process_that_failed_lingers_until_all_have_left_or_its_time_is_over(monkeypatch):
    at_exit, store, slept = Mock(), dist.HashStore(), []
    monkeypatch.setattr(atexit, "register", at_exit)
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.append(seconds) or distributed.abort_group(store, 3))
    distributed.abort_group(store, 3)
    linger, *arguments = at_exit.call_args.args
    linger(*arguments)
    assert slept == [0.05, 0.05, 0.2]  # while others leave; then for those who ask the store once more
    monkeypatch.setattr(distributed, "LINGER_SECONDS", 0)
    linger(store, 99)
    assert len(slept) == 4
