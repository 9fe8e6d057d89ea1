"""What interrupts a training: signals and the clock."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from tiny_runs import ALONE

from training import interruptions
from training.interruptions import SIGNALS, Stopped, Watch


class Folder:
    """What a watch asks of a run's folder; `outcomes` are those of the saves, and reported at the next `collect`."""

    def __init__(self, *outcomes: bool):
        self._outcomes, self._news, self.saves, self.waited_with = iter(outcomes), True, [], []

    def save_mid_epoch(self, *_: object) -> None:
        self.saves.append(time.monotonic())
        self._news = next(self._outcomes, True)

    def collect(self, wait: bool = False) -> bool:
        if wait:
            print("written")
            self.waited_with.append(handlers())
        news, self._news = self._news, True
        return news


def watch(folder: Folder | None = None, minutes: float = 0) -> Watch:
    run = SimpleNamespace(processes=ALONE, most_skipped_in_a_row=lambda: 0, gather_partial_metrics=list,
                          epochs_done=1, step=2)  # fmt: skip
    return Watch(run, folder or Folder(), minutes)


def handlers() -> dict:
    return {number: signal.getsignal(number) for number in SIGNALS}


@pytest.fixture(autouse=True)
def default_signals():
    """The default handlers, whatever nohup has made of them, and those of before after the test."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("outcome", "resume"), [(True, "from there"), (False, "from the checkpoint before")])
def test_a_signal_saves_after_the_step_and_no_other_disturbs_that(number, outcome, resume, capfd):
    folder = Folder(outcome)
    with pytest.raises(Stopped, match=signal.Signals(number).name) as stop, watch(folder=folder) as watching:  # noqa: PT012
        watching.between_steps()
        signal.raise_signal(number)
        assert folder.saves == []
        watching.between_steps()
    assert stop.value.code == 128 + number
    assert len(folder.saves) == 1
    assert {*handlers().values()} == {signal.SIG_IGN}  # until the process ends
    name, said = signal.Signals(number).name, capfd.readouterr().out
    assert f"\n{name}: saving after this step (once more: ends now)\n" in said
    assert f"written\nstopped by {name} after epoch 1, step 2: --resume goes on {resume}\n" in said


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    now, killed, before = [0.0], [], handlers()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "kill", lambda *args: killed.append(args))
    with watch():
        for now[0], by_default in ((0, False), (1.9, False), (2.1, True)):  # at once it is the same one by another way
            signal.raise_signal(signal.SIGTERM)
            assert (killed == [(os.getpid(), signal.SIGTERM)]) is by_default
            assert (signal.getsignal(signal.SIGTERM) == signal.SIG_DFL) is by_default
    assert handlers() == before


def test_no_signal_cuts_off_what_is_written_at_the_end():
    before, folder = handlers(), Folder()
    with watch(folder):
        noting = handlers()
    assert not {*before.values()} & {*noting.values()}
    assert folder.waited_with == [noting]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no sessions")
def test_a_run_that_nohup_started_outlives_its_session():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with watch() as watching:
        signal.raise_signal(signal.SIGHUP)
        watching.between_steps()


def test_in_a_thread_another_processs_signal_stops_the_run(monkeypatch):
    def training() -> None:
        with watch() as watching:
            monkeypatch.setattr(interruptions, "all_reduce_max_async", lambda _: lambda: [signal.SIGTERM, 0, 0])
            watching.between_steps()

    with ThreadPoolExecutor() as pool, pytest.raises(Stopped) as stop:
        pool.submit(training).result()
    assert stop.value.code == 128 + signal.SIGTERM


def test_a_checkpoint_is_due_by_the_clock_and_sooner_after_a_failure(monkeypatch):
    now, folder = [0], Folder(False)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for watching in (watch(folder=folder, minutes=15), watch(folder=folder)):
        for now[0] in (899, 900, 910, 969, 970, 1869, 1870):  # the failure is reported at 910
            watching.between_steps()
    assert folder.saves == [900, 970, 1870]
