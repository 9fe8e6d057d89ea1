"""The processes of a run: how they find one another, take a device each, and end together."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

from loading.workers import usable_cores
from training.launching import first_line, is_slurm_task, slurm_env, visible_gpus
from utils import LOCAL_RANK_GPU, LaunchError, Processes, counted, pick_device

LINGER_SECONDS = 30.0  # how long a failed process waits for the others to notice
NCCL_ERROR_KEY = "exception_dump"  # NCCL's watchdog sets it after an error, and ends whoever sees it minutes later
ROUTES = Path("/proc/net/route")  # Linux's


@contextlib.contextmanager
def process_group(device_setting: str) -> Iterator[Processes]:
    """Yields this process's device and rank; all processes of the run form torch's default process group meanwhile.

    An error on one rank ends all: the first to fail raises it, the others, whose communication breaks, SystemExit.
    """
    os.environ.update(slurm_env(os.environ))
    defaults = {"rank": 0, "local_rank": 0, "world_size": 1, "local_world_size": 1}
    ranks = {name: int(os.environ.get(name.upper(), default)) for name, default in defaults.items()}
    try:
        store = make_store(ranks["rank"], ranks["world_size"]) if ranks["world_size"] > 1 else None
    except dist.DistError as error:
        raise LaunchError(f"the processes do not find one another: {error}") from None
    try:
        yield limit_threads(init_process(device_setting, ranks, store))
    except BaseException as error:
        to_raise = error_to_raise(error, store) if store else error
        abort_group(store, ranks["world_size"])
        if to_raise is error:
            raise
        raise to_raise from None
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def local_rank0_first(processes: Processes) -> Iterator[None]:
    """Lets each machine's local rank 0 run the block first, to fill a cache; the others wait, on the CPU, for a day."""
    group: Any = dist.new_group(timeout=timedelta(days=1), backend="gloo") if dist.is_initialized() else None
    if group and processes.local_rank > 0:
        dist.barrier(group)
    yield
    if group and processes.local_rank == 0:
        dist.barrier(group)


def processes_sharing_cores(processes: Processes) -> int:
    """Returns the number of processes that use this one's cores: its machine's, or 1 if srun gave each its own."""
    cores_per_task = int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) if is_slurm_task(os.environ) else 0
    return 1 if usable_cores() < processes.local_world_size * cores_per_task else processes.local_world_size


def make_store(rank: int, world_size: int) -> dist.Store:
    """Returns a store that only the processes of this attempt use, once all of them are there.

    torchrun keeps one store for all attempts, with the addresses of dead processes in it, and its count of restarts
    differs between machines. So rank 0 makes up a prefix, and each of the others asks for it by a random key: what an
    earlier attempt left cannot be taken for the answer.
    """
    store = next(dist.rendezvous("env://", rank, world_size))[0]
    if rank == 0:
        prefix = uuid4().hex
        store.delete_key(NCCL_ERROR_KEY)
        _send_prefix(prefix, store, world_size)
    else:
        question = uuid4().hex
        store.set(f"question/{rank}", question)
        prefix = store.get(f"answer/{question}").decode()  # waits for it
        store.set(f"received/{prefix}/{rank}", "")
    return dist.PrefixStore(prefix, store)


def _send_prefix(prefix: str, store: Any, world_size: int) -> None:
    """Answers until every rank has received the prefix: a question may be an earlier attempt's at first."""
    ranks, end = range(1, world_size), time.monotonic() + store.timeout.total_seconds()
    while not store.check([f"received/{prefix}/{rank}" for rank in ranks]):
        for rank in ranks:
            question = store.get(f"question/{rank}").decode()  # waits for it
            store.set(f"answer/{question}", prefix)
        if time.monotonic() > end:
            raise dist.DistStoreError(f"{world_size} processes were started, and not all of them answer")
        time.sleep(0.02)


def init_process(device_setting: str, ranks: dict[str, int], store: dist.Store | None) -> Processes:
    """Takes this process's device and, if there are several, creates the process group."""
    gpus, local_world_size = visible_gpus(device_setting), ranks["local_world_size"]
    has_own_gpu = is_slurm_task(os.environ) and gpus < local_world_size  # as cuda:0, by srun --gpus-per-task=1
    has_mps = torch.backends.mps.is_available() and local_world_size == 1
    name, note = pick_device(device_setting, 0 if has_own_gpu else ranks["local_rank"], gpus, has_mps)
    device = torch.device(name)
    if local_world_size > 1 and device.type != "cpu" and device_setting not in (LOCAL_RANK_GPU, "cuda"):
        raise LaunchError(f"--device {device_setting} would put {local_world_size} processes on one device")
    if device.type == "cuda":
        take_gpu(device)
        if store and is_slurm_task(os.environ):
            refuse_shared_gpu(device, ranks, store)
    if store:
        if ranks["world_size"] > local_world_size:
            choose_interface()
        backend, gpu = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=ranks["rank"], world_size=ranks["world_size"], device_id=gpu)
    return Processes(device, note, **ranks)


