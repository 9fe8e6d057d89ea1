"""What every command shares: flags with one-line errors, exit codes, steady output streams, and the run's log file."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TextIO

from utils import VERSION, UserError, user_message


class UsageError(UserError):
    """A command line, or a default in the file, that cannot be understood."""


def run_cli(
    program: str,
    work: Callable[[], int | None],
    oom_advice: str = "choose smaller ones, or --device cpu",
    interrupted: str = "stopped",
    keeps_log: bool = False,
) -> int:
    """Runs a whole command and returns its exit code: that of `work`, 2 after a user's mistake, 130 after Ctrl-C."""
    ignore_write_errors()
    with RunLog() if keeps_log else contextlib.nullcontext():
        try:
            return work() or 0
        except SystemExit as stop:  # --help, or a signal that trainer.py has saved for
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt the ending of the workers
            print(f"\n{interrupted}", file=sys.stderr)
            return 130
        except (UserError, RuntimeError) as error:
            if not (message := user_message(error, oom_advice)):
                raise
            print(f"{program}: error: {message}", file=sys.stderr)
            return 2
        finally:
            _flush_for_good()


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, without the usage of thirty flags before it."""

    def __init__(self, program: str | None = None, *, usage: str | None = None, description: str | None = None):
        super().__init__(program, usage, description, allow_abbrev=False)
        self.add_argument("--version", action="version", version=f"Silueta {VERSION}")

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """Parses as argparse does, with dashes or underscores in a flag, and suggests a flag for an unknown one."""
        arguments = [normalize(argument) for argument in (sys.argv[1:] if args is None else args)]
        self._refuse_empty(arguments)
        known, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            meant = closest_flag(unknown[0].split("=")[0], [*self._option_string_actions])
            hint = f"did you mean {meant}?" if meant else "--help lists them all"
            raise UsageError(f"unknown argument {unknown[0]}: {hint}")
        return known

    def _refuse_empty(self, arguments: list[str]) -> None:
        """Raises a UsageError for what a shell makes of "$OUTPUT" if that is not set: it would be the current folder.

        `--photos=` is accepted for a setting that is empty by default: it turns one off whose default was edited.
        """
        for before, argument in zip(["", *arguments], arguments):  # noqa: B905 - the last is before nothing
            name, equals, value = argument.partition("=")
            action = self._option_string_actions.get(name)
            if not argument.strip():
                what = f"what follows {before}" if before in self._option_string_actions else "an argument"
            elif action and equals and not value.strip() and action.default != "":
                what = f"what follows {name}="
            else:
                continue
            raise UsageError(f"{what} is empty: is it a variable of the shell that is not set?")


def flag(name: str) -> str:
    """Returns the flag of a setting: --batch-size for batch_size."""
    return "--" + name.replace("_", "-")


def normalize(argument: str) -> str:
    """Returns --batch_size=8 as --batch-size=8, and a path in the home folder, as ~/a or --output=~/a, in full."""
    if not argument.startswith("--"):
        return expand_home(argument)
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + expand_home(value)


def expand_home(text: str) -> str:
    """Returns a path, or several separated by commas, with the home folder for a ~ at its beginning.

    A shell does not expand it after an equals sign or in quotes.
    """
    paths = [os.path.expanduser(path.strip()) if path.strip()[:1] == "~" else path for path in text.split(",")]
    if any(path == "~" or path.startswith("~/") for path in paths):
        raise UsageError(f"{text} is in the home folder, and the environment variable HOME does not say where that is")
    return ",".join(paths)


def closest_flag(name: str, flags: list[str]) -> str:
    """Returns the only flag with these initials (--lr), this word (--epochs) or a similar spelling; "" if none."""
    words = {flag: flag.strip("-").split("-") for flag in flags}
    by_initials = [flag for flag in flags if "".join(word[:1] for word in words[flag]) == name.strip("-")]
    by_word = [flag for flag in flags if name.strip("-") in words[flag]]
    by_spelling = difflib.get_close_matches(name, flags, n=1, cutoff=0.75)
    by_part = [flag for flag in flags if difflib.get_close_matches(name.strip("-"), words[flag], cutoff=0.75)]
    return next((found[0] for found in (by_initials, by_word, by_spelling, by_part) if len(found) == 1), "")


def ignore_write_errors() -> None:
    """Replaces stdout and stderr so that a reader that has gone, or a full disk, cannot end the command.

    A stream that the shell has closed is opened on nothing, or a checkpoint would get its descriptor, and then whatever
    a library writes to "stderr". One that another program has put in the place of Python's own is left alone.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "r+", errors="replace")  # noqa: SIM115 - for as long as the program
            os.set_inheritable(stream.fileno(), True)  # for the programs that this one starts
            setattr(sys, name, stream)
        elif name != "stdin" and stream is getattr(sys, f"__{name}__"):
            stream.reconfigure(errors="backslashreplace")  # a letter that the encoding lacks is shown by its number
            setattr(sys, name, _Steady(stream))


