"""What may interrupt a training, met by all processes at the same step: signals, the clock, numbers that break."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from loading.workers import SIGNALS
from training.checkpoints import LAST, RETRY_SECONDS, RunFolder
from training.run import Run
from training.runlog import say_at_once
from utils import UserError, ask_largest, largest_of_each

SAME_SIGNAL = 2.0  # seconds: Ctrl-C reaches every process, and torchrun passes it on once more
MOST_BROKEN = 10  # steps in a row without a finite number: the training does not recover from that


class Stopped(SystemExit):
    """A signal asked the run to end, all its processes. `code` is the exit code, 128 and the signal's number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class BrokenNumbersError(UserError):
    """The loss or the gradient was not finite for too many steps."""


class Watch:
    """Between two steps: saves when it is time to, and ends the run when a signal came. On all processes alike.

    Within its `with` block the first signal only leaves a note, and a second one ends the process at once.

    Args:
        run: that is watched.
        folder: that it is saved in.
        checkpoint_minutes: from one checkpoint to the next; 0 is never.
    """

    def __init__(self, run: Run, folder: RunFolder, checkpoint_minutes: float):
        self._run, self._folder, self._pause = run, folder, 60 * checkpoint_minutes or float("inf")
        self._signal, self._noticed, self._handlers = 0, 0.0, {}
        self._answer = None  # to what was asked after the last step
        self.restart_clock()

    def __enter__(self) -> Watch:
        if threading.current_thread() is threading.main_thread():  # no signal reaches another one
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS if not by_nohup(number)}
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            self._folder.collect(wait=True)  # no signal cuts off what is being written
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._signal and time.monotonic() - self._noticed > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self._signal:
            self._signal, self._noticed = number, time.monotonic()
            if self._run.processes.is_main:
                step = "this step" if self._run.processes.world_size == 1 else "the next step"
                say_at_once(f"\n{signal.Signals(number).name}: saving after {step} (once more: ends now)\n")

    def between_steps(self) -> None:
        """To be called by all processes together, after each step.

        Of several none waits for the others: all act a step later on what one of them knows now.

        Raises:
            Stopped: a signal reached one of them; the run is saved.
            BrokenNumbersError: on one of them too many steps in a row had no finite number.
        """
        if not self._folder.collect():
            self.restart_clock(saved=False)
        self.after_steps()
        due = self._run.processes.is_main and time.monotonic() >= self._next_save
        self._answer = ask_largest([self._signal, due, self._run.broken()])
        if self._run.processes.world_size == 1:
            self.after_steps()

    def after_steps(self) -> None:
        """To be called after the last of the steps, by all processes together: acts on what is still unanswered.

        Raises:
            Stopped, BrokenNumbersError: as `between_steps`.
        """
        if self._answer is None:
            return
        (number, due, broken), self._answer = self._answer(), None
        if number:
            self._stop(number)
        if broken >= MOST_BROKEN:
            raise BrokenNumbersError(f"{broken} steps in a row had no finite loss or gradient; {self._last_good()}; "
                                     "a lower --learning-rate may help")  # fmt: skip
        if due:
            self._save()
            self.restart_clock()

    def restart_clock(self, saved: bool = True) -> None:
        """After a checkpoint: the next one is due in a while, or soon where this one could not be written."""
        self._next_save = time.monotonic() + (self._pause if saved else min(self._pause, RETRY_SECONDS))

    def _save(self) -> None:
        tallies = self._run.unfinished()  # of all processes
        if self._run.processes.is_main:
            self._folder.save_unfinished(self._run, tallies)

    def _stop(self, number: int) -> None:
        self._save()
        stop, saved = Stopped(number), self._folder.collect(wait=True)
        largest_of_each([0])  # wait for all: torchrun, seeing one of them end, would end the one that saves
        handled, self._handlers = self._handlers, {}
        for one in handled:
            signal.signal(one, signal.SIG_IGN)  # for the last moments of the run, when all is saved
        if self._run.processes.is_main:
            place = f"after epoch {self._run.epochs_done}, step {self._run.step}"
            outcome = "--resume goes on from there" if saved else "--resume goes on from the checkpoint before"
            print(f"stopped by {stop} {place}: {outcome}", flush=True)
        raise stop

    def _last_good(self) -> str:
        self._folder.collect(wait=True)
        path = self._folder.path / LAST
        return f"{path} is the last good checkpoint" if path.exists() else "there is no checkpoint yet"


def by_nohup(number: int) -> bool:
    """Whether this run was started to outlive its session; torchrun passes SIGHUP on to its workers all the same."""
    return signal.Signals(number).name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
