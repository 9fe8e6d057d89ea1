"""Interrupts trainings at random moments until each is done, and checks that nothing was lost by it. On Linux.

    python tools/torture.py                                      # 100 kills, 20 terminations
    python tools/torture.py --kills 10 --terminations 2 --seed 7

Kills are SIGKILL: of a training of one process at any moment, while it writes or while it validates, and of one rank
of two under torchrun. Terminations are SIGTERM to torchrun with two ranks. Each time the training must go on from its
newest checkpoint, and in the end it must have the bits of an undisturbed one. Exit code 1 if one has not: the folder
with the checkpoints and what the trainings printed is kept then.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it is in tools/ that Python looks

import torch

from models import CheckpointError, read_checkpoint
from tools import make_sample
from training.checkpoints import BEST, newest_usable
from training.command_line import OneLineParser, run_cli

EPOCHS = 2
SETTINGS = (
    *("--encoder=mobilenet_v2", "--no-pretrained", "--image-size=32", "--batch-size=8", "--learning-rate=0.002"),
    *("--num-workers=1", "--save-every-minutes=0.005", "--device=cpu", f"--num-epochs={EPOCHS}"),
)
VARIABLE = "TORTURED_TRAINING"  # every process of a training inherits it; its value is the training's folder
SILENT_SECONDS = 120.0  # a training that prints nothing for so long hangs
ORPHAN_SECONDS = 15.0  # a loader worker checks every 5 s whether its parent is alive
TIMES = {"seconds", "images_per_second", "data_wait"}  # columns of history.csv that differ between equal trainings
DONE = (EPOCHS, 0)  # a position: epochs that are done, and steps of the next one; (0, 0) is the start


class Kind(NamedTuple):
    """A kind of interruption: after up to `before` seconds of training it waits for the condition and up to `after`."""

    name: str
    before: float
    condition: str = "is_training"  # a method of Training
    after: float = 0.0
    signal: int = signal.SIGKILL
    ranks: int = 1


TERMINATION = Kind("terminated", 5.0, signal=signal.SIGTERM, ranks=2)
KILLS = (  # taken in turn
    Kind("killed while writing", 4.0, "is_writing", 0.1),
    Kind("killed while validating", 0.0, "is_validating", 0.4),
    Kind("one rank of two killed", 5.0, ranks=2),
    *[Kind("killed at any moment", 5.0)] * 2,
)


class BrokenPromiseError(Exception):
    """A training did not do what it should."""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise BrokenPromiseError(message)


@dataclass
class Results:
    """What happened so far."""

    interruptions: Counter[str] = field(default_factory=Counter)  # by the name of their kind
    resumed: int = 0  # starts that went on from a checkpoint, which was the newest
    equal: int = 0  # trainings that ended with the bits of an undisturbed one
    slowest: float = 0.0  # seconds from SIGTERM until all processes had ended


class Training:
    """A training in its folder, started with --resume in a terminal of its own: there it shows its progress bar."""

    def __init__(self, folder: Path, ranks: int, data: Path):
        self.folder, self.output, self._started = folder, "", time.time()
        torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}") if ranks > 1 else ()
        folders = (f"--data-root={data}", f"--checkpoint-dir={folder}")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", VARIABLE: str(folder)}
        self._terminal, inside = pty.openpty()
        subprocess.run(["stty", "rows", "24", "cols", "100"], stdin=inside, check=True)  # without them it shows no bar
        self.process = subprocess.Popen(
            [sys.executable, *torchrun, "trainer.py", *SETTINGS, *folders, "--resume"],
            cwd=Path(__file__).parents[1], env=environment, stdin=inside, stdout=inside, stderr=inside,
        )  # fmt: skip
        os.close(inside)

    def __enter__(self) -> Training:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        while error and (pids := processes_of(self.folder)):  # without an error they have to end by themselves
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pids[0], signal.SIGKILL)
            self.process.poll()
        os.close(self._terminal)
        with open(self.folder.with_suffix(".txt"), "a") as file:
            file.write(self.output)

    def wait(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        """Reads the output until the condition holds. Returns False if the training or the time ends before.

        Without `seconds` it waits for as long as the training prints something: a busy machine may be slow.
        """
        deadline = time.monotonic() + (SILENT_SECONDS if seconds is None else seconds)
        while not condition():
            ended, length = self.ended(), len(self.output)
            with contextlib.suppress(OSError):  # no process has the terminal open any more
                while select.select([self._terminal], [], [], 0.002)[0]:
                    self.output += os.read(self._terminal, 65536).decode(errors="replace")
            if seconds is None and len(self.output) > length:
                deadline = time.monotonic() + SILENT_SECONDS
            if ended or time.monotonic() > deadline:
                return condition()
        return True

    def ended(self) -> bool:
        return self.process.poll() is not None

    def is_training(self) -> bool:
        return "\repoch " in self.output

    def is_validating(self) -> bool:
        return self.output.rpartition("\r")[2].startswith("validation ")

    def is_writing(self) -> bool:
        """Returns whether a file is being written, or was when the training was killed."""
        with contextlib.suppress(FileNotFoundError):  # it has just been renamed
            return any(path.stat().st_mtime >= self._started for path in self.folder.glob(".*.part"))  # no older kill's
        return False

    def position(self, message: str) -> tuple[int, int]:
        """Returns the position that a message of the training names."""
        match = re.search(rf"{message}.*?after epoch (\d+)(?:, step (\d+))?", self.output)
        return (int(match[1]), int(match[2] or 0)) if match else (0, 0)


def processes_of(folder: Path) -> list[int]:
    """Returns the living processes of the training in a folder, whoever their parent is by now."""
    pids, variable = [], f"{VARIABLE}={folder}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or it has just ended
            if variable in path.read_bytes().split(b"\0"):
                pids.append(int(path.parent.name))
    return pids


def wait_for_all(folder: Path) -> None:
    """Waits until all processes of a training have ended."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while pids := processes_of(folder):
        check(time.monotonic() < deadline, f"processes of {folder} are left behind: {pids}")
        time.sleep(0.02)


