"""The folder of a run: files written whole or not at all, moved aside rather than overwritten, claimed by one run."""

from __future__ import annotations

import copy
import os
import re
import shutil
import time
import weakref
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from loading.unreadable import SKIPPED
from training.launching import launcher
from training.run import Run
from training.writing import Writer
from utils import (
    CheckpointError,
    atomic_write,
    draft_of,
    flush_folder,
    read_checkpoint,
    weights_of,
    write_csv,
    writing_to,
)

LOCK = ".lock"
EPOCH_FILE = re.compile(r"epoch_(\d+)\.pth")
RESULTS = re.compile(r"(?:best_model|last|previous|epoch_(\d+))_on_.+")  # evaluate.py's folders, of a run's checkpoints
BEST, LAST, PREVIOUS, HISTORY, RUN_JSON = "best_model.pth", "last.pth", "previous.pth", "history.csv", "run.json"
PREVIEW, CURVES, RUN_LOG, BOARD = "preview.png", "curves.png", "run.log", "tensorboard"
RUN_FILES = (  # beside epoch_0001.pth ...
    *(BEST, LAST, PREVIOUS, SKIPPED, HISTORY, PREVIEW, CURVES, RUN_JSON, RUN_LOG, BOARD),
)
RETRY_SECONDS = 60.0  # after which a checkpoint that could not be written is tried again
CHECKPOINT, PICTURE = "checkpoint", "picture"  # what is written in the background


