"""All of torchrun: who starts a run, spreading it over the GPUs, restarts, how its processes meet and part."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import socket
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist

with contextlib.suppress(ImportError):  # Windows
    import fcntl

from training import slurm
from utils import EACH_ITS_GPU, LaunchError, Processes, counted, pick_device, usable_cores

LONGEST_WORK = timedelta(hours=24)  # of one process that the others wait for: a cache at COCO's size takes its time
PATIENCE = 30.0  # seconds that a process which ends by an error gives the others to notice
# By this name NCCL's watch in one process tells the others of an error, and they end themselves some minutes later. It
# passes by all prefixes: one that an attempt has left would end the next.
NCCL_ALARM = "exception_dump"
SIOCGIFADDR = 0x8915  # Linux's request for an interface's address
ELSEWHERE = "192.0.2.1"  # an address that is nobody's, so that the way to it is the way out
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
        _below(store).delete_key(NCCL_ALARM)
        _tell(name, store, world_size)
    else:
        name = _ask(store, rank)
    return dist.PrefixStore(name, store)


def _below(store: dist.Store) -> dist.Store:
    """The store itself, where names are as they are."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store


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


LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
)


def spread_command(
    environ: Mapping[str, str], parent_arguments: list[str], gpus: int, argv: list[str]
) -> list[str] | None:
    """The command by which a lone worker of a bare `torchrun trainer.py` replaces itself to use every GPU.

    Args:
        environ: the environment of this process.
        parent_arguments: the command line of the launcher.
        gpus: how many this process sees.
        argv: the script and its arguments.

    Returns:
        None where nothing is to be done: not under torchrun, one GPU or none, or a number was asked for.

    Raises:
        LaunchError: the same on several machines, where a new launch would need a meeting place of its own.
    """
    alone = "TORCHELASTIC_RUN_ID" in environ and environ.get("LOCAL_WORLD_SIZE") == "1"
    if not alone or gpus < 2 or _count_was_given(environ, parent_arguments, argv[0]):
        return None
    if environ.get("WORLD_SIZE") != "1":
        raise LaunchError(
            f"torchrun starts one process a machine unless told otherwise, and {gpus - 1} of the {gpus} GPUs here "
            "would stay idle: add --nproc-per-node=gpu on each machine (or --nproc-per-node=1 if you mean it)"
        )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    return [*launcher, *argv]


def _count_was_given(environ: Mapping[str, str], parent_arguments: list[str], script: str) -> bool:
    names = [os.path.basename(argument) for argument in parent_arguments]
    script_at = names.index(os.path.basename(script)) if os.path.basename(script) in names else len(names)
    options = [a.split("=")[0].replace("_", "-") for a in parent_arguments[:script_at] if a.startswith("--n")]
    abbreviated = any("--nproc-per-node".startswith(option) for option in options if option != "--n")
    return abbreviated or "PET_NPROC_PER_NODE" in environ


def use_every_gpu(argv: list[str], device: str) -> None:
    """Replaces this process by a launch over all visible GPUs where a bare torchrun left it alone.

    Args:
        argv: the script and its arguments.
        device: the setting; one that names a certain device wants no more of them.

    Raises:
        LaunchError: as `spread_command` and `visible_gpus`.
    """
    if device not in (EACH_ITS_GPU, "cuda"):
        return
    try:
        parent_arguments = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
    except OSError:  # no Linux: nobody to ask, and hardly several GPUs
        return
    command = spread_command(os.environ, parent_arguments, visible_gpus(device), argv)
    if command is not None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC") and k not in LAUNCHER_VARIABLES}
        os.execve(command[0], command, kept | {LAUNCHER: launcher()})


# --- this process's GPU -----------------------------------------------------------------------------------


def visible_gpus(device_setting: str) -> int:
    """How many CUDA GPUs there are for this process; where the setting is another device, none is looked for.

    Raises:
        LaunchError: the driver cannot be used, or CUDA_VISIBLE_DEVICES names GPUs and none of them is there.
    """
    if not device_setting.startswith("cuda"):
        return 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        gpus = torch.cuda.device_count()
    failures = [line for it in said if (line := first_line(it.message)).startswith("CUDA initialization")]
    if not gpus and failures:
        raise LaunchError(f"the GPU cannot be used: {failures[0]} (--device cpu does without)")
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if not gpus and not re.match(r"-1|NoDevFiles|$", named):  # by which the CPU is meant; the second is SLURM's
        raise LaunchError(f"CUDA_VISIBLE_DEVICES is {named}, and no such GPU is there: nvidia-smi -L lists those that "
                          "are; --device cpu does without")  # fmt: skip
    return gpus


def take_gpu(device: torch.device) -> None:
    """Makes a GPU this process's own, before anything is loaded: or every process would touch GPU 0.

    Raises:
        LaunchError: it cannot be used: the driver, another process that has it to itself, no code for its kind.
    """
    try:
        torch.cuda.set_device(device)
        torch.ones(1, device=device).item()  # that alone may leave it untouched, and so learn nothing of a busy one
    except RuntimeError as error:
        raise LaunchError(f"{device} cannot be used: {first_line(error)} (--device names another one)") from None


def first_line(error: Exception) -> str:
    """What PyTorch says, without where in its sources, and without what it adds to all that CUDA says."""
    return str(error).partition("\n")[0].partition(" (Triggered")[0].rstrip(".")


# --- this process and the others --------------------------------------------------------------------------


