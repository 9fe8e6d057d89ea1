"""A version beside itself: sections run and give their ratios, and nothing is written into the user's data."""

from __future__ import annotations

import pytest
from conftest import write_split

from tools.bench import versions


def test_this_checkout_beside_itself(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(versions, "TRAINING", [*versions.TRAINING, "--image-size=32"])
    root = tmp_path / "coco"
    write_split(root, "val2017", 6, first_id=1)
    before = sorted(root.rglob("*"))
    command = ["versions.py", str(versions.HERE), "cached", "training", f"--data-root={root}", "--rounds=1"]
    assert versions.run_command(command) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("###")] == [
        "### The same with the cache",
        "### trainer.py: mobilenet_v2 at 256, batch 8, one thread",
    ]
    assert sum(line.startswith("| other |") for line in lines) == 2
    assert sum(line.startswith("| this |") and " to " in line for line in lines) == 2
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: OTHER_CHECKOUT, SECTION"),
        (["EMPTY"], "EMPTY is no checkout of this program: it holds no trainer.py"),
        (["HERE", "speed"], "there is no section speed: there are sample, cached, loader, start, step, training"),
        (["HERE", "--rounds=0"], "--rounds 0 is out of range: at least 1"),
        (["HERE", "step", "--data-root=nowhere"], "no COCO data: "),
        (["OLD", "step", "--data-root=coco"], "step does not run in OLD: its last lines are above"),
    ],
)
def test_a_mistake_gets_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "OLD").mkdir()
    (tmp_path / "OLD" / "trainer.py").touch()
    write_split(tmp_path / "coco", "val2017", 2, first_id=1)
    names = {"HERE": str(versions.HERE), "OLD": str(tmp_path / "OLD")}
    assert versions.run_command(["versions.py", *(names.get(argument, argument) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"versions.py: error: {said.replace('OLD', names['OLD'])}")
    assert error.count("\n") == 1
