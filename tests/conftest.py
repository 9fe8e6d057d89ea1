"""What all tests run with: caches of their own, small data and models, processes that end with the test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from helpers import ROOT, save_random_model, sharpen, write_split
from reaper import pids_with

if TYPE_CHECKING:  # PyTorch takes seconds, which a test that needs none does not wait
    from cutting.cutter import Cutter

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # tests that import onnxruntime do so before the tool that sets it
# Of whoever launched the tests; a training would take itself for one of several processes.
LAUNCH_VARIABLES = ("TORCHELASTIC_", "PET_", "SLURM_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_")


def pytest_runtest_setup() -> None:
    """Has PyTorch use one thread: results must not depend on the cores, and threads spin on a busy machine."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Keeps tests out of the user's cache folders."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture(scope="session")
def shared_coco() -> Path:
    """Genuine data beside the project; skips the test where they are absent."""
    path = ROOT.parent / "shared" / "coco"
    if not path.exists():
        pytest.skip(f"there is no {path}")
    return path


@pytest.fixture
def coco_root(tmp_path) -> Path:
    """A small COCO-format set: 10 training and 5 validation photos with persons, one more of each without."""
    root = tmp_path / "coco"
    write_split(root, "train2017", 10, first_id=1)
    write_split(root, "val2017", 5, first_id=101)
    return root


@pytest.fixture
def tiny(monkeypatch):
    """Trainings train `tiny_runs.Tiny` in place of the U-Net and draw no curves; each may have two loader workers."""
    import tiny_runs  # imports trainer.py, which few tests need

    tiny_runs.make_tiny(monkeypatch.setattr)


@pytest.fixture
def learning_rates() -> Iterator[list[float]]:
    """The learning rate of each optimiser step in this process, of its first parameter group."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    rates = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    yield rates
    hook.remove()


# --- processes --------------------------------------------------------------------------------------------


@pytest.fixture
def start_process() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts Python with arguments, from the project's folder, its output in a pipe.

    The process has a group of its own. At the test's end, also if pytest itself is killed, it is killed with all its
    descendants, also those in sessions of their own, as torchrun's are: each has inherited an environment variable.
    """
    mark, processes = f"STARTED_BY_TEST={uuid4().hex}", []
    command = [sys.executable, ROOT / "tests" / "reaper.py", mark]
    reaper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def start(*arguments: object, **environment: str) -> subprocess.Popen:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCH_VARIABLES)}
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
        environ = {**inherited, **paths, **environment, **dict([mark.split("=")])}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [sys.executable, *map(str, arguments)]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environ, start_new_session=True, **pipes))
        processes[-1].descendants = lambda: pids_with(mark)
        return processes[-1]

    yield start
    reaper.communicate(b"\n")
    for process in processes:
        process.kill()  # where there is no /proc
        process.wait()
        process.stdout.close()


# --- models -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory) -> Path:
    import torch

    torch.manual_seed(0)
    return save_random_model(tmp_path_factory.mktemp("model") / "best_model.pth", change=sharpen)


@pytest.fixture(scope="session")
def cut(small_checkpoint) -> Cutter:
    from cutting.cutter import load

    return load(small_checkpoint, "cpu")


@pytest.fixture
def stub(monkeypatch):
    """Replaces the network by a function of (N, H, W) to alpha (N, H, W); by default all of it is a person."""
    import torch

    from models import UNetAutoencoder

    def stub(alpha: Callable = torch.ones_like) -> None:
        monkeypatch.setattr(
            UNetAutoencoder, "predict", lambda _, images: torch.cat([images, alpha(images[:, 0])[:, None]], dim=1)
        )

    return stub
