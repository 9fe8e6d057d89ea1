"""Photos that cannot be read: replaced in training, left out of the validation, in both named and counted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.data import Dataset

from loading.index import DataError
from utils import Processes, atomic_write, from_all

SKIPPED = "skipped.txt"  # names them, in the run's folder
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
        self._reasons: dict[int, str] = {}

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

    def __getitem__(self, index: int) -> torch.Tensor:
        """The sample of a photo, or of the next one that can be read (the first comes after the last).

        It is the very sample that the other photo has in this epoch: what stands in depends on the files and on
        nothing else.

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
        except DataError as error:
            self._bad[index], self._reasons[index] = True, str(error)
        bad = self.bad()
        if self.too_many(len(bad)):  # now, not after an epoch: a disk that is gone has a hundred thousand of them
            raise self.refusal(self.reasons(bad))
        return None

    def bad(self) -> list[int]:
        """The photos that could not be read in this pass so far, in this process and its workers."""
        return self._bad.nonzero().flatten().tolist()

    def too_many(self, bad: int) -> bool:
        return bad > self.limit * len(self) or bad == len(self)

    def refusal(self, reasons: dict[int, str]) -> DataError:
        """The error that ends the run; the list is written first, since nobody may come to it later."""
        problem = self.write(reasons)
        names = ", ".join(str(self._path(index)) for index in sorted(reasons)[:NAMED_IN_ERROR])
        return DataError(
            f"{len(reasons)} of {len(self)} photos cannot be read, and --max-bad-photos is {self.limit:g}: {names}"
            f"{', ...' if len(reasons) > NAMED_IN_ERROR else ''} ({problem or f'{self.list} says why'})"
        )

    def reasons(self, indices: list[int]) -> dict[int, str]:
        """Why each photo could not be read."""
        return {index: self._reason(index) for index in indices}

    def _reason(self, index: int) -> str:
        if index not in self._reasons:  # a worker knows it, who cannot tell: ask the file again, once
            try:
                self.dataset[index]
                self._reasons[index] = "could not be read at first, and later could"
            except DataError as error:
                self._reasons[index] = str(error)
        return self._reasons[index].removeprefix(f"the photo {self._path(index)} ")

    def _path(self, index: int) -> Path:
        return self.dataset.photos / self.dataset.index.file_name(index)

    def write(self, reasons: dict[int, str]) -> str:
        """Adds what is new to the list. Returns what went wrong; nothing is lost by it: the next pass tries again."""
        split, index = self.dataset.photos.name, self.dataset.index
        try:
            add_names(self.list, {f"{split}/{index.file_name(i)}": reason for i, reason in sorted(reasons.items())})
        except OSError as error:
            return f"{self.list} cannot be written: {error.strerror}"
        return ""


def name_bad_photos(train: TolerantDataset, val: TolerantDataset, processes: Processes) -> dict[str, int]:
    """After an epoch, in every process: the numbers for history.csv. The main one writes the list.

    Raises:
        DataError: over all processes more than the limit; in the main one.
    """
    return {f"{name}_bad_photos": _name(data, processes.is_main) for name, data in (("train", train), ("val", val))}


def _name(dataset: TolerantDataset, is_main: bool) -> int:
    reasons = dict(from_all([*dataset.reasons(dataset.bad()).items()]))
    if is_main and reasons:
        if dataset.too_many(len(reasons)):
            raise dataset.refusal(reasons)
        if problem := dataset.write(reasons):
            print(problem, flush=True)
    return len(reasons)


def add_names(path: Path, reasons: dict[str, str]) -> None:
    """Adds a line `name: reason` for each name that the file has not.

    Raises:
        OSError: it cannot be written; what was there is untouched.
    """
    with one_at_a_time(path.parent):
        text = path.read_text("utf-8", errors="replace") if path.exists() else ""
        lines = [" ".join(f"{name}: {reason}".split()) + "\n" for name, reason in reasons.items()]
        new = [line for line in lines if "\n" + line.partition(": ")[0] + ": " not in "\n" + text]
        if new:
            with atomic_write(path) as file:
                file.write((text + "".join(new)).encode(errors="replace"))


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Two workers may find at the same time that the limit is passed."""
    try:
        import fcntl
    except ImportError:  # Windows: one of the two fails to write, and says so
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
    text = str(error)
    died = re.search(r"DataLoader worker \(pid.*?(killed by signal: [\w ]+|exited unexpectedly)", text, re.DOTALL)
    if not died and not re.search(r"</?torch_\d", text):  # the name of a piece of shared memory
        return ""
    what = f"a loader worker was {died[1]}" if died else "a loader worker found no room for its batch"
    return (
        f"{what.replace('was exited', 'exited')}: memory or shared memory ran out, as a rule; in a container raise the "
        "latter with docker run --ipc=host or --shm-size=2g, or use fewer --num-workers (0 needs none)"
    )