@contextlib.contextmanager
def joined(device_setting: str) -> Iterator[Processes]:
    """This process among the others, for as long as they work together.

    An error ends them all. It is told by the first process that has one, and the others, for which that one has gone,
    end without a word. None waits for another to come to the same place.

    Raises:
        LaunchError: the device cannot be had, the others cannot be found, or one of them was killed.
        SystemExit: another process tells why.
    """
    os.environ.update(slurm.place(os.environ))
    place = {key: int(os.environ.get(key.upper(), default)) for key, default in
             {"rank": 0, "local_rank": 0, "world_size": 1, "local_world_size": 1}.items()}  # fmt: skip
    try:
        store = meeting_place(place["rank"], place["world_size"]) if place["world_size"] > 1 else None
    except dist.DistError as error:
        raise LaunchError(f"the processes do not find one another: {error}") from None
    try:
        yield _join(device_setting, place, store)
    except BaseException as error:
        ending = _ending(error, store) if store else error
        _break_off(store, place["world_size"])
        if ending is error:
            raise
        raise ending from None
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(device_setting: str, place: dict[str, int], store: dist.Store | None) -> Processes:
    """Takes this process's device and, where there are others, founds their group."""
    has_mps = torch.backends.mps.is_available()
    gpus = visible_gpus(device_setting)
    number = 0 if slurm.sees_its_own_gpus(os.environ, gpus, place["local_world_size"]) else place["local_rank"]
    name, note = pick_device(device_setting, number, gpus, has_mps and place["local_world_size"] == 1)
    device = torch.device(name)
    if place["local_world_size"] > 1 and device.type != "cpu" and device_setting not in (EACH_ITS_GPU, "cuda"):
        raise LaunchError(f"--device {device_setting} would put {place['local_world_size']} processes on one device")
    if device.type == "cuda":
        take_gpu(device)
        if store and slurm.is_launcher(os.environ):
            _check_that_none_is_shared(device, place, store)
    if store:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        ranks = {"rank": place["rank"], "world_size": place["world_size"]}
        if place["world_size"] > place["local_world_size"]:
            choose_interface()
        dist.init_process_group(backend, store=store, device_id=device if device.type == "cuda" else None, **ranks)
    return Processes(device, note, **place)


def _check_that_none_is_shared(device: torch.device, place: dict[str, int], store: dist.Store) -> None:
    """Each task may see one GPU, and call it cuda:0, whether that is its own or the only one of them all."""
    machine, number = socket.gethostname(), place["local_world_size"]
    store.set(f"gpu/{machine}/{place['local_rank']}", str(torch.cuda.get_device_properties(device).uuid))
    gpus = {store.get(f"gpu/{machine}/{rank}") for rank in range(number)}  # waits for them
    if len(gpus) < number:
        raise LaunchError(f"{number} processes share {counted(len(gpus), 'GPU')} of {machine}: start at most one a GPU "
                          "(srun --gpus-per-task=1)")  # fmt: skip


def choose_interface() -> None:
    """Lets gloo meet other machines where this one reaches the main one, unless the user has said where.

    By itself gloo takes the address of the machine's name, which many a machine has for nobody but itself.
    """
    for address in (os.environ.get("MASTER_ADDR", ""), ELSEWHERE):  # on the main machine its own may be such a one
        own = address_towards(address)
        if not own.startswith("127.") and (name := interface_of(own)):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            return


def address_towards(address: str) -> str:
    """This machine's IPv4 address on the way to another one, to which nothing is sent; "" without a way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((address, 9))
        return probe.getsockname()[0]
    return ""


def interface_of(own: str) -> str:
    """The name of the network interface with that IPv4 address; "" for none, and where Linux cannot be asked."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex() if sys.platform == "linux" else []:
            with contextlib.suppress(OSError):  # one without an address
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    return ""


def _ending(error: BaseException, store: dist.Store) -> BaseException:
    """What this process ends with, instead of an error that another one has told or that only says that it has gone."""
    if not isinstance(error, Exception):  # an exit, which somebody has given the reason for
        return error
    with contextlib.suppress(RuntimeError):  # the store was the main process's, and has gone with it: better told twice
        if store.add("errors", 1) > 1:
            return SystemExit(2)
    if isinstance(error, RuntimeError) and re.search("by peer|Broken pipe|remote process", str(error)):
        return LaunchError("another process has ended without a word: was it killed, for its memory perhaps?")
    return error


def _break_off(store: dist.Store | None, world_size: int) -> None:
    """Leaves the group without the others; those who wait for this process notice."""
    with contextlib.suppress(RuntimeError):  # what has ended this process may have broken that as well
        if dist.is_initialized():
            dist.group.WORLD.abort()  # NCCL would otherwise finish what is under way, for which it takes all
            dist.destroy_process_group()
        if store:
            store.add("left", 1)
            atexit.register(_stay, store, world_size)  # once it has told why


def _stay(store: dist.Store, world_size: int) -> None:
    """Until all have left: torchrun, seeing one process end, signals to the others, and they would set out to save."""
    end = time.monotonic() + PATIENCE
    with contextlib.suppress(RuntimeError):  # the store was the main process's, and has gone with it
        while store.add("left", 0) < world_size and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.2)  # it may be this process's, and the others look once more


@contextlib.contextmanager
def one_process_first(processes: Processes) -> Iterator[None]:
    """What fills a cache is done by one process of each machine; the others wait and then find it filled.

    They wait on the CPU, whatever the device, and longer than for one another at a step.
    """
    group = dist.new_group(timeout=LONGEST_WORK, backend="gloo") if dist.is_initialized() else None
    if group and processes.local_rank > 0:
        dist.all_reduce(torch.zeros(1), group=group)
    yield
    if group and processes.local_rank == 0:
        dist.all_reduce(torch.zeros(1), group=group)


def sharing_cores(processes: Processes) -> int:
    """How many processes have the cores that this one may use: its machine's all, unless srun gave each its own."""
    together = processes.local_world_size * slurm.cores_of_task(os.environ)
    return 1 if usable_cores() < together else processes.local_world_size
