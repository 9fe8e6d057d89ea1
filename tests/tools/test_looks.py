"""The table of what the second look, specks and borders are worth: each row changes what it says, and nothing else."""

from __future__ import annotations

from unittest.mock import Mock

import numpy as np
import pytest

from cutting import cutter as cutters
from cutting import persons
from cutting.cutter import load
from tools import looks

CONSTANTS = [(cutters, "SMALL_PERSONS"), (persons, "SURE"), (persons, "SMALL_SPECK"), (persons, "GOES_ON")]


def test_the_table_measures_each_row_and_leaves_no_change_behind(coco_root, small_checkpoint, monkeypatch, capsys):
    before, measured = [getattr(*constant) for constant in CONSTANTS], []

    def measure(cutter: cutters.Cutter, *_: object) -> list[float]:
        continues = cutters.continue_to_borders is persons.continue_to_borders
        measured.append((cutter.second_size, continues, *(getattr(*constant) for constant in CONSTANTS)))
        return [0.25] * 9

    monkeypatch.chdir(coco_root.parent)
    monkeypatch.setattr(looks, "measure", measure)
    looks.main([str(small_checkpoint), "--data-root", "coco"])
    lines = capsys.readouterr().out.splitlines()
    chosen = dict(zip([line.split(" | ")[0][2:] for line in lines if "0.250" in line], measured, strict=True))
    assert chosen["as it is"] == (160, True, *before) == chosen["specks stay"]
    assert chosen["as it was: one look, specks and borders stay"] == (None, False, *before)
    assert chosen["second look 2 times as large"] == (128, True, *before)
    assert chosen["sure from 0.95"] == (160, True, before[0], 0.95, *before[2:])
    assert [getattr(*constant) for constant in CONSTANTS] == before
    assert {line.count("|") for line in lines if line.startswith("|")} == {11}


def test_what_was_computed_is_read_again(tmp_path):
    squares = [np.full((8, 8, 3), value, np.uint8) for value in (1, 2, 1)]
    compute = Mock(side_effect=lambda some: np.stack([square[..., 0] / 8 for square in some]))
    for _ in range(2):
        found = looks.read_or_compute(compute, tmp_path, squares)
        np.testing.assert_array_equal(found, [square[..., 0] / 8 for square in squares])
    assert compute.call_count == 2


def test_a_fade_is_what_alpha_lacks_at_the_borders_that_persons_touch(small_checkpoint, stub, monkeypatch):
    stub(lambda red: (red > 0.5) * 0.95)
    cutter = load(small_checkpoint, "cpu")
    cutter.second_size = None
    monkeypatch.setattr(cutters, "continue_to_borders", lambda probabilities, *_: probabilities)
    rgba = np.zeros((64, 128, 4), np.uint8)
    rgba[30:, 20:60] = 255  # touches the lower border alone, beside a bar
    assert [*looks.fades(cutter, rgba)] == [(True, pytest.approx(0, abs=0.01))]
    rgba[58:, 20:60, :3] = 0  # the network finds what is bright
    assert [*looks.fades(cutter, rgba)] == [(True, pytest.approx(0.95, abs=0.06))]
    assert [*looks.fades(cutter, np.zeros_like(rgba))] == []
