"""The benchmark: its ratios are those worked out by hand, every section runs, and a mistake gets one line."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers import ROOT, mistake

from tools import benchmark
from tools.benchmark import TABLES, Side, alternate, table
from utils import UserError


def test_ratios_are_those_of_the_medians_with_the_range_over_the_rounds():
    reference, side = Side("old", int, [2.0, 4.0, 3.0]), Side("new", int, [0.5, 1.0, 3.0])
    lines = table("Title", "photo", [reference, side]).splitlines()
    assert lines[0] == "### Title"
    assert lines[-2] == "| old | 3 s | **1.00** (1.00 to 1.00) |"
    assert lines[-1] == "| new | 1 s | **3.00** (1.00 to 4.00) |"  # 3 / 1; 3 / 3 and 4 / 1 or 2 / 0.5


def test_sides_alternate_and_their_first_round_is_not_counted(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def two_units() -> int:
        order.append("a")
        clock[0] += len(order)  # 1 s in the first round, then 3 and 5
        return 2

    a, b = Side("a", two_units), Side("b", lambda: order.append("b") or 0.25)  # b measures its time itself
    alternate([a, b], rounds=2)
    assert order == ["a", "b"] * 3
    assert (a.seconds, b.seconds) == ([3 / 2, 5 / 2], [0.25, 0.25])
    assert f"torch {torch.__version__.split('+')[0]}" in benchmark.machine()


# Without a process for each side, all of which import PyTorch, and without the rounds that only warm up.
IN_ONE_PROCESS = """
import argparse, sys
from tools import benchmark
def start_side(name, checkout, job, stack):
    work = benchmark.TABLES[job["section"]][2][job["side"]](argparse.Namespace(**job))
    side = benchmark.Side(name, lambda: work(0))
    side.seconds.append(benchmark.seconds_per_unit(side.work))
    return side
benchmark.start_side, benchmark.alternate = start_side, lambda sides, rounds: None
sys.exit(benchmark.run_command(sys.argv))
"""


@pytest.mark.slow
def test_every_section_prints_its_table_and_the_data_stay_as_they_are(coco_root, start_process):
    before = sorted(coco_root.rglob("*"))
    process = start_process("-c", IN_ONE_PROCESS, "--quick", f"--data-root={coco_root}", "--encoder=resnet18")
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == 0, printed
    assert "### A training step of resnet18 at 64, batch 8" in printed
    assert printed.count("\n| ") == sum(2 + len(sides) for *_, sides in TABLES.values())  # of heads and of sides
    assert sorted(coco_root.rglob("*")) == before


@pytest.mark.slow
def test_a_checkout_beside_itself(coco_root, capfd):
    arguments = "predict", "--quick", f"--data-root={coco_root}", f"--against={ROOT}"
    assert benchmark.run_command(["benchmark.py", *arguments]) == 0
    lines = capfd.readouterr().out.splitlines()
    starts = [line.split(" | ")[0] for line in lines if line.startswith(("###", "| other", "| this"))]
    assert starts == ["### Cutting out a photo, file to RGBA: Silueta", "| other", "| this"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["speed"], "there is no section speed: there are sample, loader, step, start, predict"),
    (["sample", "--rounds=0"], "--rounds 0 must be 1 or more"),
    (["sample", "--data-root=none"], "no COCO data: none/annotations/instances_val2017.json or "),
    (["sample", f"--against={ROOT}/tests"], f"{ROOT}/tests is no checkout of this program: it holds no trainer.py"),
])  # fmt: skip
def test_a_mistake_gets_one_line(capsys, arguments, message):
    assert mistake(capsys, benchmark, *arguments).startswith(message)


def test_a_checkout_that_does_not_run_is_named(tmp_path):
    message = f"^Silueta \\(predict\\) does not run in {tmp_path}: its last lines are above$"
    with contextlib.ExitStack() as stack, pytest.raises(UserError, match=message):
        benchmark.start_side("other", tmp_path, {"section": "predict", "side": "Silueta"}, stack).work()
