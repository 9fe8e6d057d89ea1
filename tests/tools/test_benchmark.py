"""The benchmark: its ratios are those worked out by hand, every section runs, and a mistake gets one line."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision

from tools import benchmark
from tools.benchmark import ROOT, TABLES, Side, alternate, smp_unet, table


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


@pytest.mark.slow
def test_every_section_prints_its_table_and_the_data_stay_as_they_are(coco_root, capfd):
    before = sorted(coco_root.rglob("*"))
    assert run("--quick", f"--data-root={coco_root}", "--encoder=resnet18") == 0
    printed = capfd.readouterr().out
    assert printed.count("### ") == len(TABLES)
    assert "### A training step of resnet18 at 64, batch 8" in printed
    for _, _, sides in TABLES.values():
        for name in sides:
            assert f"\n| {name} | " in printed
    assert sorted(coco_root.rglob("*")) == before


@pytest.mark.slow
def test_a_checkout_beside_itself(coco_root, capfd):
    assert run("start", "--quick", f"--data-root={coco_root}", "--against", ROOT) == 0
    lines = capfd.readouterr().out.splitlines()
    title = "### Opening the annotations of val2017: Silueta"
    starts = [line.split(" | ")[0] for line in lines if line.startswith(("###", "| other", "| this"))]
    assert starts == [f"{title}, first start", "| other", "| this", f"{title}, later starts", "| other", "| this"]


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


@pytest.mark.slow
def test_a_checkout_that_does_not_run_is_named(coco_root, tmp_path, capsys):
    (tmp_path / "trainer.py").touch()
    assert run("predict", "--quick", f"--data-root={coco_root}", "--against", tmp_path) == 2
    message = f"benchmark.py: error: Silueta (predict) does not run in {tmp_path}: its last lines are above\n"
    assert capsys.readouterr().err == message


def test_smp_unet_normalises_like_unetautoencoder():
    model = copy.deepcopy(smp_unet("resnet18", False)).eval()  # as an EMA copies it
    images = torch.rand(1, 3, 64, 64)
    normalised = torchvision.transforms.functional.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.inference_mode():
        expected = model.segmentation_head(model.decoder(model.encoder(normalised)))
        assert torch.allclose(model(images), expected, atol=1e-5)
    assert expected.shape == (1, 4, 64, 64)
