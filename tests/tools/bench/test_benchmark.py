"""The benchmarks' command line: a mistake gets one line and exit code 2 before anything is measured for long."""

from __future__ import annotations

import pytest

from tools.bench import benchmark


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["speed"], "there is no section speed: there are sample, loader,"),
        (["sample", "--round=3"], "unknown argument --round=3: did you mean --rounds?"),
        (["sample", "--rounds=0"], "--rounds 0 is out of range: at least 1"),
        (["accuracy", "--encoder-weights=none.pth"], "--encoder-weights: there is no file none.pth"),
        (["sample", "--data-root=none"], "no COCO data: none/annotations/instances_val2017.json is missing."),
        (["predict", "--checkpoint=none.pth"], "there is no checkpoint none.pth"),
    ],
)
def test_a_mistake_gets_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert benchmark.run_command(["benchmark.py", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"benchmark.py: error: {said}")
    assert error.count("\n") == 1


def test_samples_are_measured(coco_root, capsys, monkeypatch):
    assert benchmark.run_command(["benchmark.py", "sample", f"--data-root={coco_root}", "--rounds=1"]) == 0
    table = capsys.readouterr().out
    for way in ("tutorial", "torchvision", "Silueta", "Silueta --cache", "JPEG decode alone"):
        assert f"| {way} |" in table
