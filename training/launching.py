"""What a run needs when torchrun --max-restarts starts its processes anew: who it is, and where they meet."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from pathlib import Path
from uuid import uuid4

import torch.distributed as dist

LAUNCHER = "SILUETA_LAUNCHER"  # the launcher's name, for processes that are started by way of another one


def launcher() -> str:
    """Names the process that starts this one, again and again if need be: another one never has the same name."""
    return os.environ.get(LAUNCHER) or f"{socket.gethostname()} {os.getppid()} {_start_of(os.getppid())}"


def _start_of(process: int) -> str:
    """When it was started: a process's number comes again, in a container every time."""
    try:
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except OSError:  # no Linux
        with contextlib.suppress(OSError):  # nor macOS
            return subprocess.run(["ps", "-o", "lstart=", "-p", str(process)], capture_output=True, text=True).stdout
    return ""


def meeting_place(rank: int, world_size: int) -> dist.Store:
    """Where the processes of this attempt, and of no earlier one, exchange their addresses.

    torchrun keeps one store for all attempts, in which gloo and NCCL would read the addresses of processes that are
    dead, and wait for them. Nor is its count of restarts a name for an attempt: each machine counts for itself, and
    one that starts anew because another machine did does not count. So the main process makes up a name.
    """
    store = next(dist.rendezvous("env://", rank, world_size))[0]
    name = uuid4().hex
    if rank == 0:
        _tell(name, store, world_size)
    else:
        name = _ask(store, rank)
    return dist.PrefixStore(name, store)


def _ask(store: dist.Store, rank: int) -> str:
    """The name that the main process answers this very process with: an earlier attempt's cannot be mistaken for it."""
    question = uuid4().hex
    store.set(f"question/{rank}", question)
    name = store.get(f"answer/{question}").decode()  # waits for it
    store.set(f"heard/{name}/{rank}", "")
    return name


def _tell(name: str, store: dist.Store, world_size: int) -> None:
    """Answers all, until all have heard it: what is asked at first may be left from an earlier attempt."""
    ranks, end = range(1, world_size), time.monotonic() + store.timeout.total_seconds()
    while not store.check([f"heard/{name}/{rank}" for rank in ranks]):
        for rank in ranks:
            question = store.get(f"question/{rank}").decode()  # waits for it
            store.set(f"answer/{question}", name)
        if time.monotonic() > end:
            raise dist.DistStoreError(f"{world_size} processes were started, and not all of them answer")
        time.sleep(0.02)
