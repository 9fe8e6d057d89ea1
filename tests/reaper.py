"""Kills all processes with a variable in their environment at a line on stdin, or when stdin ends, as a killed test's.

    python tests/reaper.py NAME=VALUE
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path


def pids_with(variable: str) -> list[int]:
    """Returns the processes that have inherited a variable, written NAME=VALUE."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or one that has just ended
            if variable.encode() in path.read_bytes().split(b"\0"):
                pids.append(int(path.parent.name))
    return pids


if __name__ == "__main__":
    sys.stdin.readline()
    while pids := pids_with(sys.argv[1]):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
