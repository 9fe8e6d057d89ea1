"""Who started this process: torchrun's and SLURM's variables, written down by hand."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from training import launching
from training.launching import slurm_env, spread_command, visible_gpus
from utils import LOCAL_RANK_GPU, LaunchError


def test_launchers_have_different_names_that_can_be_handed_on(monkeypatch):
    names = {launching.launcher(), launching.launcher()}
    monkeypatch.setattr(os, "getppid", os.getpid)
    names.add(launching.launcher())
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "1 (a) S" + " 9" * 20)  # a later process of that number
    names.add(launching.launcher())
    assert len(names) == 3
    monkeypatch.setenv(launching.LAUNCHER, "another")
    assert launching.launcher() == "another"


def test_a_driver_that_is_too_old_is_an_error_without_its_source_location(monkeypatch, recwarn):
    warning = "CUDA initialization: The driver is too old (version 11040). (Triggered internally at /c10/a.cpp:119.)"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: warnings.warn(warning, stacklevel=1) or 0)
    with pytest.raises(LaunchError, match=r": The driver is too old \(version 11040\) \(--device cpu does without\)$"):
        visible_gpus("cuda:0")
    assert not recwarn


@pytest.mark.parametrize("named", ["7", "GPU-01234567", "", "-1", "NoDevFiles"])
def test_visible_devices_that_do_not_exist_are_refused_unless_they_choose_the_cpu(named, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    refused = pytest.raises(LaunchError, match=f"^CUDA_VISIBLE_DEVICES is {named}, and no such GPU exists.*without$")
    with nullcontext() if named in ("", "-1", "NoDevFiles") else refused:
        assert visible_gpus(LOCAL_RANK_GPU) == 0
    assert visible_gpus("cpu") == 0


ARGV = ["code/trainer.py", "--nproc-per-node=1", "--seed", "8"]  # the script's arguments are not the launcher's
BARE = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "1"}


def spread(*options: str, gpus: int = 4, **environ: str) -> list[str] | None:
    return spread_command(BARE | environ, ["python", "bin/torchrun", *options, *ARGV, ""], gpus, ARGV)


@pytest.mark.parametrize("options", ["", "--standalone", "--nnodes 1", "--no-python", "--max-restarts=3"])
def test_a_bare_torchrun_is_launched_anew_for_every_gpu(options):
    command = spread(*options.split(), gpus=2)
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    launch = get_args_parser().parse_args(command[3:])  # as torchrun itself reads it
    assert (launch.standalone, launch.nproc_per_node) == (True, "2")
    assert [launch.training_script, *launch.training_script_args] == ARGV


@pytest.mark.parametrize("option", ["--nproc-per-node 1", "--nproc_per_node=1", "--standalone --nproc_p=1"])
def test_a_number_of_processes_that_the_user_gave_is_kept(option):
    assert get_args_parser().parse_args([*option.split(), *ARGV]).nproc_per_node == "1"
    assert spread(*option.split()) is None
    assert spread("--nnodes=2", *option.split(), WORLD_SIZE="2") is None
    assert spread(PET_NPROC_PER_NODE="1") is None


def test_nothing_is_launched_anew_without_several_gpus_for_one_process_of_torchrun():
    assert spread(gpus=1) is None
    assert spread(LOCAL_WORLD_SIZE="4", WORLD_SIZE="4") is None
    assert spread_command({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, ["srun", *ARGV], 4, ARGV) is None
    with pytest.raises(LaunchError, match="3 of the 4 GPUs here would stay idle: add --nproc-per-node=gpu"):
        spread("--nnodes=2", WORLD_SIZE="2")


# Task 5 of 7 on the second of two machines: srun --nodes=2 --ntasks=7
STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
}  # fmt: skip


def test_a_task_of_srun_gets_torchruns_variables():
    expected = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3",
                "MASTER_ADDR": "node07", "MASTER_PORT": "14711"}  # fmt: skip
    assert slurm_env(STEP) == expected
    chosen = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert slurm_env(STEP | chosen) == expected | chosen


@pytest.mark.parametrize(
    "environ",
    [{name: value for name, value in STEP.items() if "STEP" not in name},  # a batch script
     STEP | {"SLURM_STEP_ID": "4294967290"},  # an salloc shell that is started as a step; older batch scripts have 91
     STEP | {"SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash, or srun --ntasks=1, in a job of seven
     STEP | {"RANK": "0"}, STEP | {"TORCHELASTIC_RUN_ID": "none"}],  # srun torchrun
)  # fmt: skip
def test_a_process_that_srun_did_not_start_with_others_gets_no_variables(environ):
    assert slurm_env(environ) == {}


def test_neighbouring_jobs_and_steps_have_different_ports():
    steps = [{"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": step} for job in range(19_000, 21_000) for step in "01"]
    ports = {int(slurm_env(STEP | step)["MASTER_PORT"]) for step in steps}
    assert len(ports) == len(ports & {*range(10_000, 30_000)}) == 4000


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_NODEID"])
def test_a_missing_variable_of_slurm_is_named(name):
    with pytest.raises(LaunchError, match=f"7 processes, and {name} is not set.*--ntasks=1$"):
        slurm_env({key: value for key, value in STEP.items() if key != name})


def test_lists_of_slurm_are_expanded():
    assert launching.tasks_per_node("16,8(x2),1") == [16, 8, 8, 1]
    nodes = "gpu3,gpu4 node[01-04,07] node[12,15],gpu1 a-b[7-9].local rack[2-3]n[005,007] login,node[1-2]"
    first = ["gpu3", "node01", "node12", "a-b7.local", "rack2n005", "login"]
    assert [launching.first_host(text) for text in nodes.split()] == first