def take_gpu(device: torch.device) -> None:
    """Makes a GPU the current one, before anything is loaded onto GPU 0."""
    try:
        torch.cuda.set_device(device)
        torch.ones(1, device=device).item()  # set_device alone does not notice a GPU that is busy
    except RuntimeError as error:
        raise LaunchError(f"{device} cannot be used: {first_line(error)} (--device names another one)") from None


def refuse_shared_gpu(device: torch.device, ranks: dict[str, int], store: dist.Store) -> None:
    """Raises LaunchError if this machine's tasks share a GPU: each may see a single one, as cuda:0."""
    machine, number = socket.gethostname(), ranks["local_world_size"]
    store.set(f"gpu/{machine}/{ranks['local_rank']}", str(torch.cuda.get_device_properties(device).uuid))
    gpus = {store.get(f"gpu/{machine}/{local_rank}") for local_rank in range(number)}  # waits for them
    if len(gpus) < number:
        raise LaunchError(f"{number} processes share {counted(len(gpus), 'GPU')} of {machine}: start one a GPU "
                          "(srun --gpus-per-task=1)")  # fmt: skip


def choose_interface() -> None:
    """Has gloo use the network interface of the route to rank 0, and not the host name's, often a loopback one."""
    with contextlib.suppress(OSError, ValueError):  # not on Linux, no IPv4 address, or no route
        (address,) = struct.unpack("=I", socket.inet_aton(socket.gethostbyname(os.environ["MASTER_ADDR"])))
        routes = [line.split() for line in ROUTES.read_text().splitlines()[1:]]
        matching = [(int(mask, 16), -int(metric), name) for name, network, _, _, _, _, metric, mask, *_ in routes
                    if address & int(mask, 16) == int(network, 16)]  # fmt: skip
        os.environ.setdefault("GLOO_SOCKET_IFNAME", max(matching)[-1])  # the longest mask, then the lowest metric


def limit_threads(processes: Processes) -> Processes:
    """Limits torch to this process's part of the CPU cores and notes it; OMP_NUM_THREADS, if set, decides instead."""
    threads = max(1, usable_cores() // processes_sharing_cores(processes))
    alone = processes.local_world_size == 1 or processes.device.type != "cpu"
    if alone or "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() <= threads:
        return processes
    torch.set_num_threads(threads)
    note = f"{counted(threads, 'thread')} in each process (OMP_NUM_THREADS sets another number)"
    return dataclasses.replace(processes, note="; ".join(filter(None, [processes.note, note])))


def error_to_raise(error: BaseException, store: dist.Store) -> BaseException:
    """Returns what this rank ends with: its error, or a silent exit if another rank has raised its own before."""
    if not isinstance(error, Exception):  # an exit, whose reason was printed
        return error
    with contextlib.suppress(RuntimeError):  # the store ended with rank 0: better two messages than none
        if store.add("errors", 1) > 1:
            return SystemExit(2)
    if isinstance(error, RuntimeError) and re.search("by peer|Broken pipe|remote process", str(error)):
        return LaunchError("another process ended without an error message: it may have been killed (out of memory?)")
    return error


def abort_group(store: dist.Store | None, world_size: int) -> None:
    """Leaves the process group without the others, whose communication then fails."""
    with contextlib.suppress(RuntimeError):  # the error may have broken the group or the store as well
        if group := dist.group.WORLD:
            group.abort()  # destroying NCCL's group alone would wait for pending work of all ranks
            dist.destroy_process_group()
        if store:
            store.add("left", 1)
            atexit.register(linger, store, world_size)  # after the error was printed


def linger(store: dist.Store, world_size: int) -> None:
    """Waits until all ranks have left: torchrun signals those that run when one ends, and they would begin to save."""
    end = time.monotonic() + LINGER_SECONDS
    with contextlib.suppress(RuntimeError):  # the store ended with rank 0
        while store.add("left", 0) < world_size and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.2)  # the store may end with this process, and the others ask it once more