class RunFolder:
    """Where a run writes. All processes have one; only the main one calls what claims the folder or writes there.

    Within its `with` block, once `claim` or `take_over` has claimed it, no other run can write there. What is saved
    is copied at once and written while the training goes on; `collect` tells what came of it, and so does the block's
    end, which waits.

    Args:
        path: the folder; it is made when the run's settings are accepted, not before.
        keep: the newest epochs whose checkpoint is kept; 0 keeps all.
    """

    def __init__(self, path: str | Path, keep: int):
        self.path, self.keep = Path(path), keep
        self._claim: BinaryIO | None = None
        self._best: dict | None = None  # the best model, until it is on the disk
        self._saved = True  # whether the newest checkpoint is, or it is on its way and nothing is known yet
        self._writer = Writer()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            self._writer.close()
        finally:
            if self._claim:
                self._claim.close()

    def claim(self) -> None:
        """Before a checkpoint in it is read: no other run may write a newer one in between.

        A folder that no run has claimed yet stays as it is, so that a setting that is refused leaves no trace.

        Raises:
            CheckpointError: another run is writing there, or it cannot be written.
        """
        if (self.path / LOCK).exists():
            with writing_to(f"--checkpoint-dir {self.path}"):
                self._claim = claim(self.path)

    def take_over(self, run: Run, went_back: bool) -> None:
        """Makes it this run's: what another one left, or what lies after the place to go on from, is moved aside.

        Args:
            run: that is to write there.
            went_back: whether it goes on from a file that was named, which may not be the newest.

        Raises:
            CheckpointError: as `claim`.
        """
        with writing_to(f"--checkpoint-dir {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim = self._claim or claim(self.path)
            aside = move_aside(self.path, in_the_way(self.path, run.source, run.epochs_done, went_back))
            sign(self._claim)
        if aside:
            print(f"an earlier run's files were moved to {aside}", flush=True)

    # --- saving ---

    def has_best(self) -> bool:
        return self._best is not None or (self.path / BEST).exists()

    def save_epoch(self, run: Run, best: dict | None) -> None:
        """What a whole epoch leaves, and the best model if it is one.

        The checkpoint last: cut off before it, the run does the epoch again. A full disk ends no training.
        """
        history = [*run.history]

        def write(content: dict) -> None:
            write_csv(history, self.path / HISTORY)
            write_epoch(self.path, content, self.keep)

        self._save(run.checkpoint(), write, best)

    def save_unfinished(self, run: Run, tallies: list[dict]) -> None:
        """last.pth in the middle of an epoch; the one before it stays as previous.pth."""
        self._save(run.checkpoint(tallies), lambda content: write_last(self.path, content))

    def _save(self, content: dict, write: Callable[[dict], None], best: dict | None = None) -> None:
        self.collect(wait=True)  # before another copy is made
        copied = snapshot(content)
        if best is not None:
            self._best = {**best, "model": weights_of(copied)}  # the very weights, copied already
        self._saved = True
        self._writer.submit(CHECKPOINT, lambda: (self._write_best(), write(copied)))

    def _write_best(self) -> None:
        """Before any checkpoint: one that knows its score would never let it be written. It is kept until it is."""
        if self._best is not None:
            save(self._best, self.path / BEST)
            self._best = None

    def later(self, draw: Callable[[], object]) -> None:
        """Something to look at, after all that was saved before."""
        self._writer.submit(PICTURE, draw)

    def collect(self, wait: bool = False) -> bool:
        """Tells what could not be written since the last time. Returns False where that is a checkpoint, only once.

        Args:
            wait: for all that is to be written; else what is not done yet is told another time.
        """
        if wait:
            self._writer.rest()
        written = CHECKPOINT not in self._writer.collect()
        self._saved = self._saved and written
        return written

    def insist(self, run: Run) -> None:
        """At the end of the run there is no later checkpoint that would make up for one that could not be written.

        Raises:
            CheckpointError: an hour was not enough to make room.
        """
        self.collect(wait=True)
        for _ in range(int(3600 / RETRY_SECONDS)):
            if self._saved:
                return
            time.sleep(RETRY_SECONDS)
            self.save_epoch(run, None)
            self.collect(wait=True)
        if not self._saved:
            raise CheckpointError(f"the last epoch cannot be written to {self.path}")


# --- files ------------------------------------------------------------------------------------------------


def save(content: dict, path: Path) -> None:
    """Writes tensors, numbers, texts, lists and dictionaries of them: what `read_checkpoint` accepts.

    Args:
        content: with its tensors on the CPU: a file that names a GPU cannot be read on a machine without it.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; what was there is untouched.
    """
    try:
        with atomic_write(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"{path} cannot be written: {reason}") from error


def snapshot(content: Any) -> Any:
    """A copy on the CPU, with all its tensors, dictionaries and lists: none of it changes as the training goes on."""
    if isinstance(content, Tensor):
        return content.clone() if content.is_cpu else content.cpu()
    if isinstance(content, dict):
        copied = copy.copy(content)  # with what else a model's has: the versions of its layers
        copied.update((name, snapshot(value)) for name, value in content.items())
        return copied
    return [snapshot(value) for value in content] if isinstance(content, list) else content


def write_epoch(folder: Path, content: dict, keep: int) -> None:
    """Writes epoch_0001.pth and so on, points last.pth to it, removes all but the `keep` newest (0 keeps all)."""
    path = folder / f"epoch_{content['epoch']:04d}.pth"
    save(content, path)
    keep_last(folder)
    link(path, folder / LAST)
    others = [file for file in epoch_files(folder) if file != path]  # numbers may be higher after going back
    for old in others[keep - 1 :] if keep else []:
        old.unlink()


def write_last(folder: Path, content: dict) -> None:
    keep_last(folder)
    save(content, folder / LAST)


def keep_last(folder: Path) -> None:
    last = folder / LAST
    if last.exists() and last.stat().st_nlink == 1:  # one after a whole epoch has a name of its own
        link(last, folder / PREVIOUS)


def link(path: Path, name: Path) -> None:
    """A second name for a file: no second copy on the disk, and replaced in one step."""
    draft = draft_of(name)
    draft.unlink(missing_ok=True)
    try:
        os.link(path, draft)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, draft)
    os.replace(draft, name)
    flush_folder(name.parent)


def epoch_files(folder: Path, after: int = 0) -> list[Path]:
    """The checkpoints of the epochs after one, newest first."""
    numbers = {path: int(found[1]) for path in folder.glob("epoch_*.pth") if (found := EPOCH_FILE.fullmatch(path.name))}
    return sorted((path for path in numbers if numbers[path] > after), key=numbers.get, reverse=True)


