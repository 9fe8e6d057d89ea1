"""What a run keeps on disk: written whole or not at all, read as data only, moved aside rather than overwritten."""

from __future__ import annotations

import os
import re
import shutil
import weakref
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import torch

from loading.unreadable import SKIPPED
from training.launching import launcher
from utils import CheckpointError, atomic_write, flush_folder, read_checkpoint

LOCK = ".lock"
EPOCH_FILE = re.compile(r"epoch_(\d+)\.pth")
BEST, LAST, PREVIOUS = "best_model.pth", "last.pth", "previous.pth"
RUN_FILES = (BEST, LAST, PREVIOUS, SKIPPED, "history.csv", "preview.png")  # what a run leaves beside epoch_0001.pth ...


def save(content: dict, path: Path) -> None:
    """Writes tensors, numbers, texts, lists and dictionaries of them: what `read_checkpoint` accepts.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; what was there is untouched.
    """
    try:
        with atomic_write(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        raise CheckpointError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error


def save_epoch(folder: Path, content: dict, keep: int) -> None:
    """Writes epoch_0001.pth and so on, points last.pth to it, removes all but the `keep` newest (0 keeps all)."""
    path = folder / f"epoch_{content['epoch']:04d}.pth"
    save(content, path)
    _keep_last(folder)
    _link(path, folder / LAST)
    others = [file for file in epoch_files(folder) if file != path]  # numbers may be higher after going back
    for old in others[keep - 1 :] if keep else []:
        old.unlink()


def save_last(folder: Path, content: dict) -> None:
    """Writes last.pth in the middle of an epoch; the one before it stays as previous.pth."""
    _keep_last(folder)
    save(content, folder / LAST)


def _keep_last(folder: Path) -> None:
    last = folder / LAST
    if last.exists() and last.stat().st_nlink == 1:  # one after a whole epoch has a name of its own
        _link(last, folder / PREVIOUS)


def _link(path: Path, name: Path) -> None:
    """A second name for a file: no second copy on the disk, and replaced in one step."""
    draft = name.with_name(f".{name.name}.part")
    draft.unlink(missing_ok=True)
    try:
        os.link(path, draft)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, draft)
    os.replace(draft, name)
    flush_folder(name.parent)


def epoch_files(folder: Path) -> list[Path]:
    """The checkpoints of single epochs, newest first."""
    paths = [path for path in folder.glob("epoch_*.pth") if EPOCH_FILE.fullmatch(path.name)]
    return sorted(paths, key=lambda path: int(EPOCH_FILE.fullmatch(path.name)[1]), reverse=True)


def newest_usable(folder: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint that can be read; what is damaged is named and passed over."""
    last = _first_usable([folder / LAST])
    if last:  # a run that was killed between two renames has an epoch's checkpoint that is newer
        found = [last, _first_usable(epochs_after(folder, last[1]["epoch"]))]
    else:
        found = [_first_usable([folder / PREVIOUS]), _first_usable(epoch_files(folder))]
    return max(filter(None, found), key=lambda found: (found[1]["epoch"], found[1].get("step", 0)), default=None)


def epochs_after(folder: Path, epoch: int) -> list[Path]:
    """Their checkpoints, newest first."""
    return [path for path in epoch_files(folder) if int(EPOCH_FILE.fullmatch(path.name)[1]) > epoch]


def _first_usable(paths: list[Path]) -> tuple[Path, dict] | None:
    for path in paths:
        if path.exists():
            try:
                return path, read_checkpoint(path)
            except CheckpointError as error:
                print(f"{error}: trying the one before it", flush=True)
    return None


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
    _close_in_forked_processes(file)
    return file


def sign(claim: BinaryIO) -> None:
    """Writes into a claimed folder, once all in it belongs to this run, who has started this process."""
    claim.truncate(0)
    claim.write(launcher().encode())
    claim.flush()


def _close_in_forked_processes(file: BinaryIO) -> None:
    """A killed run's loader workers live for some seconds more: they must not keep its folder from the next run."""
    if hasattr(os, "register_at_fork"):
        claimed = weakref.ref(file)
        os.register_at_fork(after_in_child=lambda: claimed() and claimed().close())


def is_ours(folder: Path) -> bool:
    """Whether the run in this folder was started by the same launcher as this process."""
    lock = folder / LOCK
    return lock.is_file() and lock.read_bytes() == launcher().encode()


def set_aside(folder: Path, after: int = 0) -> Path | None:
    """Moves what another run left in a folder to a subfolder of its own.

    Args:
        folder: that the run writes to.
        after: the epoch that this run goes on from: what belongs to it or to one before stays.

    Returns:
        The subfolder; None where there was nothing to move.
    """
    newer = epochs_after(folder, after)
    leftovers = newer + [path for name in RUN_FILES if (path := folder / name).exists()]
    return _move_aside(folder, leftovers) if newer or not after else None


def set_aside_damaged(folder: Path, epoch: int, source: Path) -> Path | None:
    """The same with what a run passed over that goes on from `source`, the newest usable checkpoint, of this epoch."""
    others = [path for name in (LAST, PREVIOUS) if (path := folder / name).exists() and path != source]
    return _move_aside(folder, epochs_after(folder, epoch) + [path for path in others if not _is_usable(path)])


def _is_usable(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except CheckpointError:
        return False
    return True


def _move_aside(folder: Path, leftovers: list[Path]) -> Path | None:
    if not leftovers:
        return None
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    aside = next(p for n in range(1000) if not (p := folder / f"earlier_{stamp}{f'_{n}' if n else ''}").exists())
    aside.mkdir()
    for path in leftovers:
        path.rename(aside / path.name)
    return aside


def disk_needed(model_bytes: int, keep: int, num_epochs: int) -> int:
    """Bytes that a run's checkpoints take at most: Adam keeps two moments beside each weight."""
    # The new one is complete before an old one goes; two more are of the middle of an epoch.
    kept = 2 + (min(keep + 1, num_epochs) if keep else num_epochs)
    return 3 * model_bytes * kept + model_bytes
