"""How a loader worker starts, and what it begins with."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_start_method, parent_process, resource_tracker
from multiprocessing.process import BaseProcess
from threading import Thread

import cv2
from torch.utils.data import DataLoader

# A child of this Python's os.fork() may wait for ever for a lock that another thread had at that moment
# (github.com/python/cpython/issues/112275), and gloo's threads have it after every exchange between processes.
FORK_MAY_HANG = sys.version_info < (3, 10, 15) or (3, 11) <= sys.version_info < (3, 11, 10)
SHARED_IMPORTS = ["torch", "torchvision", "cv2", "albumentations"]  # by the workers of a fork server
# What all processes of a run may be sent. SIGHUP: the terminal or the ssh session has ended. Windows has neither it nor
# SIGUSR1.
SIGNALS = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, n))
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h, in bytes


def start_method(is_alone: bool) -> str | None:
    """How loader workers start: None is Python's usual way, else they are children of a server without other threads.

    Args:
        is_alone: whether this process shares its training with no other one.
    """
    forks = sys.platform == "linux" and get_start_method(allow_none=True) in (None, "fork")
    return "forkserver" if FORK_MAY_HANG and forks and not is_alone else None


@contextmanager
def starting_workers(loader: DataLoader) -> Iterator[None]:
    """The loader's workers that start within keep signals waiting until they know what to do with them.

    torchrun, a terminal and SLURM send theirs to all processes of a run, and before `start_loader_worker` a worker
    would die of them, as would the server whose child it is.
    """
    if not hasattr(signal, "sigwaitinfo"):  # they would never look who sent a SIGTERM
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        method = (loader.multiprocessing_context or multiprocessing).get_start_method()
        if method != "fork":
            resource_tracker.ensure_running()  # its start, which the first worker brings about, unblocks some
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        if method == "forkserver":
            multiprocessing.set_forkserver_preload(SHARED_IMPORTS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_loader_worker(worker: int) -> None:
    """A signal to all processes of a run is the training one's: it finishes its step, then ends the workers.

    SIGTERM is not plainly ignored, because that is how Python ends the workers of a loader that nobody has deleted:
    at the program's end it would wait for them for ever.
    """
    start_worker(worker)
    training = parent_process()  # not the system's parent, which may be a fork server, Python 3.14's default
    if training:
        Thread(target=_end_after, args=(training,), daemon=True).start()
    for number in {*SIGNALS} - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux: it says who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_with, args=(training.pid if training else os.getppid(),), daemon=True).start()


def _end_after(training: BaseProcess) -> None:
    """PyTorch's workers look whether the system's parent lives, and a fork server lives as long as they do."""
    training.join()
    os._exit(0)


def _end_with(training: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != training:
        pass
    os._exit(0)


def start_worker(_worker: int) -> None:
    """What a process that makes samples and nothing else begins with.

    Without malloc's options glibc returns a photo's memory after each sample, and the kernel clears each page anew:
    they make a sample at 384 1.15 times as fast, a cached one 1.49 times (medians of 15 rounds on 63 photos).
    """
    cv2.setNumThreads(0)  # each worker is a core's worth of work already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process: the training one ends the workers
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)
