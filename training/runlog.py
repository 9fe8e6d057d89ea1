"""run.log: every line that the console showed of a run, kept in the run's folder. It ends no training.

It imports nothing of the project: the console's lines begin before anything else does.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TextIO


class Log:
    """Lines on their way to a file; until it is known they are kept."""

    def __init__(self):
        self._kept: list[str] | None = []  # None once there is nothing more to wait for
        self._file: int | None = None
        self._sign = ""

    def open(self, path: Path, rank: int) -> None:
        """Appends to this file from now on, and what was kept before. A process that is not the main one signs."""
        try:
            # Whatever several processes append stays whole, line by line, and nothing waits in a buffer for a crash.
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            if rank == 0:  # another machine may have no such folder
                print(f"{path} cannot be written: {error.strerror}: the training goes on without it", flush=True)
        lines, self._kept, self._sign = self._kept or [], None, f"[rank {rank}] " if rank else ""
        if rank == 0:
            self.add(f"--- {datetime.now().astimezone().isoformat(' ', 'seconds')} {shlex.join(sys.argv)}\n")
        self.add("".join(lines))

    def add(self, lines: str) -> None:
        """Whole lines."""
        if self._kept is not None:
            self._kept.append(lines)
        elif self._file is not None and lines:
            text = "".join(self._sign + line for line in lines.splitlines(keepends=True))
            with contextlib.suppress(OSError):  # a full disk: what comes later may find room
                os.write(self._file, text.encode(errors="backslashreplace"))

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file, self._kept = None, None


class Copied:
    """A console's stream whose lines go to a log as well, but for those of a progress bar. Else it is that stream."""

    def __init__(self, stream: TextIO, log: Log):
        self._stream, self._log, self._begun = stream, log, ""

    def write(self, text: str) -> int:
        if "\r" not in text:  # by which a bar goes back to where it began
            whole, end, self._begun = (self._begun + text).rpartition("\n")
            if end:
                self._log.add(whole + end)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


_log: Log | None = None  # of the command that is running


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Around a command: its lines are kept for the log, and so is the traceback that it ends with."""
    global _log
    before, _log = (sys.stdout, sys.stderr, _log), Log()
    sys.stdout, sys.stderr = Copied(sys.stdout, _log), Copied(sys.stderr, _log)
    try:
        yield
    except Exception:
        _log.add(traceback.format_exc())
        raise
    finally:
        _log.close()
        sys.stdout, sys.stderr, _log = before


def keep_in(path: Path, rank: int) -> None:
    """From now on the lines of a recorded command go to this file, which is made, or gone on with."""
    if _log is not None:
        _log.open(path, rank)


def say_at_once(line: str) -> None:
    """For a signal's handler: not by print, which may be what the signal has interrupted."""
    with contextlib.suppress(OSError):  # Ctrl-C ends the reader of a pipe as well
        os.write(1, line.encode())
    if _log is not None:
        _log.add(line.lstrip("\n"))
