"""What may interrupt a training, met by all processes at the same step: signals, the clock, numbers that break."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType

from utils import Processes, UserError, largest_of_each

SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
SAME_SIGNAL = 2.0  # seconds: Ctrl-C reaches every process, and torchrun passes it on once more
MOST_BROKEN = 10  # steps in a row without a finite number: the training does not recover from that
RETRY_SECONDS = 60.0  # after which a checkpoint that could not be written is tried again


class Stopped(Exception):
    """A signal asked the run to end. `code` is the exit code, 128 and the signal's number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class BrokenNumbersError(UserError):
    """The loss or the gradient was not finite for too many steps; the message is one line for the user."""


class Watch:
    """Between two steps: whether to save, and whether to stop. The same answer on all processes.

    Within its `with` block the first signal only leaves a note, and a second one ends the process at once.

    Args:
        processes: those that must agree.
        checkpoint_minutes: from one checkpoint to the next; 0 is never.
    """

    def __init__(self, processes: Processes, checkpoint_minutes: float):
        self._processes, self._pause = processes, 60 * checkpoint_minutes or float("inf")
        self._signal, self._noticed, self._next_save = 0, 0.0, time.monotonic() + self._pause
        self._handlers: dict = {}

    def __enter__(self) -> Watch:
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._signal and time.monotonic() - self._noticed > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self._signal:
            self._signal, self._noticed = number, time.monotonic()
            if self._processes.is_main:  # not by print, which may be what the signal has interrupted
                text = f"\n{signal.Signals(number).name}: saving after this step (once more: ends now)\n"
                with contextlib.suppress(OSError):  # Ctrl-C ends the reader of a pipe as well
                    os.write(1, text.encode())

    def ask(self, broken_in_a_row: int = 0) -> bool:
        """Whether a checkpoint is due. To be called by all processes together, once a step.

        Raises:
            Stopped: a signal reached one of them.
            BrokenNumbersError: on one of them too many steps in a row had no finite number.
        """
        due = self._processes.is_main and time.monotonic() >= self._next_save
        number, due, broken = largest_of_each([self._signal, due, broken_in_a_row])
        if number:
            raise Stopped(number)
        if broken >= MOST_BROKEN:
            raise BrokenNumbersError(f"{broken} steps in a row had no finite loss or gradient")
        return bool(due)

    def saved(self, success: bool = True) -> None:
        """Sets the clock anew: after a failure for a short while."""
        self._next_save = time.monotonic() + (self._pause if success else min(self._pause, RETRY_SECONDS))

    def ignore_signals(self) -> None:
        """For the last moments of a run that was stopped, when all is saved; until the process ends."""
        self._handlers = {}
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
