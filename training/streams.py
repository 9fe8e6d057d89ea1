"""What a command says may get lost, and ends nothing: a reader that has gone, a full disk, no stream at all.

It imports nothing of the project and not PyTorch: for commands that need neither as well.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys

PATIENCE = 1.0  # seconds that a reader who takes nothing more is waited for, where the stream itself does not wait


def steady_streams() -> None:
    """At the start of a command: from now on nothing that it prints can end it, or make a failure of its end.

    What another program has put in the place of Python's own streams is left to that program.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell, or a program without a console
            setattr(sys, name, _nowhere("r" if name == "stdin" else "w"))
        elif name != "stdin" and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _steady(stream))


def _nowhere(mode: str) -> io.TextIOWrapper:
    # It takes the lowest number, that of the stream that is missing: a checkpoint would get it otherwise, and then
    # whatever a library writes to "stderr".
    stream = open(os.devnull, mode, encoding="utf-8", errors="replace")  # noqa: SIM115 - for as long as the program
    os.set_inheritable(stream.fileno(), True)  # as streams are: for the programs that this one starts
    return stream


def _steady(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The same stream, without failures."""
    stream.reconfigure(errors="backslashreplace")  # of a letter that the encoding lacks its number is shown
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if type(raw) is not io.FileIO:  # a console of Windows: its reader does not go without the program
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    options = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    file = _Forgiving(stream.fileno(), "w", closefd=False)
    buffered = file if raw is stream.buffer else io.BufferedWriter(file)  # python -u has no buffer
    return io.TextIOWrapper(buffered, stream.encoding, "backslashreplace", **options)


class _Forgiving(io.FileIO):
    """What cannot be written is lost; the next text is tried again, since a disk may have room then."""

    def write(self, data: bytes | memoryview) -> int:
        with contextlib.suppress(OSError):
            written = super().write(data)
            if written is None and select.select([], [self], [], PATIENCE)[1]:  # it was set not to wait
                written = super().write(data)
            if written is not None:
                return written
        return len(data)
