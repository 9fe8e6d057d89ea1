"""The short form of tools/bench/torture.py: trainings of the tests' own photos, killed and stopped at random."""

from __future__ import annotations

import random
import sys

import pytest
from conftest import write_split

if sys.platform != "linux":
    pytest.skip("it finds a training's processes in /proc", allow_module_level=True)

from tools.bench import torture


def test_killed_and_terminated_trainings_end_with_the_bits_of_undisturbed_ones(tmp_path, monkeypatch):
    for split, photos, first_id in (("train2017", 32, 1), ("val2017", 8, 101)):
        write_split(tmp_path / "coco", split, photos, first_id)
    settings = ("--data-root", str(tmp_path / "coco"), "--no-pretrained", "--batch-size=4", "--learning-rate=0.01")
    command = [part for part in torture.COMMAND if part not in ("--sample", "--batch-size=8")]
    monkeypatch.setattr(torture, "COMMAND", (*command, *settings))
    monkeypatch.setattr(torture, "LONGEST", dict.fromkeys(torture.LONGEST, 1.0))
    random.seed(0)
    (tmp_path / "work").mkdir()
    tally = torture.torture(tmp_path / "work", kills=3, terminations=1)
    assert not tally.broken, "\n".join([*tally.broken, *(path.read_text() for path in tmp_path.rglob("*.txt"))])
    assert dict(tally.aims) == {"write": 1, "validation": 1, "rank": 1, "termination": 1}
    assert tally.resumed == tally.saved >= 1  # a termination always saves
    assert tally.same == tally.runs
    assert set(tally.runs) == {1, 2}
