"""How this process was started: by torchrun, which may have to start one for every GPU, or by SLURM's srun."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from utils import LOCAL_RANK_GPU, LaunchError

LAUNCHER = "SILUETA_LAUNCHER"  # environment variable: the launcher's name, where another process came in between
PORTS = range(10_000, 30_000)  # for MASTER_PORT under srun: below the ports that systems assign by themselves
NO_STEP = 2**32 - 16  # step numbers from here on are a batch script or an salloc shell


def launcher() -> str:
    """Returns a name of the process that started this one; with its start time, as process numbers come again."""
    parent, started = os.getppid(), ""
    with contextlib.suppress(OSError):  # not on Linux
        started = Path(f"/proc/{parent}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    return os.environ.get(LAUNCHER) or f"{socket.gethostname()} {parent} {started}"


def visible_gpus(device_setting: str) -> int:
    """Returns the number of CUDA GPUs that this process sees; 0, without looking, if the setting is another device."""
    if not device_setting.startswith("cuda"):
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gpus = torch.cuda.device_count()
    if gpus:
        return gpus
    for message in (first_line(warning.message) for warning in caught):
        if message.startswith("CUDA initialization"):
            raise LaunchError(f"the GPU cannot be used: {message} (--device cpu does without)")
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if not re.match(r"-1|NoDevFiles|$", named):  # these choose the CPU; NoDevFiles is SLURM's
        raise LaunchError(f"CUDA_VISIBLE_DEVICES is {named}, and no such GPU exists: nvidia-smi -L lists the GPUs; "
                          "--device cpu does without")  # fmt: skip
    return 0


def first_line(error: Exception | str) -> str:
    """Returns PyTorch's message without its source location and the advice that CUDA appends to every error."""
    return str(error).partition("\n")[0].partition(" (Triggered")[0].rstrip(".")


def spread_over_gpus(argv: list[str], device_setting: str) -> None:
    """Replaces the only process of a bare `torchrun trainer.py` by a launch of one process for each visible GPU."""
    if device_setting not in (LOCAL_RANK_GPU, "cuda"):  # a single device
        return
    try:
        parent_argv = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
    except OSError:  # not on Linux, where there are hardly several GPUs
        return
    command = spread_command(os.environ, parent_argv, visible_gpus(device_setting), argv)
    if command:
        of_torchrun = r"TORCHELASTIC_|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$|ROLE_NAME$|MASTER_(ADDR|PORT)$"
        environ = {name: value for name, value in os.environ.items() if not re.match(of_torchrun, name)}
        os.execve(command[0], command, environ | {LAUNCHER: launcher()})


def spread_command(environ: Mapping[str, str], parent_argv: list[str], gpus: int, argv: list[str]) -> list[str] | None:
    """Returns the command that starts argv once for each GPU, or None if torchrun did what its user asked for."""
    names, script = [os.path.basename(argument) for argument in parent_argv], os.path.basename(argv[0])
    options = names[: names.index(script)] if script in names else names
    nproc_given = "PET_NPROC_PER_NODE" in environ or any(option.startswith("--np") for option in options)
    alone = "TORCHELASTIC_RUN_ID" in environ and environ.get("LOCAL_WORLD_SIZE") == "1"
    if not alone or nproc_given or gpus < 2:
        return None
    if environ.get("WORLD_SIZE") != "1":  # on several machines the new launches would have to find one another
        raise LaunchError(f"{gpus - 1} of the {gpus} GPUs here would stay idle: add --nproc-per-node=gpu on each "
                          "machine (or --nproc-per-node=1 if you mean one process)")  # fmt: skip
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", *argv]


def is_slurm_task(environ: Mapping[str, str]) -> bool:
    """Returns whether srun started this process together with others."""
    several = int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1  # also in a batch script and an salloc shell
    in_step = int(environ.get("SLURM_STEP_ID", NO_STEP)) < NO_STEP
    return several and in_step and "SLURM_PROCID" in environ and "TORCHELASTIC_RUN_ID" not in environ


def slurm_env(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns torchrun's environment variables for a task of srun, or none if srun did not start this process."""
    if "RANK" in environ or not is_slurm_task(environ):
        return {}
    try:
        tasks = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
        port = int(environ["SLURM_JOB_ID"]) + 9_973 * int(environ["SLURM_STEP_ID"])  # apart from other jobs' steps
        return {
            "RANK": environ["SLURM_PROCID"],
            "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environ["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(tasks[int(environ["SLURM_NODEID"])]),
            "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": environ.get("MASTER_PORT") or str(PORTS[port % len(PORTS)]),
        }
    except KeyError as error:
        raise LaunchError(
            f"srun has started {environ['SLURM_STEP_NUM_TASKS']} processes, and {error.args[0]} is not set: let "
            "SLURM's variables through (a container may keep them out), or start one task: srun --ntasks=1"
        ) from None


def tasks_per_node(text: str) -> list[int]:
    """Returns [4, 4, 3] for "4(x2),3"."""
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in groups for _ in range(int(nodes or 1))]


def first_host(nodes: str) -> str:
    """Returns node01 for "node[01-04,07],gpu3": the machine of rank 0, as srun numbers its tasks."""
    first = re.findall(r"(?:[^,[]|\[[^]]*\])*", nodes)[0]
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first)