def run_once(folder: Path, ranks: int, data: Path, kind: Kind | None, results: Results) -> bool:
    """Starts or resumes a training, and interrupts it if there is a `kind`. Returns whether it is done.

    Raises:
        BrokenPromiseError: it does not do what it should.
        CheckpointError: it left a damaged checkpoint.
    """
    before = newest_position(folder)
    with Training(folder, ranks, data) as training:
        interrupted, start = kind is not None and reach(training, kind), time.monotonic()
        if kind and interrupted:
            interrupt(training.process.pid, kind)
        check(training.wait(training.ended), "it does not end")
        if ranks > 1:
            wait_for_all(folder)
        seconds, code, newest = time.monotonic() - start, training.process.returncode, newest_position(folder)
        check(code == 0 or interrupted, f"it ended with exit code {code}")
        check(code != 0 or newest == DONE, f"it ended with exit code 0 at {newest}")
        resumed_from = training.position("going on from")
        check(resumed_from == before, f"it went on from {resumed_from}, and its newest checkpoint was {before}")
        check(newest >= before, f"it fell back from {before} to {newest}")
        check(not list(folder.glob("earlier_*")), "it moved its own files aside")
        for path in folder.glob("*.pth"):
            read_checkpoint(path)
        if kind and interrupted and newest != DONE:  # else it came too late
            missed = "" if getattr(training, kind.condition)() else " (just after it)"
            results.interruptions[kind.name + missed] += 1
            if kind.signal == signal.SIGTERM:
                saved = training.position("stopped by SIG")
                check(saved == newest, f"it says that it saved {saved}, and its newest checkpoint is {newest}")
                results.slowest = max(results.slowest, seconds)
    results.resumed += before != (0, 0)
    return newest == DONE


