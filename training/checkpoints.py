"""A run's folder: checkpoints written whole or not at all, earlier files archived, claimed by one run at a time."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shutil
import socket
import time
import weakref
from collections.abc import Callable
from concurrent import futures
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import torch
from torch import Tensor

from loading.unreadable import SKIPPED
from models import CheckpointError, model_weights, read_checkpoint
from training.launching import launcher
from training.loggers import HISTORY, PREVIEW, TENSORBOARD
from training.run import Run
from utils import (
    Processes,
    UserError,
    all_gather_list,
    atomic_write,
    explain_write_errors,
    fsync_folder,
    reason,
    run_on_rank0,
    temporary_path,
)

LOCK = ".lock"
EPOCH_FILE = re.compile(r"epoch_(\d+)\.pth")
EVALUATIONS = re.compile(r"(?:best_model|last|previous|epoch_(\d+))_on_.+")  # evaluate.py's folders
BEST, LAST, PREVIOUS = "best_model.pth", "last.pth", "previous.pth"
CURVES, DATA_SHEET, RUN_JSON, RUN_LOG = "curves.png", "data.png", "run.json", "run.log"
RUN_FILES = (  # beside the epochs
    BEST, LAST, PREVIOUS, SKIPPED, HISTORY, PREVIEW, CURVES, DATA_SHEET, RUN_JSON, RUN_LOG, TENSORBOARD,
)  # fmt: skip
RETRY_SECONDS = 60.0  # after which a checkpoint that could not be written is tried again
FINAL_SECONDS = 3600.0  # how long the last epoch's is tried again
SHARED_SECONDS = 30.0  # within which another machine sees what rank 0 has written to a shared disk
PICTURE_SECONDS = 20.0  # between two drawings of the curves and the preview


class RunFolder:
    """A run's folder. All processes have one; only rank 0 calls what claims the folder or writes there.

    Within its `with` block no other run can write there, once it is claimed. What is saved is copied at once and
    written in a thread while the training goes on; `collect` reports what failed, and so does the block's end.
    The checkpoints of the `keep` newest epochs are kept, of all if it is 0.
    """

    def __init__(self, path: str | Path, keep: int):
        self.path, self.keep = Path(path), keep
        self._lock: BinaryIO | None = None
        self._best: dict | None = None  # the best model, until it is on the disk
        self._saved = True  # False once the newest checkpoint is known to have failed
        self._checkpoints, self._pictures = BackgroundWriter(), BackgroundWriter()
        self._next_pictures = 0.0

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            self._checkpoints.close()
            self._pictures.close()
        finally:
            if self._lock:
                self._lock.close()

    def claim_existing(self) -> None:
        """Claims a folder that holds a run, so that nobody writes a newer checkpoint; makes no folder and no lock."""
        if (self.path / LOCK).exists():
            with explain_write_errors(f"--checkpoint-dir {self.path}"):
                self._lock = claim(self.path)

    def warn_if_unshared(self, processes: Processes) -> None:
        """Warns if a machine does not see rank 0's folder: it may be rank 0's after a restart."""
        if processes.world_size == processes.local_world_size:
            return
        name = run_on_rank0(lambda: write_token(self.path), processes)
        end = time.monotonic() + SHARED_SECONDS
        while not (seen := (self.path / name).exists()) and time.monotonic() < end:
            time.sleep(0.1)
        blind = all_gather_list([] if seen else [socket.gethostname()])
        run_on_rank0(lambda: remove_token(self.path / name, blind), processes)

    def claim_for(self, run: Run, went_back: bool) -> None:
        """Makes the folder this run's: archives another run's files, and those newer than what it resumes from."""
        with explain_write_errors(f"--checkpoint-dir {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._lock or claim(self.path)
            archive = archive_files(self.path, files_to_archive(self.path, run.source, run.epochs_done, went_back))
            self._lock.truncate(0)
            self._lock.write(launcher().encode())
            self._lock.flush()
        if archive:
            print(f"an earlier run's files were moved to {archive}", flush=True)

    def has_best(self) -> bool:
        """Returns whether there is a best model, on the disk or on its way."""
        return self._best is not None or (self.path / BEST).exists()

    def save_epoch(self, run: Run, best: dict | None) -> None:
        """Saves a whole epoch's checkpoint, and the best model before it if it is one."""
        self._save(run.checkpoint(), lambda content: write_epoch(self.path, content, self.keep), best)

    def save_mid_epoch(self, run: Run, partial_metrics: list[dict]) -> None:
        """Saves last.pth in the middle of an epoch; the one before it stays as previous.pth."""
        self._save(run.checkpoint(partial_metrics), lambda content: write_last(self.path, content))

    def _save(self, content: dict, write: Callable[[dict], None], best: dict | None = None) -> None:
        self.collect(wait=True)  # before another copy is made
        copied = snapshot(content)
        if best is not None:
            self._best = {**best, "model": model_weights(copied)}  # the same weights, copied already
        self._saved = True
        self._checkpoints.submit(lambda: self._write(copied, write))

    def _write(self, content: dict, write: Callable[[dict], None]) -> None:
        if self._best is not None:  # first: a run that resumes from a checkpoint with its score would never save it
            save(self._best, self.path / BEST)
            self._best = None
        write(content)

    def collect(self, wait: bool = False) -> bool:
        """Reports what could not be written, of all that is done. Returns False, once, if that is a checkpoint."""
        if wait:
            self._checkpoints.wait()
        self._pictures.collect()
        written = self._checkpoints.collect()
        self._saved = self._saved and written
        return written

    def pictures_due(self) -> bool:
        """Returns whether the last pictures are drawn and old enough for new ones."""
        return time.monotonic() >= self._next_pictures and self._pictures.is_idle()

    def draw(self, work: Callable[[], object]) -> None:
        """Draws pictures in a thread of their own, for which no checkpoint waits."""
        self._next_pictures = time.monotonic() + PICTURE_SECONDS
        self._pictures.submit(work)

    def retry_final_save(self, run: Run) -> None:
        """Saves the last epoch again, for an hour, if it could not be written: no later checkpoint makes up for it."""
        self.collect(wait=True)
        end = time.monotonic() + FINAL_SECONDS
        while not self._saved:
            if time.monotonic() > end:
                raise CheckpointError(f"the last epoch cannot be written to {self.path}")
            time.sleep(RETRY_SECONDS)
            self.save_epoch(run, None)
            self.collect(wait=True)


