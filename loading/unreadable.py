"""Photos that cannot be read: replaced in training, left out in validation, in both listed and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from loading.annotations import DataError
from utils import Processes, all_gather_list, atomic_write, counted

SKIPPED = "skipped.txt"  # lists them, in the run's folder
SMALL_SET = 200  # photos: of fewer, one may be unreadable whatever the limit, unless that is 0
NAMED_IN_ERROR = 3  # photos; the list has all of them


class PhotoSet(Protocol):
    """A data set of photos, as `COCOPersonDataset`; `name` is a photo's in lists."""

    seed: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def share_memory(self) -> None: ...

    def set_epoch(self, epoch: int) -> None: ...

    def path(self, index: int) -> Path: ...

    def name(self, index: int) -> str: ...


class SkipUnreadable(Dataset):
    """The samples of a data set of which a few photos may be unreadable.

    Args:
        dataset: whose samples these are.
        training: whether the next photo replaces one that cannot be read; else a batch is shorter by it.
        limit: the fraction of the photos that may be unreadable; more stop the run.
        folder: where `SKIPPED` lists them.
    """

    dataset: Any  # a PhotoSet; a COCOPersonDataset has more

    def __init__(self, dataset: PhotoSet, training: bool, limit: float, folder: str | Path):
        self.dataset, self.training, self.limit, self.list = dataset, training, limit, Path(folder) / SKIPPED
        self.seed = dataset.seed
        self._unreadable = torch.zeros(len(dataset), dtype=torch.bool)  # in this epoch, by all workers
        self._before: list[int] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def share_memory(self) -> None:
        """Lets loader workers that start later see the epoch, and tell which photos they could not read."""
        self._unreadable.share_memory_()
        self.dataset.share_memory()

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch: the photos that cannot be read are counted anew."""
        self._unreadable.zero_()
        self._unreadable[self._before] = True
        self._before = []
        self.dataset.set_epoch(epoch)

    def continue_epoch(self, unreadable: list[int]) -> None:
        """Makes the next epoch the rest of one in which these photos could not be read: they count as well."""
        self._before = unreadable

    def unreadable(self) -> list[int]:
        """Returns the photos that this process and its workers could not read in this epoch so far."""
        return self._unreadable.nonzero().flatten().tolist()

    def shown(self, index: int) -> int:
        """Returns the index of the photo whose sample was given for an index."""
        while self._unreadable[index]:
            index = (index + 1) % len(self)
        return index

    def own_pixels(self, indices: list[int]) -> torch.Tensor:
        """Returns which pixels of a validation batch are no bar's: bool (N, S, S), N photos that could be read."""
        return self.dataset.own_pixels([index for index in indices if not self._unreadable[index]])

    def __getitem__(self, index: int) -> torch.Tensor:
        """Returns the sample of a photo, or of the next one that can be read; a DataError if too many cannot."""
        while (sample := self._read(index)) is None:
            index = (index + 1) % len(self)
        return sample

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        """Returns the samples of a batch, as a DataLoader asks for them."""
        if self.training:
            return [self[index] for index in indices]
        return [sample for index in indices if (sample := self._read(index)) is not None]

    def _read(self, index: int) -> torch.Tensor | None:
        try:
            return self.dataset[index]
        except DataError:
            self._unreadable[index] = True
        self._check(len(self.unreadable()))  # now, not after the epoch: a disk may be gone
        return None

    def _gather(self, is_rank0: bool) -> int:
        reasons = dict(all_gather_list([*self._reasons().items()]))
        if is_rank0:
            self._check(len(reasons), reasons)
            if reasons and (problem := self._list(reasons)):
                print(problem, flush=True)
        return len(reasons)

    def _check(self, number: int, reasons: dict[int, str] | None = None) -> None:
        allowed = max(self.limit * len(self), self.limit > 0 and len(self) < SMALL_SET)  # True is 1
        if number <= allowed and number < len(self):
            return
        reasons = reasons or self._reasons()
        where = self._list(reasons) or f"{self.list} says why"
        paths = sorted(str(self.dataset.path(index)) for index in reasons)
        raise DataError(f"{number} of {counted(len(self), 'photo')} cannot be read, and --max-unreadable-fraction is "
                        f"{self.limit:g}: {', '.join(paths[:NAMED_IN_ERROR])}{', ...' * (len(paths) > NAMED_IN_ERROR)} "
                        f"({where})")  # fmt: skip

    def _reasons(self) -> dict[int, str]:
        """Returns why, by index. It reads the photos again: it may have been a worker that could not."""
        reasons = {}
        for index in self.unreadable():
            try:
                self.dataset[index]
                reasons[index] = "could not be read at first, and later could"
            except DataError as error:
                reasons[index] = str(error).removeprefix(f"the photo {self.dataset.path(index)} ")
        return reasons

    def _list(self, reasons: dict[int, str]) -> str:
        """Adds a line `name: reason` for each photo that the list lacks; returns why it cannot be written, or ""."""
        try:
            text = self.list.read_text("utf-8", errors="replace") if self.list.exists() else ""
            by_name = {" ".join(self.dataset.name(index).split()): reason for index, reason in sorted(reasons.items())}
            new = [f"{name}: {reason}\n" for name, reason in by_name.items() if f"\n{name}: " not in f"\n{text}"]
            if new:
                with atomic_write(self.list) as file:  # several workers may write it at the same time
                    file.write((text + "".join(new)).encode(errors="replace"))
        except OSError as error:
            return f"{self.list} cannot be written: {error.strerror}"
        return ""


def count_unreadable(train: SkipUnreadable, val: SkipUnreadable, processes: Processes) -> dict[str, int]:
    """Returns the numbers of an epoch for history.csv, over all processes and on each; rank 0 lists and checks them."""
    return {f"{name}_unreadable": data._gather(processes.is_rank0) for name, data in (("train", train), ("val", val))}