def results(folder: Path, after: int = 0) -> list[Path]:
    """What evaluate.py has measured of the checkpoints of the epochs after one, and of those that are no epoch's."""
    numbers = {path: found[1] for path in folder.glob("*_on_*") if (found := RESULTS.fullmatch(path.name))}
    of_these = [path for path, number in numbers.items() if number is None or int(number) > after]
    return sorted(path for path in of_these if (path / "metrics.json").exists())  # else it is a run of such a name


def newest_usable(folder: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint that can be read; what is damaged is named and passed over."""
    last = first_usable([folder / LAST])
    if last:  # a run that was killed between two renames has an epoch's checkpoint that is newer
        found = [last, first_usable(epoch_files(folder, after=last[1]["epoch"]))]
    else:
        found = [first_usable([folder / PREVIOUS]), first_usable(epoch_files(folder))]
    return max(filter(None, found), key=lambda found: (found[1]["epoch"], found[1].get("step", 0)), default=None)


def first_usable(paths: list[Path]) -> tuple[Path, dict] | None:
    for path in filter(Path.exists, paths):
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            print(f"{error}: trying the one before it", flush=True)
    return None


def disk_needed(model_bytes: int, numbers: int, keep: int, num_epochs: int) -> int:
    """Bytes that a run's checkpoints take at most, with so many numbers a weight: itself, Adam's two, its average."""
    # The new one is complete before an old one goes; two more are of the middle of an epoch.
    kept = 2 + (min(keep + 1, num_epochs) if keep else num_epochs)
    return numbers * model_bytes * kept + model_bytes


# --- whose folder it is -----------------------------------------------------------------------------------


def claim(folder: Path) -> BinaryIO:
    """Keeps other runs out of a folder for as long as the returned file stays open, and this process lives.

    Who claimed it stays written there until `sign`: what the folder holds is not this run's yet.

    Raises:
        CheckpointError: another run has claimed it.
        OSError: the folder cannot be written.
    """
    file = open(folder / LOCK, "ab")  # noqa: SIM115 - its being open is the claim
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise CheckpointError(f"another run is writing to {folder}: wait, or choose another --checkpoint-dir") from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        print(f"{folder} cannot be locked: see to it that no second run writes there", flush=True)
    if hasattr(os, "register_at_fork"):  # a killed run's loader workers live on for some seconds: not with the claim
        claimed = weakref.ref(file)
        os.register_at_fork(after_in_child=lambda: claimed() and claimed().close())
    return file


def sign(claim: BinaryIO) -> None:
    """Writes into a claimed folder, once all in it belongs to this run, who has started this process."""
    claim.truncate(0)
    claim.write(launcher().encode())
    claim.flush()


def is_ours(folder: Path) -> bool:
    """Whether the run in this folder was started by the same launcher as this process."""
    lock = folder / LOCK
    return lock.is_file() and lock.read_bytes() == launcher().encode()


def in_the_way(folder: Path, source: Path | None, epoch: int, went_back: bool) -> list[Path]:
    """The files of a run that this one would overwrite and does not go on from.

    Args:
        folder: that the run writes to.
        source: the checkpoint that it goes on from, of this `epoch`; None for a new run.
        went_back: whether that was named, and not found as the newest: what is newer is then whole, else damaged.
    """
    everything = [path for name in RUN_FILES if (path := folder / name).exists()]
    if source is None or source.resolve().parent != folder.resolve():
        found = epoch_files(folder) + everything + results(folder)
        told_only = {path.name for path in found} <= {RUN_JSON, RUN_LOG, BOARD}
        killed_early = told_only and found and (folder / LOCK).stat().st_size  # it had nothing to lose
        return [] if killed_early else found
    newer = epoch_files(folder, after=epoch)
    if went_back and newer:
        return newer + everything + results(folder, after=epoch)
    others = [folder / LAST, folder / PREVIOUS]
    return newer + [path for path in others if path in everything and path != source and not is_usable(path)]


def is_usable(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except CheckpointError:
        return False
    return True


def move_aside(folder: Path, files: list[Path]) -> Path | None:
    """Moves files to a subfolder of their own. Returns it; None where there was nothing to move."""
    if not files:
        return None
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    aside = next(p for n in range(1000) if not (p := folder / f"earlier_{stamp}{f'_{n}' if n else ''}").exists())
    aside.mkdir()
    for path in files:
        path.rename(aside / path.name)
    return aside