class BackgroundWriter:
    """Runs one piece of work after another in a thread; failures are reported when they are asked for.

    No process is forked while it works: the child would hold whatever lock the thread holds, for ever.
    """

    def __init__(self) -> None:
        self._pool = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._works: list[futures.Future] = []
        if hasattr(os, "register_at_fork"):
            writer = weakref.ref(self)
            os.register_at_fork(before=lambda: (alive := writer()) and alive.wait())

    def submit(self, work: Callable[[], object]) -> None:
        """Queues work; what it needs must not change any more."""
        self._works.append(self._pool.submit(work))

    def is_idle(self) -> bool:
        return all(work.done() for work in self._works)

    def wait(self) -> None:
        futures.wait(self._works)

    def collect(self) -> bool:
        """Reports what could not be written, of all that is done. Returns whether all could."""
        done = [work for work in self._works if work.done()]
        self._works = [work for work in self._works if work not in done]
        return all([try_write(work.result) for work in done])

    def close(self) -> None:
        self._pool.shutdown()
        self.collect()


def try_write(write: Callable[[], object]) -> bool:
    """Returns whether a file could be written; if not, it is reported, and the training goes on."""
    try:
        write()
    except (UserError, OSError) as error:
        what = str(error)
        if isinstance(error, OSError) and error.filename:
            what = f"{error.filename} cannot be written: {error.strerror}"
        print(f"{what}: the training goes on, and it will be tried again", flush=True)
        return False
    return True


def save(content: dict, path: Path) -> None:
    """Writes what `read_checkpoint` accepts: CPU tensors, numbers, strings, and lists and dictionaries of them."""
    try:
        with atomic_write(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        raise CheckpointError(f"{path} cannot be written: {reason(error)}") from error


def snapshot(content: Any) -> Any:
    """Returns a copy on the CPU of all tensors, dictionaries and lists: none changes as the training goes on."""
    if isinstance(content, Tensor):
        return content.clone() if content.is_cpu else content.cpu()
    if isinstance(content, dict):
        copied = copy.copy(content)  # a state_dict also carries the versions of its layers
        copied.update((name, snapshot(value)) for name, value in content.items())
        return copied
    if isinstance(content, list | tuple):
        return type(content)(snapshot(value) for value in content)
    if type(content) not in (str, int, float, bool, type(None)):  # `read_checkpoint` would call the file damaged
        raise TypeError(f"a checkpoint cannot hold {type(content).__name__}: {content!r}")
    return content


def write_epoch(folder: Path, content: dict, keep: int) -> None:
    """Writes epoch_0001.pth and so on, links last.pth to it, removes all but the `keep` newest (0 keeps all)."""
    path = folder / f"epoch_{content['epoch']:04d}.pth"
    save(content, path)
    keep_previous(folder)
    link(path, folder / LAST)
    others = [file for file in epoch_files(folder) if file != path]  # numbers may be higher after going back
    for old in others[keep - 1 :] if keep else []:
        old.unlink()


def write_last(folder: Path, content: dict) -> None:
    """Writes last.pth in the middle of an epoch."""
    keep_previous(folder)
    save(content, folder / LAST)


def keep_previous(folder: Path) -> None:
    """Links previous.pth to a last.pth that is no epoch's."""
    last = folder / LAST
    if last.exists() and last.stat().st_nlink == 1:
        link(last, folder / PREVIOUS)


def link(path: Path, name: Path) -> None:
    """Gives a file a second name, which replaces another file of that name in one step."""
    temporary = temporary_path(name)
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, name)
    fsync_folder(name.parent)


def epoch_files(folder: Path, after: int = 0) -> list[Path]:
    """Returns the checkpoints of the epochs after one, newest first."""
    numbers = {path: int(match[1]) for path in folder.glob("epoch_*.pth") if (match := EPOCH_FILE.fullmatch(path.name))}
    return sorted((path for path in numbers if numbers[path] > after), key=numbers.__getitem__, reverse=True)


