"""The command that checks a GPU, tried on a CPU: its lines, and that no check that fails stops another."""

from __future__ import annotations

import json
import sys
from unittest.mock import Mock

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("it ends process groups", allow_module_level=True)

from tools import gpu_check
from tools.gpu_check import CHECKS, Setup


@pytest.mark.slow
def test_the_command_on_a_cpu_prints_a_line_a_check(start_process, tmp_path):
    options = "--device=cpu", "--quick", "--minutes=60", "--only=tests,compile"
    process = start_process(gpu_check.__file__, *options, TMPDIR=str(tmp_path))
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == 0, printed
    tests, skipped, last = map(json.loads, printed.splitlines())
    assert (tests["check"], tests["ok"], tests["failed"]) == ("tests", True, [])
    assert len(tests["passed"]) >= 5
    assert skipped == {"check": "compile", "ok": None, "skipped": "it needs CUDA"}
    assert (last["check"], last["ok"], last["failed"], last["skipped"]) == ("all", True, [], ["compile"])
    assert not list(tmp_path.glob("gpu_check_*"))


@pytest.mark.slow
def test_every_measurement_works_on_a_cpu(tmp_path):
    setup = Setup(torch.device("cpu"), True, tmp_path)
    found = {name: check.work(setup) for name, check in CHECKS.items() if name not in ("tests", "compile")}
    assert (found["step"]["ok"], found["step"]["images_per_second"].keys()) == (True, {"float32", "smp float32"})
    assert found["loader"]["photos_per_second"].keys() == {1}
    assert found["predict"]["file_to_file"].keys() == {"cutouts", "masks"}


@pytest.mark.parametrize(("code", "limit", "found"), [
    ("open(path, 'w').write('{\"speed\": 7}')", 60, {"speed": 7}),
    ("sys.exit('bad')", 60, {"ok": False, "error": "it ended with exit code 1", "last_line": "bad"}),
    ("time.sleep(60)", 0.1, {"ok": False, "error": "it was not done after 0 s", "last_line": ""}),
])  # fmt: skip
def test_a_process_that_fails_in_whatever_way_gives_a_line(tmp_path, code, limit, found):
    command = [sys.executable, "-c", f"import sys, time; path = sys.argv[1]; {code}", str(tmp_path / "a.json")]
    assert gpu_check.run_process(command, tmp_path / "a.json", limit) == found


def test_a_failed_check_is_a_line_and_fails_the_command(monkeypatch, tmp_path, capsys):
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
    check = gpu_check.Check(Mock(side_effect=error), 5)
    monkeypatch.setattr(gpu_check, "CHECKS", {"bad": check, "long": gpu_check.Check(dict, 10_000), "good": check})
    gpu_check.run_one("bad", Setup(torch.device("cpu"), True, tmp_path))
    failure = {"ok": False, "error": "RuntimeError: CUDA error: an illegal memory access was encountered"}
    assert json.loads((tmp_path / "bad.json").read_text()) == failure
    capsys.readouterr()
    monkeypatch.setattr(gpu_check, "run_process", Mock(side_effect=[dict(failure), {"speed": 7}]))
    assert gpu_check.main(["--device=cpu"]) == 1
    bad, long, good, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert (bad["ok"], bad["error"], good["ok"], good["speed"]) == (False, failure["error"], True, 7)
    assert long["skipped"].startswith("it takes up to 10000 s, and 4")
    assert (last["ok"], last["failed"], last["skipped"]) == (False, ["bad"], ["long"])


def test_a_way_that_cannot_be_measured_spoils_no_other(tmp_path):
    found = gpu_check.compare({"bad": int, "good": lambda: lambda: 3}, Setup(torch.device("cpu"), True, tmp_path))
    assert found["images_per_second"].keys() == {"good"}
    assert found["errors"] == {"bad": "TypeError: 'int' object is not callable"}
    assert not found["ok"]


def test_an_unknown_check_is_refused_and_all_fit_into_the_time():
    with pytest.raises(gpu_check.UsageError, match="there is no check speed: there are facts, tests,"):
        gpu_check.parse(["--only=step,speed"])
    assert sum(check.seconds for check in CHECKS.values()) <= 60 * gpu_check.parse([]).minutes
