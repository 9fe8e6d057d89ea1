"""Interrupts trainings at random moments until they are through, and compares them with some that were left in peace.

    python tools/bench/torture.py                          # 100 kills, 20 terminations
    python tools/bench/torture.py --kills 10 --terminations 2 --seed 7

Kills are by SIGKILL: of a run of one process at any moment, while it writes or while it validates, and of one rank of
two under torchrun. Terminations are by SIGTERM to torchrun with two processes. Every run has a loader worker a process.
The full disk is no part of this: tests/test_resume.py has it. Exit code 1 when anything was not as promised; the
runs' folder with all that they printed is kept then.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tools.bench.watched_training import Place, Training, processes_of
from training.checkpoints import BEST, newest_usable
from training.report import clock
from training.settings import OneLineParser, UsageError
from utils import CheckpointError, read_checkpoint

EPOCHS = 2
COMMAND = (
    *("trainer.py", "--sample", "--encoder=mobilenet_v2", "--image-size=32", "--batch-size=8", "--num-workers=1"),
    *("--checkpoint-minutes=0.005", "--device=cpu", f"--num-epochs={EPOCHS}"),
)
MOMENT, WRITE, VALIDATION, RANK, TERMINATION = "moment", "write", "validation", "rank", "termination"
KILLS = (WRITE, VALIDATION, RANK, MOMENT, MOMENT)  # in turn
SAID = {MOMENT: "at any moment", WRITE: "at a write", VALIDATION: "at a validation", RANK: "of one rank of two"}
LONGEST = {MOMENT: 5.0, WRITE: 4.0, VALIDATION: 0.0, RANK: 5.0, TERMINATION: 5.0}  # seconds of training before one
WITHIN = {WRITE: 0.1, VALIDATION: 0.4}  # seconds that one takes
ALLOWED = 10.0  # seconds from SIGTERM until all has ended
ORPHANS = 15.0  # seconds: a loader worker looks every five whether its parent lives
TIMES = {"seconds", "images_per_second", "data_wait"}  # columns of history.csv that no two runs share


class BrokenPromiseError(Exception):
    """What a run should have done and has not."""


@dataclass
class Tally:
    """What has been kept until now; the first promise that is broken ends the torture."""

    aims: Counter = field(default_factory=Counter)  # interruptions by what they were aimed at
    hits: Counter = field(default_factory=Counter)  # kills by what they hit
    fresh: int = 0  # starts after an interruption before the first checkpoint
    saved: int = 0  # or after the first
    resumed: int = 0  # and those that went on at the newest
    runs: Counter = field(default_factory=Counter)  # that are through, by their number of processes
    same: Counter = field(default_factory=Counter)  # those with the bits of an undisturbed one
    a_run: list[int] = field(default_factory=list)  # interruptions
    seconds: list[float] = field(default_factory=list)  # from SIGTERM until all has ended
    broken: list[str] = field(default_factory=list)  # promises


# --- one start of a run ---------------------------------------------------------------------------------------


def start(folder: Path, processes: int, what: str | None, tally: Tally) -> bool:
    """Goes on with a run, and interrupts it so. Returns whether that hit it before it was through.

    Raises:
        BrokenPromiseError: it does not do what it should.
    """
    newest = place(folder)
    tally.saved, tally.fresh = tally.saved + (newest is not None), tally.fresh + (folder.exists() and newest is None)
    with Training(folder, processes, COMMAND) as training:
        try:
            reached = what is not None and reach(training, what)
            strike(training, what, tally) if reached else end(training)
            insist(training.resumed_at() == newest, f"it went on at {training.resumed_at()}, saved was {newest}")
            insist(processes == 1 or all_end(folder), f"processes are left behind: {processes_of(folder)}")
        finally:
            with open(folder.with_suffix(".txt"), "a") as file:
                file.write(f"--- {what}\n{training.out}\n")
    check_files(folder, newest)
    tally.resumed += newest is not None
    return reached and not through(folder)


def reach(training: Training, what: str) -> bool:
    """Waits for the beginning, a random moment after it and what is aimed at. Returns whether the run still lives."""
    seconds = random.uniform(0, LONGEST[what]), random.uniform(0, WITHIN.get(what, 0))
    sight = {WRITE: training.writing, VALIDATION: training.validating}.get(what, training.begun)
    return (
        training.wait(training.begun)
        and training.keeps_on(seconds[0])
        and training.wait(sight)
        and training.keeps_on(seconds[1])
    )


def strike(training: Training, what: str, tally: Tally) -> None:
    """Kills or terminates it, and waits until it has ended."""
    if what == TERMINATION:
        return terminate(training, tally)
    training.kill_one_of(training.ranks() if what == RANK else [training.process.pid])
    insist(training.wait(training.ended), "it outlives the death of a process of it")
    if through(training.folder):
        return None
    insist(training.process.returncode != 0, "its exit code does not tell of the kill")
    tally.aims[what] += 1
    tally.hits += Counter({WRITE: int(training.writing()), VALIDATION: int(training.validating())})
    return None


def terminate(training: Training, tally: Tally) -> None:
    begin = time.monotonic()
    training.process.terminate()
    insist(training.wait(training.ended) and all_end(training.folder), "it does not end at SIGTERM")
    seconds, saved, newest = time.monotonic() - begin, training.saved_at(), place(training.folder)
    if through(training.folder):
        return
    insist(saved == newest, f"at SIGTERM it says that it saved {saved}, and it saved {newest}")
    insist(training.process.returncode != 0, "its exit code does not tell that it was stopped")
    tally.aims[TERMINATION] += 1
    tally.seconds.append(seconds)


def end(training: Training) -> None:
    insist(training.wait(training.ended), "it does not end")
    insist(training.process.returncode == 0, f"it ended with code {training.process.returncode}")


# --- what was promised ----------------------------------------------------------------------------------------


def insist(kept: bool, otherwise: str) -> None:
    if not kept:
        raise BrokenPromiseError(otherwise)


def place(folder: Path) -> Place | None:
    """Of the newest checkpoint."""
    found = newest_usable(folder)
    return (found[1]["epoch"], found[1]["step"]) if found else None


def through(folder: Path) -> bool:
    return place(folder) == (EPOCHS, 0)


def all_end(folder: Path) -> bool:
    """Whether all of a run's processes end in time."""
    latest = time.monotonic() + ORPHANS
    while processes_of(folder):
        if time.monotonic() > latest:
            return False
        time.sleep(0.02)
    return True


