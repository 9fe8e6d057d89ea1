"""torchrun --max-restarts: a run whose rank died goes on by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import write_split
from test_resume import TWO, assert_the_same, left_over, popen
from test_trainer import small

from training import checkpoints, launching

SETTINGS = {**TWO, "batch_size": 2, "num_workers": 1, "checkpoint_minutes": 1e-9}
SECONDS = 400  # on a busy machine; PyTorch waits half an hour for a group that does not come together


def finish(process: subprocess.Popen, folder: Path) -> str:
    """What it says until it ends; no process that names the folder outlives it, whatever becomes of the test."""
    try:
        out = process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"after {SECONDS} seconds: {(error.output or b'').decode()}") from None
    finally:
        for number in left_over(str(folder)):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
    assert process.returncode == 0, out
    return out


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_split(folder / "coco", "train2017", 10, first_id=1)
    write_split(folder / "coco", "val2017", 5, first_id=101)
    settings = small(folder / "coco", folder / "run", **SETTINGS)
    finish(popen(folder, settings, "--nproc-per-node=2", XDG_CACHE_HOME=str(folder / "cache")), folder)
    return folder / "run"


@pytest.mark.parametrize(
    ("launch", "gpus", "rank"),
    [(["--nproc-per-node=2"], "", 1), ([], "2", 0)],  # by a bare torchrun the program launches its processes itself
)
def test_a_run_whose_rank_was_killed_goes_on_by_itself_to_the_same_weights(
    launch, gpus, rank, undisturbed, coco_root, tmp_path
):
    settings, mark = small(coco_root, tmp_path / "run", **SETTINGS), tmp_path / "mark"
    launch = [*launch, "--max-restarts=3"]
    out = finish(popen(tmp_path, settings, *launch, DIE_AT=f"{rank} 5 {mark}", GPUS=gpus), tmp_path)
    assert mark.exists()
    assert f"going on from {tmp_path / 'run'}" in out
    assert_the_same(tmp_path / "run", undisturbed)


# --- where they meet --------------------------------------------------------------------------------------


def meet(store: dist.Store, late: set[int]) -> list[dist.Store]:
    """An attempt of three processes, some of which come late, in the store that the launcher keeps."""

    def join(rank: int) -> dist.Store:
        time.sleep(0.1 * (rank in late))
        return launching.meeting_place(rank, 3)

    with ThreadPoolExecutor(3) as threads:
        return list(threads.map(join, range(3)))


@pytest.mark.parametrize("late", [{0}, {1}, {2}, {1, 2}, {0, 2}])
def test_an_attempts_processes_meet_one_another_and_find_nothing_of_an_earlier_attempt(late, monkeypatch):
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=10))
    monkeypatch.setattr(dist, "rendezvous", lambda *_: iter([(store, None, None)]))
    for attempt in range(3):
        places = meet(store, late if attempt else set())
        assert not any(place.check(["address"]) for place in places)
        places[attempt].set("address", str(attempt))
        assert [int(place.get("address")) for place in places] == [attempt] * 3


# --- who starts them --------------------------------------------------------------------------------------


def test_a_launcher_has_a_name_of_its_own_that_can_be_handed_on(monkeypatch):
    assert launching.launcher() == launching.launcher()
    assert str(os.getppid()) in launching.launcher().split()
    names = {launching.launcher()}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        monkeypatch.setattr(os, "getppid", lambda: other.pid)
        names.add(launching.launcher())
        other.stdin.close()
    names.add(launching.launcher())  # that process is gone: another one may have its number
    assert len(names) == 3
    monkeypatch.setenv(launching.LAUNCHER, "another")
    assert launching.launcher() == "another"


@pytest.fixture
def claimed(tmp_path) -> Path:
    """A folder that a run under this launcher has begun to write to."""
    with checkpoints.claim(tmp_path) as claim:
        checkpoints.sign(claim)
    return tmp_path


def test_another_launchers_run_is_not_ours(claimed, monkeypatch):
    assert checkpoints.is_ours(claimed)
    monkeypatch.setenv(launching.LAUNCHER, "another")
    assert not checkpoints.is_ours(claimed)
    with checkpoints.claim(claimed):  # which dies before it has moved the other's files aside
        pass
    assert not checkpoints.is_ours(claimed)
    with checkpoints.claim(claimed) as claim:
        checkpoints.sign(claim)
    assert checkpoints.is_ours(claimed)
