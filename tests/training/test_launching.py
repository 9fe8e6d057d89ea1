"""All of torchrun: who starts a run, spreading over the GPUs, restarts of a run whose rank died."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import write_split
from test_resume import TWO, assert_the_same, left_over, popen
from test_trainer import refusal, small
from torch.distributed.run import get_args_parser

import utils
from training import checkpoints, launching
from training.launching import spread_command
from utils import EACH_ITS_GPU, LaunchError, Processes

SETTINGS = {**TWO, "batch_size": 2, "num_workers": 1, "checkpoint_minutes": 1e-9}
SECONDS = 300  # on a busy machine; PyTorch waits half an hour for a group that does not come together


class HungError(AssertionError):
    """Processes that wait for one another; the text ends with what each of their threads was doing."""


def finish(process: subprocess.Popen, folder: Path) -> str:
    """What it says until it ends; no process that names the folder outlives it, whatever becomes of the test."""
    try:
        out = process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        end(folder, signal.SIGABRT)  # Python's fault handler prints every thread's stack
        raise HungError(f"after {SECONDS} seconds: {process.communicate(timeout=60)[0]}") from None
    finally:
        end(folder, signal.SIGKILL)
    assert process.returncode == 0, out
    return out


def end(folder: Path, number: int) -> None:
    for process in left_over(str(folder)):
        with suppress(ProcessLookupError):
            os.kill(process, number)


def run(folder: Path, *launch: str, **environment: str) -> str:
    """A run of two processes in a folder of its own: what it says. Its files lie in `run`."""
    folder.mkdir()
    write_split(folder / "coco", "train2017", 10, first_id=1)
    write_split(folder / "coco", "val2017", 5, first_id=101)
    environment |= {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONFAULTHANDLER": "1"}
    return finish(popen(folder, small(folder / "coco", folder / "run", **SETTINGS), *launch, **environment), folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    try:
        run(folder / "first", "--nproc-per-node=2")
        return folder / "first" / "run"
    except HungError as error:  # seen once in some hundreds of runs, never yet with the stacks that tell why
        warnings.warn(f"two processes hung: {error}", stacklevel=1)
    run(folder / "second", "--nproc-per-node=2")
    return folder / "second" / "run"


@pytest.mark.parametrize(
    ("launch", "gpus", "rank"),
    [(["--nproc-per-node=2"], "", 1), ([], "2", 0)],  # by a bare torchrun the program launches its processes itself
)
def test_a_run_whose_rank_was_killed_goes_on_by_itself_to_the_same_weights(launch, gpus, rank, undisturbed, tmp_path):
    mark = tmp_path / "mark"
    out = run(tmp_path / "killed", *launch, "--max-restarts=3", DIE_AT=f"{rank} 5 {mark}", GPUS=gpus)
    assert mark.exists()
    assert f"going on from {tmp_path / 'killed' / 'run'}" in out
    assert_the_same(tmp_path / "killed" / "run", undisturbed)


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


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_alarm_that_nccl_gave_in_an_earlier_attempt_does_not_ring_in_this_one(wrapped, monkeypatch):
    below = dist.HashStore()
    below.set("exception_dump", "rank")  # ProcessGroupNCCL sets and looks for it below all prefixes
    store = dist.PrefixStore("attempt", dist.PrefixStore("more", below)) if wrapped else below
    monkeypatch.setattr(dist, "rendezvous", lambda *_: iter([(store, None, None)]))
    place = launching.meeting_place(0, 1)
    assert not below.check(["exception_dump"])
    place.set("address", "0")
    assert place.get("address") == b"0"


# --- several machines -------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="the interfaces are asked for as on Linux")
def test_an_interface_is_found_by_its_address():
    assert launching.interface_of("127.0.0.1") == "lo"
    assert launching.interface_of("192.0.2.77") == ""
    assert launching.address_towards("127.0.0.1") == "127.0.0.1"
    own = launching.address_towards(launching.ELSEWHERE)
    if own:  # else this machine has no network
        assert launching.interface_of(own) in [name for _, name in socket.if_nameindex()]


WAYS = {"main": "10.0.0.7", "self": "127.0.1.1", launching.ELSEWHERE: "10.0.1.7", "far": ""}
INTERFACES = {"10.0.0.7": "eth0", "10.0.1.7": "eth1", "127.0.1.1": "lo", "": ""}


@pytest.mark.parametrize(
    ("main", "local", "said", "chosen"),
    [("main", 1, None, "eth0"), ("self", 1, None, "eth1"), ("far", 1, None, "eth1"), ("main", 1, "ib0", "ib0"),
     ("main", 2, None, None)],
)  # fmt: skip
@pytest.mark.usefixtures("taken")
def test_gloo_takes_the_interface_that_reaches_the_main_machine(main, local, said, chosen, monkeypatch):
    seen, environment = [], {"MASTER_ADDR": main, "GLOO_SOCKET_IFNAME": said or "", "WORLD_SIZE": "2"}
    for name, value in {**environment, "LOCAL_WORLD_SIZE": str(local)}.items():
        monkeypatch.setenv(name, value)
    if said is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(launching, "address_towards", WAYS.get)
    monkeypatch.setattr(launching, "interface_of", INTERFACES.get)
    monkeypatch.setattr(launching, "meeting_place", lambda *_: dist.HashStore())
    look = lambda *_, **__: seen.append(os.environ.get("GLOO_SOCKET_IFNAME"))  # noqa: E731
    monkeypatch.setattr(dist, "init_process_group", look)
    with launching.joined("cpu"):
        assert seen == [chosen]


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


# --- spreading over the GPUs --------------------------------------------------------------------------------

ARGV = ["code/trainer.py", "--nproc-per-node=1", "--seed", "8"]  # arguments of the script are not the launcher's
BARE = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "1"}


def spread(*options: str, gpus: int = 4, **environ: str) -> list[str] | None:
    return spread_command(BARE | environ, ["python", "bin/torchrun", *options, *ARGV, ""], gpus, ARGV)


@pytest.mark.parametrize("options", ["", "--standalone", "--nnodes=1", "--nnodes 1", "--no-python", "--node-rank=0"])
def test_a_bare_torchrun_is_launched_again_for_every_gpu(options):
    command = spread(*options.split(), gpus=3)
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    launch = get_args_parser().parse_args(command[3:])  # as torchrun itself reads it
    assert (launch.standalone, launch.nproc_per_node) == (True, "3")
    assert [launch.training_script, *launch.training_script_args] == ARGV


@pytest.mark.parametrize("number", [" 1", "=1"])
@pytest.mark.parametrize("name", ["--nproc-per-node", "--nproc_per_node", "--nproc-per", "--standalone --nproc_p"])
def test_a_number_that_was_asked_for_is_kept(name, number):
    options = (name + number).split()
    assert get_args_parser().parse_args([*options, *ARGV]).nproc_per_node == "1"
    assert spread(*options) is None


def test_nothing_is_launched_again_without_need():
    assert spread(PET_NPROC_PER_NODE="1") is None
    assert [spread(gpus=gpus) is None for gpus in (0, 1, 2)] == [True, True, False]
    assert spread(LOCAL_WORLD_SIZE="4", WORLD_SIZE="4") is None
    assert spread_command({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, ["srun", *ARGV], 4, ARGV) is None


def test_on_several_machines_the_user_is_asked_for_the_number():
    with pytest.raises(LaunchError, match="--nproc-per-node=gpu"):
        spread("--nnodes=2", WORLD_SIZE="2")
    assert spread("--nnodes=2", "--nproc-per-node=1", WORLD_SIZE="2") is None


SCRIPT = """
import sys, torch
from training import launching
torch.cuda.device_count = lambda: 2
launching.use_every_gpu(sys.argv, "cuda")
with launching.joined("cpu") as processes:
    print(f"{processes.rank} of {processes.world_size} {sys.argv[1:]}\\n", end="", flush=True)