def check_files(folder: Path, before: Place | None) -> None:
    """Nothing half-written, nothing moved aside, and no way back."""
    try:
        for path in folder.glob("*.pth"):
            read_checkpoint(path)
    except CheckpointError as error:
        raise BrokenPromiseError(str(error)) from None
    insist(not list(folder.glob("earlier_*")), "it moved its own files aside")
    insist((place(folder) or (0, 0)) >= (before or (0, 0)), f"it fell back from {before} to {place(folder)}")


def same_bits(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, the same best model and the same figures, their times apart."""
    # The newest, which last.pth is not yet where the kill came just after the last epoch's own file.
    last, best = [newest_usable(it)[1] for it in (one, other)], [read_checkpoint(it / BEST) for it in (one, other)]
    pairs = [(content[0]["model"], content[1]["model"]) for content in (last, best)]
    rows = [[{k: v for k, v in row.items() if k not in TIMES} for row in run["history"]] for run in last]
    return rows[0] == rows[1] and all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


# --- many runs ------------------------------------------------------------------------------------------------


def torture(work: Path, kills: int, terminations: int) -> Tally:
    """Interrupts so many trainings, as long as they keep what was promised."""
    tally, whats = Tally(), [KILLS[number % len(KILLS)] for number in range(kills)] + [TERMINATION] * terminations
    alone = [what for what in whats if what not in (RANK, TERMINATION)]
    together = [what for what in whats if what in (RANK, TERMINATION)]
    random.shuffle(together)
    try:
        interrupt_all(work / "one", 1, alone, tally)
        interrupt_all(work / "two", 2, together, tally)
    except BrokenPromiseError as error:
        tally.broken.append(str(error))
    return tally


def interrupt_all(work: Path, processes: int, whats: list[str], tally: Tally) -> None:
    work.mkdir()
    if whats:
        start(work / "straight", processes, None, tally)
    most = 5 + 5 * len(whats)  # runs: what comes too late in one is for the next
    while whats:
        most -= 1
        insist(most > 0, f"no run of so many could be interrupted: {whats[0]}")
        folder = Path(tempfile.mkdtemp(prefix="run_", dir=work)) / "checkpoints"
        interrupt_one(folder, processes, whats, tally)
        tally.runs[processes] += 1
        insist(same_bits(folder, work / "straight"), f"{folder} has other bits than {work / 'straight'}")
        tally.same[processes] += 1
        shutil.rmtree(folder.parent)


def interrupt_one(folder: Path, processes: int, whats: list[str], tally: Tally) -> None:
    """One run, until it is through; takes what has hit it from the list."""
    before = len(whats)
    while whats and start(folder, processes, whats[0], tally):
        del whats[0]
    if not through(folder):
        start(folder, processes, None, tally)
    insist(all_end(folder), f"processes are left behind: {processes_of(folder)}")
    tally.a_run.append(before - len(whats))
    print(f"a run of {['one process', 'two processes'][processes - 1]}: {tally.a_run[-1]} interruptions", flush=True)


def report(tally: Tally) -> str:
    kills = {what: count for what, count in tally.aims.items() if what != TERMINATION}
    same = [f"{tally.same[number]} of {tally.runs[number]}" for number in (1, 2)]
    lines = {
        "kills": f"{sum(kills.values())}: " + ", ".join(f"{count} {SAID[what]}" for what, count in kills.items()),
        "": f"{tally.hits[WRITE]} hit within a write, {tally.hits[VALIDATION]} within a validation",
        "terminations": f"{len(tally.seconds)}, {spread(tally.seconds)}" if tally.seconds else "",
        "resumed": f"{tally.resumed} of {tally.saved} at the newest checkpoint, no step lost beyond it"
                   + (f"; {tally.fresh} were interrupted before their first" if tally.fresh else ""),
        "same bits": f"{same[0]} runs of one process, {same[1]} of two",
        "interruptions a run": f"{statistics.median(tally.a_run):g} (median)" if tally.a_run else "",
    }  # fmt: skip
    return "\n".join(f"{name:<20} {text}" for name, text in lines.items() if text)


def spread(seconds: list[float]) -> str:
    intime = sum(value <= ALLOWED for value in seconds)
    return (f"saved and all ended within {ALLOWED:g} s in {intime} of {len(seconds)} "
            f"({statistics.median(seconds):.1f} s in the median, {max(seconds):.1f} s at most)")  # fmt: skip


def main(kills: int, terminations: int, seed: int) -> int:
    """Tortures and reports. Returns the exit code."""
    random.seed(seed)
    begin, work = time.monotonic(), Path(tempfile.mkdtemp(prefix="torture_"))
    tally = torture(work, kills, terminations)
    if late := [seconds for seconds in tally.seconds if seconds > ALLOWED]:
        tally.broken.append(f"{len(late)} of {len(tally.seconds)} terminations took more than {ALLOWED:g} s")
    print(report(tally), f"{'took':<20} {clock(time.monotonic() - begin)}", sep="\n")
    if not tally.broken:
        shutil.rmtree(work)
        return 0
    print(*(f"BROKEN: {line}" for line in tally.broken), f"kept is {work}", sep="\n")
    return 1


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("torture.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=100, help="at random moments (%(default)s)")
    parser.add_argument("--terminations", type=int, default=20, help="of torchrun, by SIGTERM (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the kinds' order and the moments (%(default)s)")
    options = parser.parse_args(argv)
    if min(options.kills, options.terminations) < 0 or not options.kills + options.terminations:
        parser.error("--kills and --terminations are counts, and one of them must be above 0")
    return options


if __name__ == "__main__":
    try:
        sys.exit(main(**vars(parse(sys.argv[1:]))))
    except UsageError as error:
        print(f"torture.py: error: {error}", file=sys.stderr)
        sys.exit(2)
