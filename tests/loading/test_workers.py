"""How loader workers start and end, and the cores that there are for them."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from datasets import make_loader
from loading import workers

SCRIPT = """
import multiprocessing, os, platform, resource, signal, sys
import cv2, numpy, torch
import datasets
from loading import workers

class Probe(torch.utils.data.Dataset):
    seed, __len__, set_epoch = 0, lambda self: 4, lambda self, epoch: None
    share_memory = lambda self: None
    def __getitem__(self, index):  # a worker has one thread, ignores Ctrl-C and keeps the memory that it has freed
        for _ in range(10):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            [numpy.ones(2**23, numpy.uint8) for _ in range(4)]
        pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before  # 8192 if it is given back
        keeps = pages < 100 or platform.libc_ver()[0] != "glibc"
        return torch.tensor([index, cv2.getNumThreads(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN, keeps])

def hit_while_starting(worker):
    server = {os.getppid()} - {multiprocessing.parent_process().pid}  # a fork server, or none
    for process in (os.getpid(), *server):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            os.kill(process, number)
    workers.start_loader_worker(worker)

if __name__ == "__main__":
    start, how = sys.argv[1:]
    multiprocessing.set_start_method(start)
    if how == "signalled":
        datasets.start_loader_worker = hit_while_starting
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    state, threads = torch.get_rng_state(), cv2.getNumThreads()
    loader = datasets.make_loader(Probe(), 2, 2, training=False)
    print([batch.tolist() for batch in datasets.batches(loader, 0)])
    print(torch.equal(torch.get_rng_state(), state), cv2.getNumThreads() == threads, flush=True)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "signalled":
        print(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []))
        ended = loader._iterator._workers[0]
        ended.terminate()
        ended.join(60)
        print(ended.exitcode)
"""
SAMPLES = ["[[[0, 1, 1, 1], [1, 1, 1, 1]], [[2, 1, 1, 1], [3, 1, 1, 1]]]", "True True"]
# How a program with loader workers ends, and what it prints beside its samples.
OUTCOMES = {"signalled": (0, ["False", "0"]), "killed": (-signal.SIGKILL, []), "left behind": (0, [])}
CASES = [*(("fork", how) for how in OUTCOMES), pytest.param("forkserver", "signalled", marks=pytest.mark.slow)]


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="nothing tells who sent a signal")
@pytest.mark.parametrize(("start", "how"), CASES)
def test_workers_survive_signals_to_all_processes_and_end_with_the_training(start, how, tmp_path, start_process):
    (tmp_path / "program.py").write_text(SCRIPT)
    process = start_process(tmp_path / "program.py", start, how, PYTHONWARNINGS="ignore")
    output = process.communicate(timeout=240)[0]  # the pipe closes with the last of the processes
    assert (process.returncode, output.splitlines()) == (OUTCOMES[how][0], [*SAMPLES, *OUTCOMES[how][1]])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other start methods")
def test_where_a_fork_may_hang_the_workers_of_several_processes_are_not_forked(monkeypatch):
    class Photos(list):
        seed, share_memory = 0, lambda self: None

    cases = ((True, None, True), (True, "fork", True), (False, None, False), (True, "spawn", False))
    for may_hang, usual, changed in cases:
        monkeypatch.setattr(workers, "FORK_MAY_HANG", may_hang)
        monkeypatch.setattr(workers, "get_start_method", lambda allow_none, usual=usual: usual)
        alone, several = (make_loader(Photos("abcd"), 2, 1, False, 0, size).multiprocessing_context for size in (1, 2))
        assert alone is None
        assert (several is not None and several.get_start_method() == "forkserver") is changed
    assert make_loader(Photos("abcd"), 2, 0, False, 0, 2).multiprocessing_context is None


@pytest.mark.parametrize(
    ("texts", "cores"),
    [([], 8), (["250000 100000"], 2), (["1600000 100000"], 8), (["max 100000"], 8), (["765000", "100000"], 7),
     (["50000", "100000"], 1), (["-1", "100000"], 8), (["1", "0"], 8)],
)  # fmt: skip
def test_usable_cores_are_limited_by_the_quota_of_control_groups_of_either_version(tmp_path, monkeypatch, texts, cores):
    (tmp_path / "cpu").mkdir()
    names = ["cpu.max"] if len(texts) == 1 else ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]
    for name, text in zip(names, texts, strict=bool(texts)):
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(workers, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(8)}, raising=False)
    assert workers.usable_cores() == cores