"""


@pytest.mark.parametrize(("options", "count"), [([], 2), (["--nproc_per_node=1"], 1)])
def test_torchrun_really_starts_as_many_processes(tmp_path, options, count):
    (tmp_path / "script.py").write_text(SCRIPT)
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("PET_", "TORCHELASTIC"))}
    environ |= {"PYTHONPATH": str(Path(utils.__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *options, "script.py", "--seed", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120, check=False)
    lines = [line for line in done.stdout.splitlines() if "--seed" in line]  # older versions of gloo talk in between
    assert sorted(lines) == [f"{rank} of {count} ['--seed', '1']" for rank in range(count)]
    assert done.returncode == 0


# --- this process's place ---------------------------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """No launcher, two GPUs that are not there; the list of those that were taken."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    indices = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: indices.append(device.index))
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))
    return indices


def test_without_a_launcher_the_world_is_one_process(taken):
    alone = Processes(torch.device("cpu"), "", rank=0, local_rank=0, world_size=1, local_world_size=1)
    with launching.joined("cpu") as processes:
        assert processes == alone
        assert processes.is_main
    assert taken == []
    assert not dist.is_initialized()


@pytest.mark.parametrize(("setting", "index"), [(EACH_ITS_GPU, 1), ("cuda:0", 0), ("cuda", 1)])
def test_the_gpu_is_taken_before_anything_is_loaded(taken, monkeypatch, setting, index):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with launching.joined(setting) as processes:
        assert processes.local_rank == 1
        assert taken == [index]