class _Steady:
    """A stream whose writes do not fail, and whose whole lines, except a progress bar's, are also given to `add`."""

    def __init__(self, stream: TextIO, add: Callable[[str], None] = lambda lines: None):
        self._stream, self._add, self._unfinished = stream, add, ""

    def write(self, text: str) -> int:
        if "\r" not in text:  # by which a bar returns to the line's beginning
            lines, newline, self._unfinished = (self._unfinished + text).rpartition("\n")
            self._add(lines + newline)
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def _flush_for_good() -> None:
    """Flushes the console; what it does not take is dropped, or Python's own flush at exit would fail."""
    for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class RunLog:
    """Copies stdout and stderr, without progress bars, to a file in the run's folder; keeps them until that is known.

    The traceback that ends its `with` block is copied as well. What cannot be written is lost.
    """

    def __init__(self) -> None:
        self._lines: list[str] | None = []  # None once there is no file to wait for
        self._file: int | None = None
        self._prefix = ""

    def __enter__(self) -> RunLog:
        global _run_log
        self._before = sys.stdout, sys.stderr, _run_log
        sys.stdout, sys.stderr, _run_log = _Steady(sys.stdout, self.add), _Steady(sys.stderr, self.add), self
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        global _run_log
        if isinstance(error, Exception):
            self.add("".join(traceback.format_exception(error)))
        sys.stdout, sys.stderr, _run_log = self._before
        if self._file is not None:
            os.close(self._file)
        self._file = self._lines = None

    def open(self, path: Path, rank: int) -> None:
        """Appends the lines so far and all further ones to a file, a line of another rank than 0 with its number."""
        try:
            # Appended by the kernel: lines of several processes stay whole, and none is lost in a crash.
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            if rank == 0:  # another machine may have no such folder
                print(f"{path} cannot be written: {error.strerror}: the training goes on without it", flush=True)
        lines, self._lines, self._prefix = self._lines or [], None, f"[rank {rank}] " if rank else ""
        if rank == 0:
            self.add(f"--- {datetime.now().astimezone().isoformat(' ', 'seconds')} {shlex.join(sys.argv)}\n")
        self.add("".join(lines))

    def add(self, lines: str) -> None:
        if self._lines is not None:
            self._lines.append(lines)
        elif self._file is not None and lines:
            text = "".join(self._prefix + line for line in lines.splitlines(keepends=True))
            with contextlib.suppress(OSError):  # a full disk: what comes later may find room
                os.write(self._file, text.encode(errors="backslashreplace"))


_run_log: RunLog | None = None  # of the command that runs


def open_run_log(path: Path, rank: int) -> None:
    """Writes the console's lines to this file from now on, if the command keeps a log at all."""
    if _run_log is not None:
        _run_log.open(path, rank)


def say_from_signal_handler(line: str) -> None:
    """Prints a line without `print`, which may be what the signal has interrupted."""
    with contextlib.suppress(OSError):  # Ctrl-C ends the reader of a pipe as well
        os.write(1, line.encode())
    if _run_log is not None:
        _run_log.add(line.lstrip("\n"))
