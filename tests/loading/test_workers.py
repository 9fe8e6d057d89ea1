"""How a loader's worker starts, and what it begins with."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import cv2
import pytest
import torch
from conftest import fresh_python

from datasets import make_loader
from loading import workers

ROOT = Path(__file__).resolve().parents[2]


class Probe(torch.utils.data.Dataset):
    seed = 0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([cv2.getNumThreads(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN])


def test_workers_keep_to_one_thread_ignore_ctrl_c_and_leave_the_dice_of_the_model_alone(request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it already
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    dice, threads = torch.get_rng_state(), cv2.getNumThreads()
    for training in (True, False):
        assert torch.cat(list(make_loader(Probe(), 2, 2, training))).tolist() == [[1, 1]] * 4
    assert torch.equal(torch.get_rng_state(), dice)
    assert cv2.getNumThreads() == threads


NUMBERS = """
import multiprocessing, os, signal, sys
import torch
import datasets
from loading import workers

class Numbers(torch.utils.data.Dataset):
    seed, __len__, set_epoch = 0, lambda self: 4, lambda self, epoch: None
    def __getitem__(self, index): return torch.tensor(index)

"""
STARTED = NUMBERS + """
def hit_while_starting(worker):
    server = {os.getppid()} - {multiprocessing.parent_process().pid}  # a fork server, or none
    for process in (os.getpid(), *server):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            os.kill(process, number)
    workers.start_loader_worker(worker)

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    datasets.start_loader_worker = hit_while_starting
    loader = datasets.make_loader(Numbers(), 2, 2, training=False)
    print([batch.tolist() for batch in datasets.batches(loader, 0)])
    print(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []))
    ended = loader._iterator._workers[0]
    ended.terminate()
    ended.join(30)
    print(ended.exitcode)
"""


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="nothing tells who sent a signal")
@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_a_signal_to_all_does_not_end_a_worker_that_is_just_starting_and_the_trainings_own_does(start, tmp_path):
    script = tmp_path / "started.py"
    script.write_text(STARTED)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), start]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["[[0, 1], [2, 3]]", "False", "0"], done.stderr


KILLED = NUMBERS + """
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    loader = datasets.make_loader(Numbers(), 2, 2, training=False)
    list(datasets.batches(loader, 0))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other start methods")
@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_no_worker_outlives_a_training_that_was_killed(start, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    process = subprocess.Popen(
        [sys.executable, str(script), start], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        process.communicate(timeout=60)  # the pipe closes with the last of the processes
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other start methods")
def test_where_a_fork_may_hang_the_workers_of_several_processes_are_not_forked(monkeypatch):
    cases = ((True, None, True), (True, "fork", True), (False, None, False), (True, "spawn", False))
    for may_hang, usual, changed in cases:
        monkeypatch.setattr(workers, "FORK_MAY_HANG", may_hang)
        monkeypatch.setattr(workers, "get_start_method", lambda allow_none, usual=usual: usual)
        alone, shared = (make_loader(Probe(), 2, 1, False, 0, size).multiprocessing_context for size in (1, 2))
        assert alone is None
        assert (shared is not None and shared.get_start_method() == "forkserver") is changed
    assert make_loader(Probe(), 2, 0, False, 0, 2).multiprocessing_context is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_a_worker_keeps_the_memory_that_it_has_freed():
    code = """if True:
        import resource, numpy
        from loading.workers import start_worker
        start_worker(0)
        for _ in range(10):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            [numpy.ones(2**23, numpy.uint8) for _ in range(4)]
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 100)"""
    assert fresh_python(code) == ["True"]  # 8192 pages otherwise


def test_a_program_that_leaves_its_loader_behind_ends_at_once():
    """Python ends its workers by SIGTERM: who plainly ignores it is waited for, for ever."""
    code = """if True:
        import torch
        from datasets import make_loader
        class Numbers(torch.utils.data.Dataset):
            seed, __len__, __getitem__ = 0, lambda self: 8, lambda self, index: torch.tensor(index)
        loader = make_loader(Numbers(), 2, 1, training=False)
        print(len(list(loader)))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "4\n"