def test_several_processes_are_not_put_on_one_gpu(taken, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="cuda:0"), launching.joined("cuda:0"):
        pass


@pytest.mark.parametrize(("error", "calls"), [(None, ["destroy"]), (ValueError, ["abort", "destroy"]),
                                              (SystemExit, ["abort", "destroy"])])  # fmt: skip
@pytest.mark.usefixtures("taken")
def test_an_error_waits_for_no_other_process_to_end_with_it(error, calls, monkeypatch):
    made, destroy = [], dist.destroy_process_group
    monkeypatch.setattr(dist.ProcessGroup, "abort", lambda _: made.append("abort"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: (made.append("destroy"), destroy()))
    with pytest.raises(error) if error else nullcontext(), launching.joined("cpu"):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if error:
            raise error
    assert made == calls
    assert not dist.is_initialized()


@pytest.mark.parametrize(("patience", "waits"), [(60, True), (0, False)])
def test_a_process_that_breaks_off_stays_until_all_have_left_or_its_patience_ends(patience, waits, monkeypatch):
    monkeypatch.setattr(launching, "PATIENCE", patience)
    stays, store = [], dist.HashStore()
    monkeypatch.setattr(atexit, "register", lambda *call: stays.append(call))
    for _ in range(2):
        launching._break_off(store, 3)
    with ThreadPoolExecutor(1) as threads:
        stay, *arguments = stays[0]
        staying = threads.submit(stay, *arguments)
        time.sleep(0.5)
        assert staying.running() == waits
        launching._break_off(store, 3)
        staying.result(timeout=30)


# --- a GPU that cannot be used ----------------------------------------------------------------------------

OLD_DRIVER = ("CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update "
              "your GPU driver. (Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:119.)")  # fmt: skip
BUSY = ("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nSearch for `cudaErrorDevicesUnavailable'\n"
        "Compile with `TORCH_USE_CUDA_DSA`\n")  # fmt: skip


def fails(message: str) -> Callable:
    def fail(*_, **__):
        raise RuntimeError(message)

    return fail


@pytest.mark.parametrize("device", [EACH_ITS_GPU, "cuda:0"])
def test_a_driver_that_is_too_old_is_told_in_one_line(device, monkeypatch, capsys, recwarn):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: warnings.warn(OLD_DRIVER, stacklevel=1) or 0)
    error = refusal(capsys, "--data-root=nowhere", f"--device={device}")
    assert "too old (found version 11040). Please update your GPU driver (--device cpu" in error
    assert "nowhere" in refusal(capsys, "--data-root=nowhere", "--device=cpu")
    assert not recwarn


@pytest.mark.parametrize(
    ("function", "message", "told"),
    [("set_device", "Found no NVIDIA driver on your system. Please check that you have one", "Found no NVIDIA driver"),
     ("set_device", BUSY, "busy or unavailable (--device"), ("ones", BUSY, "busy or unavailable (--device"),
     ("ones", "CUDA error: no kernel image is available for execution on the device\nSearch", "no kernel image")],
)  # fmt: skip
@pytest.mark.usefixtures("taken")
def test_a_gpu_that_cannot_be_used_is_told_in_one_line(function, message, told, monkeypatch, capsys):
    monkeypatch.setattr(torch if function == "ones" else torch.cuda, function, fails(message))
    error = refusal(capsys, "--data-root=nowhere")
    assert error.startswith("trainer.py: error: cuda:0 cannot be used: ")
    assert told in error


@pytest.mark.parametrize("named", ["7", "GPU-01234567", "x"])
def test_gpus_that_are_named_and_are_not_there_are_refused(named, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert f"CUDA_VISIBLE_DEVICES is {named}, and no such GPU is there" in refusal(capsys, "--data-root=nowhere")
    assert "CUDA_VISIBLE_DEVICES" not in refusal(capsys, "--data-root=nowhere", "--device=cpu")


@pytest.mark.parametrize("named", ["", "-1", "NoDevFiles", None])
def test_hidden_gpus_are_a_wish_for_the_cpu(named, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    with launching.joined(EACH_ITS_GPU) as processes:
        assert processes.device.type in ("cpu", "mps")
