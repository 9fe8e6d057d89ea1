"""A training in a terminal of its own: what it prints there tells what it is at, and when to interrupt it. On Linux."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import random
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARK = "WATCHED_TRAINING"  # a variable that every process of a training inherits: its value is the run's folder
PATIENCE = 120.0  # seconds: a run that is silent for so long hangs
Place = tuple[int, int]  # whole epochs, and steps of the one that has begun


class Training:
    """Starts one, with `--resume`, in its folder; an error within its `with` block ends all of its processes.

    Args:
        folder: of its checkpoints.
        processes: more than one are started by torchrun.
        command: what Python runs, with its settings.
    """

    def __init__(self, folder: Path, processes: int, command: tuple[str, ...]):
        self.folder, self.out, self._started = folder, "", time.time()
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
        start = [sys.executable, *(launcher if processes > 1 else ()), *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: str(folder)}
        self._terminal, inside = pty.openpty()  # in one the run shows its progress bar
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # without a width it shows none
        self.process = subprocess.Popen(
            [*start, f"--checkpoint-dir={folder}", "--resume"],
            cwd=ROOT, env=environment, stdin=inside, stdout=inside, stderr=inside,
        )  # fmt: skip
        os.close(inside)

    def __enter__(self) -> Training:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        while error and (living := processes_of(self.folder)):  # else nobody's help: loader workers end by themselves
            self.kill_one_of(living)
            self.process.poll()
        os.close(self._terminal)

    def kill_one_of(self, pids: list[int]) -> None:
        """Kills one of these processes, at random."""
        with contextlib.suppress(IndexError, ProcessLookupError):  # they have just ended
            os.kill(random.choice(pids), signal.SIGKILL)

    def wait(self, until: Callable[[], bool], seconds: float | None = None) -> bool:
        """Reads along until something is so. Returns whether it came to that before the run or the time ended.

        Without a time it waits for as long as the run goes on to print something: a busy machine may be slow.
        """
        end = time.monotonic() + (seconds or PATIENCE)
        while not until():
            ended = self.process.poll() is not None
            if self._read() and seconds is None:
                end = time.monotonic() + PATIENCE
            if ended or time.monotonic() > end:
                return until()
        return True

    def _read(self) -> bool:
        """What is there, or comes within a moment: an unread terminal would halt the run. Returns whether any was."""
        before = len(self.out)
        with contextlib.suppress(OSError):  # all others have closed it
            while select.select([self._terminal], [], [], 0.002)[0]:
                self.out += os.read(self._terminal, 65536).decode(errors="replace")
        return len(self.out) > before

    def keeps_on(self, seconds: float) -> bool:
        """Reads along for so long. Returns whether the run has not ended."""
        self.wait(lambda: False, max(seconds, 1e-9))
        return self.process.poll() is None

    def ended(self) -> bool:
        return self.process.poll() is not None

    def begun(self) -> bool:
        """Whether it has begun to train."""
        return "\repoch " in self.out

    def validating(self) -> bool:
        """Whether its progress bar is that of the validation."""
        return self.out.rpartition("\r")[2].startswith("validation ")

    def writing(self) -> bool:
        """Whether a file is being written, or was when the run was killed."""
        for path in self.folder.glob(".*.part"):
            with contextlib.suppress(FileNotFoundError):  # it has just been renamed
                if path.stat().st_mtime >= self._started:  # not left behind by a kill
                    return True
        return False

    def resumed_at(self) -> Place | None:
        found = re.search(r"going on from .*?, after epoch (\d+)(?:, step (\d+))?", self.out)
        return (int(found[1]), int(found[2] or 0)) if found else None

    def saved_at(self) -> Place | None:
        """Where it says that it was stopped and saved."""
        found = re.search(r"stopped by SIG\w+ after epoch (\d+), step (\d+): --resume goes on from there", self.out)
        return (int(found[1]), int(found[2])) if found else None

    def ranks(self) -> list[int]:
        """The processes that torchrun started, without their loader workers."""
        return [pid for pid in processes_of(self.folder) if parent_of(pid) == self.process.pid]


def processes_of(folder: Path) -> list[int]:
    """All that live of a training, whoever their parent is by now."""
    pids, mark = [], f"{MARK}={folder}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or gone
            if mark in path.read_bytes().split(b"\0"):
                pids.append(int(path.parent.name))
    return pids


def parent_of(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None