def reach(training: Training, kind: Kind) -> bool:
    """Waits for a random moment of this kind. Returns False if the training ends before it."""
    for condition, seconds in ((training.is_training, kind.before), (getattr(training, kind.condition), kind.after)):
        if not training.wait(condition) or training.wait(training.ended, random.uniform(0, seconds)):
            return False
    return True


def interrupt(pid: int, kind: Kind) -> None:
    """Sends the signal to a training; SIGKILL to one of the ranks that torchrun has started."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError, IndexError):  # it has just ended
        if kind.ranks > 1 and kind.signal == signal.SIGKILL:
            pid = int(random.choice(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
        os.kill(pid, kind.signal)


def newest_position(folder: Path) -> tuple[int, int]:
    newest = newest_usable(folder)
    return (newest[1]["epoch"], newest[1]["step"]) if newest else (0, 0)


def equal_bits(folder: Path, other: Path) -> bool:
    """Returns whether two trainings ended with the same weights, best model and history, but for its times."""
    # last.pth may be older than the newest, if the kill came just after the last epoch's own file was written.
    newest = [found[1] for path in (folder, other) if (found := newest_usable(path))]
    best = [read_checkpoint(path / BEST) for path in (folder, other)]
    rows = [[{k: v for k, v in row.items() if k not in TIMES} for row in content["history"]] for content in newest]
    weights = [(a["model"], b["model"]) for a, b in (newest, best)]
    return rows[0] == rows[1] and all(torch.equal(a[name], b[name]) for a, b in weights for name in a)


def torture(work: Path, kinds: list[Kind], results: Results, photos: tuple[int, int] = (240, 60)) -> None:
    """Makes these interruptions, on as many trainings as it takes, and prints a line after each training.

    Args:
        work: an empty folder.
        photos: how many to draw, to train and to validate on.
    """
    data = make_sample.draw_sample(work / "data", *photos)
    for ranks in sorted({kind.ranks for kind in kinds}):
        left = [kind for kind in kinds if kind.ranks == ranks]
        undisturbed = work / f"undisturbed_{ranks}"
        run_once(undisturbed, ranks, data, None, results)
        for number in range(2 * len(left) + 5):  # an interruption that comes too late is tried again on the next one
            folder = work / f"interrupted_{ranks}_{number}"
            while not run_once(folder, ranks, data, left[0] if left else None, results):
                left.pop(0)
            wait_for_all(folder)
            check(equal_bits(folder, undisturbed), f"{folder} has other bits than {undisturbed}")
            shutil.rmtree(folder)
            results.equal += 1
            print(f"{results.interruptions.total()} of {len(kinds)} interruptions, equal bits", flush=True)
            if not left:
                break
        check(not left, "no training lasted long enough to be interrupted")


def main(options: argparse.Namespace) -> int:
    """Tortures and reports. Returns the exit code."""
    random.seed(options.seed)
    kinds = [KILLS[number % len(KILLS)] for number in range(options.kills)] + [TERMINATION] * options.terminations
    random.shuffle(kinds)
    work, results, broken = Path(tempfile.mkdtemp(prefix="torture_")), Results(), ""
    try:
        torture(work, kinds, results)
    except (BrokenPromiseError, CheckpointError) as error:
        broken = f"BROKEN: {error}; {work} is kept"
    names = ", ".join(f"{count} {name}" for name, count in results.interruptions.items())
    print(f"{results.interruptions.total()} of {len(kinds)} interruptions: {names}",
          f"{results.resumed} starts went on from the newest checkpoint, {results.equal} trainings have equal bits",
          f"after SIGTERM all ended within {results.slowest:.1f} s; on a machine of its own 10 s are allowed",
          *([broken] if broken else []), sep="\n")  # fmt: skip
    if not broken:
        shutil.rmtree(work)
    return 1 if broken else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("torture.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="interruptions by SIGKILL (%(default)s)")
    parser.add_argument("--terminations", type=int, default=20, help="interruptions by SIGTERM (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the moments (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_cli("torture.py", lambda: main(parse(sys.argv[1:]))))
