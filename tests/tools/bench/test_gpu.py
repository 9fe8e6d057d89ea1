"""The command that checks a GPU, where there is none: what it promises of its lines, and that it sees what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_trainer import Tiny

if sys.platform != "linux":
    pytest.skip("each check is forked", allow_module_level=True)

import trainer
from tools.bench import gpu, gpu_checks, gpu_figures
from tools.bench.gpu import Check
from tools.bench.gpu_checks import Place
from training.step import FiniteGuard

ROOT = Path(__file__).resolve().parents[3]
# A process that has asked CUDA anything has no child that can use it.
COMMAND = """
import os, sys, torch
here = os.getpid()
def refuse(*_):
    assert os.getpid() != here, "the parent has touched CUDA"
    return 0
torch._C._cuda_getDeviceCount = torch._C._cuda_init = refuse
from tools.bench import gpu
sys.exit(gpu.run_command(["gpu.py", "--device=cpu", "--quick"]))
"""


def test_the_whole_command_on_a_cpu(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", COMMAND], cwd=ROOT, env=environment, capture_output=True, text=True)
    *lines, last = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["check"] for line in lines] == [*gpu.CHECKS]
    assert {line["check"] for line in lines if "skipped" in line} == {"memory", "waits", "compiled"}
    assert all(line["ok"] for line in lines if "skipped" not in line)
    found = {line["check"]: line for line in lines}
    assert found["portable"]["tensors_on"] == {"best_model.pth": ["cpu"], "last.pth": ["cpu"]}
    assert found["resume"]["stopped_at"] == [1, 2]
    assert found["two_ranks"]["skipped_steps"] == [[1], [1]]
    assert found["step"]["images_per_second"].keys() == {"fp32", "smp fp32"}
    assert (last["ok"], last["checks"], last["failed"]) == (True, 15, [])
    assert not list(tmp_path.glob("gpu_*"))


def fails(_: Place) -> dict:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")


CHECKS = {
    "facts": Check(lambda _: {"device": "none"}, 5),
    "drawings": Check(lambda _: {"ok": True}, 5),
    "raises": Check(fails, 5),
    "exits": Check(lambda _: sys.exit(3), 5),
    "dies": Check(lambda _: os.kill(os.getpid(), signal.SIGKILL), 5),
    "hangs": Check(lambda _: time.sleep(60), 0.1),
    "waits": Check(lambda _: {"ok": True}, 5, needs_cuda=True),
    "wrong": Check(lambda _: {"ok": False, "iou": 0.1}, 5),
    "long": Check(lambda _: {"ok": True}, 1000),
    "good": Check(lambda _: {"speed": 7}, 5),
}


def test_a_check_that_fails_in_whatever_way_stops_no_other(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "CHECKS", CHECKS)
    assert gpu.run_command(["gpu.py", "--device=cpu"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {line["check"]: {k: v for k, v in line.items() if k not in ("check", "took")} for line in lines}
    assert found["facts"] == {"ok": True, "device": "none"}
    error = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert found["raises"] == {"ok": False, "error": error}
    assert found["exits"] == {"ok": False, "error": "SystemExit: 3"}
    assert found["dies"] == {"ok": False, "error": "it ended with exit code -9", "last_line": ""}
    assert found["hangs"] == {"ok": False, "error": "it was not done after 0 s", "last_line": ""}
    assert found["waits"] == {"ok": None, "skipped": "it needs CUDA"}
    assert found["wrong"] == {"ok": False, "iou": 0.1}
    assert found["long"]["ok"] is None
    assert found["long"]["skipped"].startswith("it takes up to 1000 s, and 4")
    assert found["good"] == {"ok": True, "speed": 7}
    failed, skipped = ["raises", "exits", "dies", "hangs", "wrong"], ["waits", "long"]
    assert found["all"] == {"ok": False, "checks": 10, "failed": failed, "skipped": skipped}


def test_only_some_and_what_all_need(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "CHECKS", CHECKS)
    assert gpu.run_command(["gpu.py", "--device=cpu", "--only=good"]) == 0
    names = [json.loads(line)["check"] for line in capsys.readouterr().out.splitlines()]
    assert names == ["facts", "drawings", "good", "all"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only=step,speed"], "there is no check speed: there are facts, drawings,"),
        (["--minutes=0"], "--minutes 0 is out of range: above 0, up to 1440"),
        (["--device=mps"], "argument --device: invalid choice: 'mps'"),
        (["--minute=3"], "unknown argument --minute=3: did you mean --minutes?"),
    ],
)
def test_a_mistake_gets_one_line(capsys, arguments, said):
    assert gpu.run_command(["gpu.py", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gpu.py: error: {said}")
    assert error.count("\n") == 1


def test_a_trainer_that_takes_broken_steps_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "UNetAutoencoder", Tiny)
    monkeypatch.setattr(FiniteGuard, "step", lambda self, optimizer, scaler, norm: scaler.step(optimizer))
    found = gpu_checks.broken(Place(False, True, tmp_path))
    assert not found["ok"]
    assert not any(found["fp32"].values())


def test_a_file_that_names_a_gpu_is_seen(tmp_path, monkeypatch):
    (tmp_path / "sample_cpu").mkdir()
    content = {"model": {"a": torch.zeros(2)}, "states": [{"b": torch.zeros(1, device="meta")}]}
    monkeypatch.setattr(torch, "load", lambda *_, **__: content)
    found = gpu_checks.portable(Place(False, True, tmp_path))
    assert found == {"ok": False, "tensors_on": {"best_model.pth": ["cpu", "meta"], "last.pth": ["cpu", "meta"]}}


class Event:
    """CUDA's, at a time in milliseconds."""

    def __init__(self, time: float):
        self.time = time

    def elapsed_time(self, end: Event) -> float:
        return end.time - self.time


def test_a_gpu_is_idle_between_two_steps_and_before_the_first():
    marks = [("end", 0), ("begin", 30), ("end", 50), ("begin", 60), ("end", 100)]
    assert gpu_figures.idle_share([(kind, Event(time)) for kind, time in marks]) == 0.4


def test_a_way_that_cannot_be_measured_spoils_no_other(tmp_path):
    found = gpu_figures.compared({"bad": lambda: fails(None), "good": lambda: lambda: 3}, Place(False, True, tmp_path))
    assert found["images_per_second"].keys() == {"good"}
    assert found["errors"]["bad"].startswith("RuntimeError: CUDA error: an illegal")
    assert not found["ok"]


def test_what_the_checks_usually_take_is_what_there_is_time_for():
    assert sum(check.seconds for check in gpu.CHECKS.values()) <= 60 * gpu.parse([]).minutes
