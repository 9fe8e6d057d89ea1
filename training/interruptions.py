"""What interrupts a training, handled by all processes at the same step: signals, the clock, broken numbers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from loading.workers import SIGNALS
from training.checkpoints import LAST, RETRY_SECONDS, RunFolder
from training.command_line import say_from_signal_handler
from training.run import Run
from utils import UserError, all_reduce_max, all_reduce_max_async

SAME_SIGNAL_SECONDS = 2.0  # Ctrl-C reaches every process, and torchrun passes it on once more
MAX_SKIPPED_IN_A_ROW = 10  # steps: the training does not recover from that


class Stopped(SystemExit):
    """A signal stopped the run, on all processes. `code` is the exit code: 128 and the signal's number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class BrokenNumbersError(UserError):
    """The loss or the gradient was not finite for too many steps."""


class Watch:
    """Between two steps: saves when it is time to, and ends the run after a signal. On all processes alike.

    Within its `with` block the first signal is only noted, and a second one ends the process at once.
    """

    def __init__(self, run: Run, folder: RunFolder, save_every_minutes: float):
        self._run, self._folder, self._interval = run, folder, 60 * save_every_minutes or float("inf")
        self._signal, self._noted_at = 0, 0.0
        self._handlers: dict[int, Any] = {}  # of before, by signal
        self._answer: Callable[[], list[int]] | None = None  # to what was asked of all processes after the last step
        self.restart_clock()

    def __enter__(self) -> Watch:
        if threading.current_thread() is threading.main_thread():  # no signal reaches another one
            for number in SIGNALS:
                if signal.Signals(number).name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup has the process outlive its session; torchrun passes SIGHUP on all the same
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            self._folder.collect(wait=True)  # no signal interrupts what is being written
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._signal and time.monotonic() - self._noted_at > SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self._signal:
            self._signal, self._noted_at = number, time.monotonic()
            if self._run.processes.is_rank0:
                step = "this step" if self._run.processes.world_size == 1 else "the next step"
                name = signal.Signals(number).name
                say_from_signal_handler(f"\n{name}: saving after {step} (once more: ends now)\n")

    def between_steps(self) -> None:
        """Saves, or raises Stopped or BrokenNumbersError, if one of the processes has to; all call it after each step.

        Of several processes none waits for the others: all act a step later on what one of them knows now.
        """
        if not self._folder.collect():
            self.restart_clock(saved=False)
        self.after_steps()
        due = self._run.processes.is_rank0 and time.monotonic() >= self._next_save
        self._answer = all_reduce_max_async([self._signal, due, self._run.most_skipped_in_a_row()])
        if self._run.processes.world_size == 1:
            self.after_steps()

    def after_steps(self) -> None:
        """Acts on what was asked after the last step, as `between_steps`; at an epoch's end on all processes."""
        if self._answer is None:
            return
        (number, due, skipped), self._answer = self._answer(), None
        if number:
            self._stop(number)
        if skipped >= MAX_SKIPPED_IN_A_ROW:
            self._folder.collect(wait=True)
            path = self._folder.path / LAST
            last_good = f"{path} is the last good checkpoint" if path.exists() else "there is no checkpoint yet"
            raise BrokenNumbersError(f"{skipped} steps in a row had no finite loss or gradient; {last_good}; "
                                     "a lower --learning-rate may help")  # fmt: skip
        if due:
            self._save()
            self.restart_clock()

    def restart_clock(self, saved: bool = True) -> None:
        """Sets when the next checkpoint is due: in `save_every_minutes`, or sooner if the last one failed."""
        self._next_save = time.monotonic() + (self._interval if saved else min(self._interval, RETRY_SECONDS))

    def _save(self) -> None:
        partial_metrics = self._run.gather_partial_metrics()  # from all processes
        if self._run.processes.is_rank0:
            self._folder.save_mid_epoch(self._run, partial_metrics)

    def _stop(self, number: int) -> None:
        self._save()
        stop, saved = Stopped(number), self._folder.collect(wait=True)
        all_reduce_max([0])  # wait for all: torchrun, seeing one of them end, would end the one that saves
        handled, self._handlers = self._handlers, {}
        for other in handled:
            signal.signal(other, signal.SIG_IGN)  # all is saved: nothing more to interrupt
        if self._run.processes.is_rank0:
            where = f"after epoch {self._run.epochs_done}, step {self._run.step}"
            goes_on = "from there" if saved else "from the checkpoint before"
            print(f"stopped by {stop} {where}: --resume goes on {goes_on}", flush=True)
        raise stop