def evaluations(folder: Path, after: int = 0) -> list[Path]:
    """Returns evaluate.py's folders of the epochs after one, and of checkpoints that are no epoch's."""
    numbers = {path: match[1] for path in folder.glob("*_on_*") if (match := EVALUATIONS.fullmatch(path.name))}
    later = [path for path, number in numbers.items() if number is None or int(number) > after]
    return sorted(path for path in later if (path / "metrics.json").exists())  # else it is a run of such a name


def newest_usable(folder: Path) -> tuple[Path, dict] | None:
    """Returns the newest checkpoint that can be read, with its content; damaged ones are named and skipped."""
    last = first_usable([folder / LAST])
    if last:  # a run that was killed between two renames has an epoch's checkpoint that is newer
        candidates = [last, first_usable(epoch_files(folder, after=last[1]["epoch"]))]
    else:
        candidates = [first_usable([folder / PREVIOUS]), first_usable(epoch_files(folder))]
    return max(filter(None, candidates), key=lambda pair: (pair[1]["epoch"], pair[1].get("step", 0)), default=None)


def first_usable(paths: list[Path]) -> tuple[Path, dict] | None:
    """Returns the first checkpoint that can be read, with its content."""
    for path in filter(Path.exists, paths):
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            print(f"{error}: trying the one before it", flush=True)
    return None


def disk_needed(model_bytes: int, copies: int, keep: int, num_epochs: int) -> int:
    """Returns the bytes of a run's checkpoints at most, each with so many copies of the weights (moments, EMA)."""
    # The new one is complete before an old one goes; two more are of the middle of an epoch.
    kept = 2 + (min(keep + 1, num_epochs) if keep else num_epochs)
    return copies * model_bytes * kept + model_bytes


def write_token(folder: Path) -> str:
    """Writes a file whose name nobody has looked for yet, so that no machine's cache knows better. Returns the name."""
    with explain_write_errors(f"--checkpoint-dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / (name := f".shared_{uuid4().hex}")).touch()
    return name


def remove_token(token: Path, blind: list[str]) -> None:
    """Removes the file, and warns of machines that do not see it."""
    token.unlink(missing_ok=True)
    if blind:
        machines = " and ".join(sorted({*blind}))
        print(f"warning: {token.parent}, where rank 0 writes, is not seen by {machines}: a restart with rank 0 there "
              "would not find the checkpoints; on a shared disk it does", flush=True)  # fmt: skip


def claim(folder: Path) -> BinaryIO:
    """Keeps other runs out of a folder for as long as the returned file stays open and this process lives."""
    file = open(folder / LOCK, "ab")  # noqa: SIM115 - its being open is the claim
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise CheckpointError(f"another run is writing to {folder}: wait, or choose another --checkpoint-dir") from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        print(f"{folder} cannot be locked: see to it that no second run writes there", flush=True)
    if hasattr(os, "register_at_fork"):  # a killed run's loader workers live on for some seconds, without the claim
        claimed = weakref.ref(file)
        os.register_at_fork(after_in_child=lambda: (lock := claimed()) and lock.close())
    return file


def same_launcher(folder: Path) -> bool:
    """Returns whether the run in this folder was started by the same launcher as this process."""
    lock = folder / LOCK
    return lock.is_file() and lock.read_bytes() == launcher().encode()


def files_to_archive(folder: Path, source: Path | None, epoch: int, went_back: bool) -> list[Path]:
    """Returns the files that a run would overwrite and does not resume from, that is from `source` of this epoch.

    If it went back, to a file that was named, newer checkpoints are whole; else those are damaged.
    """
    run_files = [path for name in RUN_FILES if (path := folder / name).exists()]
    if source is None or source.resolve().parent != folder.resolve():
        files = epoch_files(folder) + run_files + evaluations(folder)
        nothing_to_lose = {path.name for path in files} <= {RUN_JSON, RUN_LOG, TENSORBOARD}
        killed_early = nothing_to_lose and files and (folder / LOCK).stat().st_size
        return [] if killed_early else files
    newer = epoch_files(folder, after=epoch)
    if went_back and newer:
        return newer + run_files + evaluations(folder, after=epoch)
    others = [path for path in (folder / LAST, folder / PREVIOUS) if path in run_files and path != source]
    return newer + [path for path in others if not is_usable(path)]


def is_usable(path: Path) -> bool:
    """Returns whether a checkpoint can be read."""
    with contextlib.suppress(CheckpointError):
        return bool(read_checkpoint(path))
    return False


def archive_files(folder: Path, files: list[Path]) -> Path | None:
    """Moves files to a subfolder of their own. Returns it, or None if there are no files."""
    if not files:
        return None
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    names = (folder / f"earlier_{stamp}{f'_{n}' if n else ''}" for n in range(1000))
    archive = next(path for path in names if not path.exists())
    archive.mkdir()
    for path in files:
        path.rename(archive / path.name)
    return archive
