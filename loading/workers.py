"""How loader workers start and end, and how many cores there are for all of them."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_start_method, parent_process, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

import cv2
from torch.utils.data import DataLoader

# A child of os.fork() may wait for ever for a lock that another thread had at that moment, in these Pythons
# (github.com/python/cpython/issues/112275); gloo has threads from the first exchange between processes on.
FORK_MAY_HANG = sys.version_info < (3, 10, 15) or (3, 11) <= sys.version_info < (3, 11, 10)
SHARED_IMPORTS = ["torch", "torchvision", "cv2", "albumentations"]  # by all workers of a fork server
# What may be sent to all processes of a run; SIGHUP is the end of a terminal or an ssh session.
SIGNALS = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, n))
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h, in bytes
CGROUP_ROOT = Path("/sys/fs/cgroup")  # in a container, its own control group


def start_method(is_alone: bool) -> str | None:
    """Returns how loader workers start, None as Python's default. `is_alone`: the training has no other process."""
    forks = sys.platform == "linux" and get_start_method(allow_none=True) in (None, "fork")
    return "forkserver" if FORK_MAY_HANG and forks and not is_alone else None


@contextmanager
def signals_blocked(loader: DataLoader) -> Iterator[None]:
    """Blocks signals in workers of the loader that start within, until they have set their handlers.

    torchrun, terminals and SLURM signal all processes of a run, and before `start_loader_worker` a worker would die of
    that, as would a fork server.
    """
    if not hasattr(signal, "sigwaitinfo"):  # not Linux: the workers would never look at a blocked signal
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        method = (loader.multiprocessing_context or multiprocessing).get_start_method()
        if method != "fork":
            resource_tracker.ensure_running()  # the first worker would start it, and that unblocks some signals
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        if method == "forkserver":
            multiprocessing.set_forkserver_preload(SHARED_IMPORTS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_loader_worker(worker: int) -> None:
    """Prepares a loader worker: signals to all processes are left to the training process, which ends the workers.

    SIGTERM is not plainly ignored: Python ends the workers of a loader by it at exit, and would wait for ever.
    """
    start_worker(worker)
    training = parent_process()  # the system's parent may be a fork server, the default of Python 3.14
    if training:
        Thread(target=_exit_after, args=(training,), daemon=True).start()
    for number in {*SIGNALS} - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux, it tells who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_exit_at_sigterm, args=(training.pid if training else os.getppid(),), daemon=True).start()


def _exit_after(training: BaseProcess) -> None:
    """Exits with the training process: PyTorch watches the system's parent, and a fork server outlives the training."""
    training.join()
    os._exit(0)


def _exit_at_sigterm(sender: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
        pass
    os._exit(0)


def start_worker(_worker: int) -> None:
    """Prepares a process that only makes samples.

    Without malloc's options glibc returns a photo's memory after each sample, and the kernel clears every page again:
    with them a sample at 384 is made 1.15 times as fast, a cached one 1.49 times (medians of 15 rounds on 63 photos).
    """
    cv2.setNumThreads(0)  # there is a worker for each core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process: the training process ends the workers
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)


def usable_cores() -> int:
    """Returns the cores that this process may use: its CPU affinity, and a container's quota if there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = core_quota()
    return min(cores, max(1, int(quota))) if math.isfinite(quota) else cores


def core_quota() -> float:
    """Returns the cores that a container may use, by control groups of either version; infinity without a limit."""
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with suppress(OSError, ValueError, ZeroDivisionError):  # without a limit version 2 says "max", version 1 "-1"
            quota, period = " ".join((CGROUP_ROOT / name).read_text() for name in names).split()
            if int(quota) > 0:
                return int(quota) / int(period)
    return math.inf
