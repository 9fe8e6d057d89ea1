"""What may interrupt a training: signals, the clock, too many broken numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from training import interruptions
from training.interruptions import BrokenNumbersError, Stopped, Watch
from utils import Processes

ALONE = Processes(torch.device("cpu"))


class Folder:
    """What a watch asks of a run's folder: a save is told as having worked or not when it is asked next."""

    path = Path("nowhere")

    def __init__(self, outcomes: tuple[bool, ...] = ()):
        self._outcomes, self._news, self.saves = iter(outcomes), True, []

    def save_unfinished(self, *_: object) -> None:
        self.saves.append(time.monotonic())
        self._news = next(self._outcomes, True)

    def collect(self, wait: bool = False) -> bool:
        news, self._news = self._news, True
        return news



def run(broken: int = 0) -> SimpleNamespace:
    """What a watch asks of a run."""
    return SimpleNamespace(processes=ALONE, broken=lambda: broken, unfinished=list, epochs_done=1, step=2)


ROOT = Path(interruptions.__file__).parents[1]


@pytest.fixture(autouse=True)
def default_signals():
    """Whoever has started the tests: nohup has the hangup ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in interruptions.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", interruptions.SIGNALS)
def test_a_signal_is_met_after_the_step_and_what_is_saved_is_not_disturbed(number):
    before = {n: signal.getsignal(n) for n in interruptions.SIGNALS}
    with pytest.raises(Stopped, match=signal.Signals(number).name) as stop, Watch(run(), Folder(), 0) as watch:  # noqa: PT012
        watch.between_steps()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # at once: the same one by another way
        watch.between_steps()
    assert stop.value.code == 128 + number
    assert {signal.signal(n, before[n]) for n in interruptions.SIGNALS} == {signal.SIG_IGN}  # until the process ends


def test_the_handlers_come_back():
    before = {n: signal.getsignal(n) for n in interruptions.SIGNALS}
    with Watch(run(), Folder(), 0):
        assert not {*before.values()} & {signal.getsignal(n) for n in interruptions.SIGNALS}
    assert {n: signal.getsignal(n) for n in interruptions.SIGNALS} == before


def test_a_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal; from types import SimpleNamespace; from training import interruptions\n"
        "interruptions.SAME_SIGNAL = -1.0\n"
        "alone = SimpleNamespace(is_main=True, world_size=1)\n"
        "with interruptions.Watch(SimpleNamespace(processes=alone), None, 0):\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('first', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('second', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM
    assert "first" in done.stdout
    assert "second" not in done.stdout


def after_hangup(ignored: bool) -> subprocess.CompletedProcess:
    """A run that is sent SIGHUP, as its session's end does it, and nohup or not before."""
    code = (
        "import os, signal, sys; from types import SimpleNamespace; from training import interruptions\n"
        "alone = SimpleNamespace(is_main=True, world_size=1)\n"
        "run = SimpleNamespace(processes=alone, broken=lambda: 0, unfinished=list)\n"
        "run.epochs_done = run.step = 1; folder = SimpleNamespace(save_unfinished=lambda *_: print('saved'))\n"
        "folder.collect = lambda wait=False: True\n"
        f"signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if ignored else 'SIG_DFL'})\n"
        "try:\n"
        "    with interruptions.Watch(run, folder, 0) as watch:\n"
        "        os.kill(os.getpid(), signal.SIGHUP); watch.between_steps(); print('next step')\n"
        "except interruptions.Stopped as stop: sys.exit(stop.code)\n"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no sessions")
def test_the_end_of_a_session_saves_unless_the_run_was_started_to_outlive_it():
    done = after_hangup(ignored=False)
    assert (done.returncode, "saved" in done.stdout, "next step" in done.stdout) == (128 + signal.SIGHUP, True, False)
    done = after_hangup(ignored=True)
    assert (done.returncode, done.stdout) == (0, "next step\n")


def in_a_thread(work) -> list:
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results


def test_in_a_thread_there_are_no_signals_and_another_processs_still_stops_it(monkeypatch):
    before = {n: signal.getsignal(n) for n in interruptions.SIGNALS}

    def stopped() -> int:
        try:
            with Watch(run(), Folder(), 0) as watch:
                watch.between_steps()
                monkeypatch.setattr(interruptions, "ask_largest", lambda _: lambda: [signal.SIGTERM, 0, 0])
                watch.between_steps()
        except Stopped as stop:
            return stop.code
        return 0

    assert in_a_thread(stopped) == [128 + signal.SIGTERM]
    assert {n: signal.getsignal(n) for n in interruptions.SIGNALS} == before


def test_a_checkpoint_is_due_by_the_clock_and_sooner_after_a_failure(monkeypatch):
    now = [0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    folder = Folder((False, True, True))
    for watch in (Watch(run(), folder, 15), Watch(run(), folder, 0)):
        for now[0] in (899, 900, 910, 969, 970, 1869, 1870):  # the failure is told at 910
            watch.between_steps()
    assert folder.saves == [900, 970, 1870]


def test_ten_broken_steps_in_a_row_are_too_many():
    Watch(run(broken=9), Folder(), 0).between_steps()
    with pytest.raises(BrokenNumbersError, match=r"10 steps in a row.*no checkpoint yet"):
        Watch(run(broken=10), Folder(), 0).between_steps()


def test_of_several_processes_none_waits_for_an_answer_before_its_next_step(monkeypatch):
    several, talk = run(), []
    several.processes = Processes(torch.device("cpu"), world_size=2)
    answers = iter([[0, 0, 0], [signal.SIGTERM, 0, 0]])

    def ask(numbers: list[int]):
        talk.append("asked")
        return lambda: talk.append("answered") or next(answers)

    monkeypatch.setattr(interruptions, "ask_largest", ask)
    with pytest.raises(Stopped), Watch(several, Folder(), 0) as watch:  # noqa: PT012
        watch.between_steps()
        assert talk == ["asked"]
        watch.between_steps()
        assert talk == ["asked", "answered", "asked"]
        watch.after_steps()  # an epoch's last: it is answered before the next thing begins
    assert talk == ["asked", "answered", "asked", "answered"]
    watch.after_steps()  # and once
    assert talk[-2:] == ["asked", "answered"]
