"""srun as the launcher: what SLURM tells each of its tasks, in the words in which torchrun does."""

from __future__ import annotations

import re
from collections.abc import Mapping

from utils import LaunchError

PORTS = range(10_000, 30_000)  # below those that a system hands out by itself
STEP_STRIDE = 9_973  # ports from one step of a job to the next: not to the neighbouring job's
NO_STEP = 2**32 - 16  # from here on a step's number means a batch script, or the shell of salloc


def is_launcher(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process, and others with it.

    A batch script and a shell of salloc are told the job's number of tasks as well, and nobody has started those: what
    counts is the number of the step, which srun alone tells.
    """
    several = int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    in_step = int(environ.get("SLURM_STEP_ID", NO_STEP)) < NO_STEP
    return several and in_step and "SLURM_PROCID" in environ and "TORCHELASTIC_RUN_ID" not in environ


def place(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables by which torchrun would give this process its place; none where srun is not its launcher.

    An address or a port that the user has chosen stays.

    Raises:
        LaunchError: SLURM does not tell enough, as in a container that keeps its variables out.
    """
    if "RANK" in environ or not is_launcher(environ):
        return {}
    try:
        tasks = tasks_of_nodes(environ["SLURM_STEP_TASKS_PER_NODE"])
        port = int(environ["SLURM_JOB_ID"]) + STEP_STRIDE * int(environ["SLURM_STEP_ID"])
        return {
            "RANK": environ["SLURM_PROCID"],
            "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environ["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(tasks[int(environ["SLURM_NODEID"])]),
            "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": environ.get("MASTER_PORT") or str(PORTS[port % len(PORTS)]),
        }
    except KeyError as missing:
        number, name = environ["SLURM_STEP_NUM_TASKS"], missing.args[0]
        raise LaunchError(f"srun has started {number} processes, and {name} is not set: let SLURM's variables through "
                          "(a container may keep them out), or start one task: srun --ntasks=1") from None  # fmt: skip


def tasks_of_nodes(text: str) -> list[int]:
    """[4, 4, 3] for "4(x2),3"."""
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in groups for _ in range(int(nodes or 1))]


def first_host(nodes: str) -> str:
    """node01 for "node[01-04,07],gpu3": the first task's, as srun distributes them."""
    first = re.match(r"(?:[^,[]|\[[^]]*\])*", nodes)[0]
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first)


def sees_its_own_gpus(environ: Mapping[str, str], gpus: int, processes: int) -> bool:
    """Whether each of a machine's processes sees GPUs of its own, from cuda:0 on, as with srun --gpus-per-task=1."""
    return is_launcher(environ) and gpus < processes


def cores_of_task(environ: Mapping[str, str]) -> int:
    """That srun --cpus-per-task has given each task; 0 where it has not."""
    return int(environ.get("SLURM_CPUS_PER_TASK", 0)) if is_launcher(environ) else 0
