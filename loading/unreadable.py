"""Photos that cannot be read: replaced in training, left out of the validation, in both named and counted."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.data import Dataset

from loading.annotations import DataError
from utils import Processes, atomic_write, from_all

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SKIPPED = "skipped.txt"  # names them, in the run's folder
FEW = 200  # photos: of fewer one may be broken, whatever its share, unless none may
NAMED_IN_ERROR = 3  # photos; the list has them all


class TolerantDataset(Dataset):
    """The samples of a data set, a few of whose photos may be unreadable.

    Args:
        dataset: whose samples these are.
        training: whether the next photo takes the place of one that cannot be read; else a batch goes without it.
        limit: the share of the photos; where more of them cannot be read, the run stops.
        folder: where `SKIPPED` names them.
    """

    def __init__(self, dataset: Dataset, training: bool, limit: float, folder: str | Path):
        self.dataset, self.training, self.limit, self.list = dataset, training, limit, Path(folder) / SKIPPED
        self.seed = dataset.seed
        self._bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()  # in this pass, as the workers find out
        self._met_before: list[int] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Begins a pass over the photos: those that cannot be read are found anew."""
        self._bad.zero_()
        self._bad[self._met_before] = True
        self._met_before = []
        self.dataset.set_epoch(epoch)

    def go_on(self, bad: list[int]) -> None:
        """The next pass is the rest of one in which these photos could not be read: they count as well."""
        self._met_before = bad

    def bad(self) -> list[int]:
        """The photos that could not be read in this pass so far, in this process and its workers."""
        return self._bad.nonzero().flatten().tolist()

    def __getitem__(self, index: int) -> torch.Tensor:
        """The sample of a photo, or of the next one that can be read (the first comes after the last).

        It is the very sample that the other photo has in this epoch: what stands in depends on the files alone.

        Raises:
            DataError: too many photos cannot be read.
        """
        while (sample := self._read(index)) is None:
            index = (index + 1) % len(self)
        return sample

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        """The samples of a batch: what a DataLoader asks for."""
        if self.training:
            return [self[index] for index in indices]
        return [sample for index in indices if (sample := self._read(index)) is not None]

    def _read(self, index: int) -> torch.Tensor | None:
        try:
            return self.dataset[index]
        except DataError:
            self._bad[index] = True
        self._check(len(self.bad()), self._reasons)  # now, not after an epoch: a disk may be gone
        return None

    def name_bad(self, is_main: bool) -> int:
        """How many could not be read in this pass, over all processes. The main one adds their names to the list.

        Raises:
            DataError: more than the limit; in the main process.
        """
        reasons = dict(from_all([*self._reasons().items()]))
        if is_main:
            self._check(len(reasons), lambda: reasons)
            if problem := self._list(reasons):
                print(problem, flush=True)
        return len(reasons)

    def _check(self, bad: int, find_reasons: Callable[[], dict[int, str]]) -> None:
        """Ends the run with an error; the list is written first, since nobody may come to it later."""
        allowed = max(self.limit * len(self), self.limit > 0 and len(self) < FEW)  # True is 1
        if bad <= allowed and bad < len(self):
            return
        reasons = find_reasons()
        problem = self._list(reasons)
        paths = sorted(str(self.dataset.path(index)) for index in reasons)
        named = ", ".join([*paths[:NAMED_IN_ERROR], *["..."][: len(paths) - NAMED_IN_ERROR]])
        number = f"{bad} of {len(self)} photo{'s' * (len(self) > 1)}"
        raise DataError(f"{number} cannot be read, and --max-bad-photos is {self.limit:g}: {named} "
                        f"({problem or f'{self.list} says why'})")  # fmt: skip

    def _reasons(self) -> dict[int, str]:
        """Why, by index. The files are asked again: it may have been a worker that met them."""
        reasons = {}
        for index in self.bad():
            try:
                self.dataset[index]
                reasons[index] = "could not be read at first, and later could"
            except DataError as error:
                reasons[index] = str(error).removeprefix(f"the photo {self.dataset.path(index)} ")
        return reasons

    def _list(self, reasons: dict[int, str]) -> str:
        return add_names(self.list, {self.dataset.name(index): reason for index, reason in reasons.items()})


def name_bad_photos(train: TolerantDataset, val: TolerantDataset, processes: Processes) -> dict[str, int]:
    """After an epoch, in every process: the numbers for history.csv. The main one writes the list.

    Raises:
        DataError: over all processes more than the limit; in the main one.
    """
    return {f"{name}_bad_photos": data.name_bad(processes.is_main) for name, data in (("train", train), ("val", val))}


def add_names(path: Path, reasons: dict[str, str]) -> str:
    """Adds a line `name: reason` for each name that the file has not. Returns what went wrong."""
    try:
        with _one_at_a_time(path.parent):
            text = path.read_text("utf-8", errors="replace") if path.exists() else ""
            pairs = [[" ".join(part.split()) for part in pair] for pair in sorted(reasons.items())]
            new = [f"{name}: {reason}\n" for name, reason in pairs if f"\n{name}: " not in "\n" + text]
            if new:
                with atomic_write(path) as file:
                    file.write((text + "".join(new)).encode(errors="replace"))
    except OSError as error:
        return f"{path} cannot be written: {error.strerror}"
    return ""


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Two workers may find at the same time that the limit is passed."""
    if not fcntl:  # Windows: one of the two fails to write, and says so
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def dead_worker(error: Exception) -> str:
    """What to do about a loader worker that the system has ended, or that found no room for a batch; "" if neither.

    Args:
        error: a RuntimeError of PyTorch's; the text is all that tells them apart.
    """
    if not re.search(r"DataLoader worker \(pid|</?torch_\d", str(error)):  # the latter is a piece of shared memory
        return ""
    return ("a loader worker was ended, or found no room for its batch: memory or shared memory ran out, as a rule; in "
            "a container raise the latter with docker run --ipc=host or --shm-size=2g, or use fewer --num-workers "
            "(0 needs none)")  # fmt: skip
