"""The short form of tools/torture.py: a few trainings, killed and terminated at random moments."""

from __future__ import annotations

import random
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("it finds a training's processes in /proc", allow_module_level=True)

from tools import torture

WRITING, VALIDATING, *_ = torture.KILLS
KINDS = [WRITING._replace(before=0.5), VALIDATING, torture.TERMINATION._replace(before=0.0, ranks=1)]


@pytest.mark.slow
def test_an_interrupted_training_ends_with_the_bits_of_an_undisturbed_one(tmp_path, monkeypatch):
    random.seed(0)
    for limit in ("SILENT_SECONDS", "ORPHAN_SECONDS"):
        monkeypatch.setattr(torture, limit, 600)  # a busy machine is slow
    results = torture.Results()
    torture.torture(tmp_path, KINDS, results, photos=(32, 8))
    assert results.interruptions.total() == len(KINDS)
    assert min(results.equal, results.resumed) >= 1  # SIGTERM always saves
    assert results.slowest > 0
