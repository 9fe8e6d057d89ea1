"""The short form of tools/torture.py: a few trainings, killed and terminated at random moments."""

from __future__ import annotations

import random
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("it finds a training's processes in /proc", allow_module_level=True)

from tools import torture


@pytest.mark.slow
def test_interrupted_trainings_end_with_the_bits_of_undisturbed_ones(tmp_path):
    random.seed(0)
    kinds = [kind._replace(before=1.0) for kind in (*torture.KILLS[:3], torture.TERMINATION)]
    results = torture.Results()
    try:
        torture.torture(tmp_path, kinds, results, photos=(64, 16))
    except torture.BrokenPromiseError as error:
        outputs = [path.read_text() for path in tmp_path.glob("*.txt")]
        pytest.fail("\n".join([str(error), *outputs]))
    assert results.interruptions.total() == 4
    assert results.resumed >= 1  # SIGTERM always saves
    assert results.equal >= 2  # of one process, and of two
