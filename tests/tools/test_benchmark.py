"""The benchmark: its ratios are those worked out by hand, every section runs, and a mistake gets one line."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torchvision

from tools import benchmark
from tools.benchmark import ROOT, TABLES, Side, alternate, smp_unet, table
from utils import UserError


def run(*arguments: object) -> int:
    return benchmark.run_command(["benchmark.py", *map(str, arguments)])


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
    assert printed.count("### ") == len(TABLES)
    assert "### A training step of resnet18 at 64, batch 8" in printed
    for _, _, sides in TABLES.values():
        for name in sides:
            assert f"\n| {name} | " in printed
    assert sorted(coco_root.rglob("*")) == before


@pytest.mark.slow
def test_a_checkout_beside_itself(coco_root, capfd):
    assert run("predict", "--quick", f"--data-root={coco_root}", "--against", ROOT) == 0
    lines = capfd.readouterr().out.splitlines()
    starts = [line.split(" | ")[0] for line in lines if line.startswith(("###", "| other", "| this"))]
    assert starts == ["### Cutting out a photo, file to RGBA: Silueta", "| other", "| this"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "there is no section speed: there are sample, loader, step, start, predict"),
        (["sample", "--rounds=0"], "--rounds 0 must be 1 or more"),
        (["sample", "--data-root=none"], "no COCO data: none/annotations/instances_val2017.json or "),
        (["sample", "--against=tests"], "tests is no checkout of this program: it holds no trainer.py"),
    ],
)
def test_a_mistake_gets_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"benchmark.py: error: {message}")
    assert error.count("\n") == 1


def test_a_checkout_that_does_not_run_is_named(tmp_path):
    message = f"^Silueta \\(predict\\) does not run in {tmp_path}: its last lines are above$"
    with contextlib.ExitStack() as stack, pytest.raises(UserError, match=message):
        benchmark.start_side("other", tmp_path, {"section": "predict", "side": "Silueta"}, stack).work()


def test_smp_unet_normalises_like_unetautoencoder():
    model = copy.deepcopy(smp_unet("resnet18", False)).eval()  # as an EMA copies it
    images = torch.rand(1, 3, 64, 64)
    normalised = torchvision.transforms.functional.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.inference_mode():
        expected = model.segmentation_head(model.decoder(model.encoder(normalised)))
        assert torch.allclose(model(images), expected, atol=1e-5)
    assert expected.shape == (1, 4, 64, 64)
